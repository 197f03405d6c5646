"""The tokenizer's metadata: there, of the right types and lengths, with every id inside the vocabulary.

Both dialects are one: llama.cpp writes `tokenizer.ggml.model` = gemma4, Ollama llama with `tokenizer.ggml.pre` = gemma4.
What the strings mean, and how text is cut by them, is `text.tokenizer`'s business.
"""

from collections.abc import Iterator

import numpy as np

from ..errors import Gemma4qError
from ..gguf.reader import GGUF
from ..gguf.strings import StringArray
from .metadata import Faults, Key, read

PREFIX = "tokenizer.ggml."
BYTE_TOKEN = 6  # token_type of <0x00> ... <0xFF>
_INT32 = 2**31 - 1

# Ids are checked against the vocabulary, lengths against the number of tokens.
KEYS = (
    Key("model", "string"),
    Key("pre", "string", optional=True),
    Key("tokens", "string", length="any"),
    Key("merges", "string", length="any"),
    Key("scores", "float", length="tokens", optional=True),
    Key("token_type", "integer", 0, 255, length="tokens"),
    Key("bos_token_id", "integer", 0, _INT32),
    Key("eos_token_id", "integer", 0, _INT32),
    Key("unknown_token_id", "integer", 0, _INT32, optional=True),
    Key("padding_token_id", "integer", 0, _INT32, optional=True),
    Key("mask_token_id", "integer", 0, _INT32, optional=True),
    Key("eot_token_id", "integer", 0, _INT32, optional=True),
    Key("eos_token_ids", "integer", 0, _INT32, length="any", optional=True),
    Key("suppress_tokens", "integer", 0, _INT32, length="any", optional=True),
    Key("add_bos_token", "bool", optional=True),
    Key("add_space_prefix", "bool", optional=True),
)
_IDS = tuple(key.name for key in KEYS if key.name.endswith(("_id", "_ids", "suppress_tokens")))


def vocabulary_faults(gguf: GGUF) -> Faults:
    """All that is wrong with a model's vocabulary: missing_key, bad_type, bad_array, bad_tokenizer, shape_mismatch."""
    tokens = gguf.metadata.get(PREFIX + "tokens")
    values: dict = {}
    count = len(tokens) if isinstance(tokens, StringArray) else 0
    yield from read(gguf, PREFIX, KEYS, {"tokens": count}, values)
    if "tokens" not in values:
        return
    dialect = values.get("model"), values.get("pre", "gemma4")
    if "model" in values and dialect not in (("gemma4", dialect[1]), ("llama", "gemma4")):
        yield Gemma4qError("bad_tokenizer", f"{PREFIX}model is {dialect[0]!r}, pre {dialect[1]!r}: not Gemma 4's")
    for name in _IDS:
        for token in np.atleast_1d(values.get(name, ())):
            if token >= count:
                yield Gemma4qError("bad_tokenizer", f"{PREFIX}{name} is {token}; there are {count} tokens")
                break
    if fault := _not_text(tokens):
        yield fault
    if "token_type" in values:
        yield from _byte_token_faults(tokens, values["token_type"])
    table = gguf.tensors.get("token_embd.weight")
    if table is not None and table.shape[0] != count:
        fault = f"token_embd.weight has {table.shape[0]} rows for {count} tokens"
        yield Gemma4qError("shape_mismatch", fault)


def duplicate_tokens(tokens: StringArray) -> Iterator[Gemma4qError]:
    """A fault for each token that stands under more than one id: text never becomes the later one."""
    first: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            yield Gemma4qError("bad_tokenizer", f"tokens {first[token]} and {i} are both {token[:40]!r}")


def _byte_token_faults(tokens: StringArray, types: np.ndarray) -> Faults:
    """Text that no other token covers is spelt in bytes, so each of the 256 must be there, once."""
    found = np.flatnonzero(types == BYTE_TOKEN)
    if len(found) > 256:
        yield Gemma4qError("bad_tokenizer", f"{len(found)} tokens are of type byte; there are 256 bytes")
        return
    names = {tokens[int(i)]: int(i) for i in found}
    wanted = {b"<0x%02X>" % byte for byte in range(256)}
    for name in sorted(names.keys() - wanted):
        yield Gemma4qError(
            "bad_tokenizer", f"token {names[name]} is of type byte but is {name[:40]!r}, not <0x00> to <0xFF>"
        )
    if missing := sorted(wanted - names.keys()):
        yield Gemma4qError(
            "bad_tokenizer", f"{len(missing)} byte tokens are missing, the first is {missing[0].decode()}"
        )


def _not_text(tokens: StringArray) -> Gemma4qError | None:
    """A fault when a token is empty or not UTF-8, found in the vocabulary as one piece."""
    lengths, starts = tokens.lengths, tokens.starts
    if not lengths.all():
        return Gemma4qError("bad_tokenizer", f"token {int(np.argmin(lengths))} is empty")
    text = np.ones(len(tokens.data), bool)
    text[(tokens.offsets[:-1, None] + np.arange(8)).ravel()] = False
    # Where no token begins inside a character, all are UTF-8 when their chain is.
    inside = tokens.data[starts] & 0xC0 == 0x80
    try:
        tokens.data[text].tobytes().decode()
    except UnicodeDecodeError:
        inside |= [not _decodes(token) for token in tokens]
    return Gemma4qError("bad_tokenizer", f"token {int(np.argmax(inside))} is not UTF-8") if inside.any() else None


def _decodes(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
