"""The tokenizer's metadata: there, of the right types and lengths, with every id inside the vocabulary.

Two dialects are one: llama.cpp writes `tokenizer.ggml.model` = gemma4, Ollama llama. What the strings mean, and how
text is cut by them, is `text.tokenizer`'s business; this file says what is wrong with a file without building one.
"""

from collections.abc import Iterator

import numpy as np

from ..errors import Gemma4qError
from ..gguf.reader import GGUF
from ..gguf.strings import StringArray
from .metadata import Faults, Key, read

PREFIX = "tokenizer.ggml."
DIALECTS = ("gemma4", "llama")
BYTES = tuple(b"<0x%02X>" % byte for byte in range(256))
_INT32 = 2**31 - 1

# Ids are checked against the vocabulary too.
KEYS = (
    Key("model", "string"),
    Key("pre", "string", optional=True),
    Key("tokens", "string", length="any"),
    Key("merges", "string", length="any"),
    Key("scores", "float", length="tokens", optional=True),
    Key("token_type", "int32", 0, 255, length="tokens", optional=True),
    Key("bos_token_id", "integer", 0, _INT32, optional=True),
    Key("eos_token_id", "integer", 0, _INT32, optional=True),
    Key("unknown_token_id", "integer", 0, _INT32, optional=True),
    Key("padding_token_id", "integer", 0, _INT32, optional=True),
    Key("mask_token_id", "integer", 0, _INT32, optional=True),
    Key("eot_token_id", "integer", 0, _INT32, optional=True),
    Key("eos_token_ids", "int32", 0, _INT32, length="any", optional=True),
    Key("suppress_tokens", "int32", 0, _INT32, length="any", optional=True),
    Key("add_bos_token", "bool", optional=True),
    Key("add_space_prefix", "bool", optional=True),
)
_IDS = tuple(key.name for key in KEYS if key.name.endswith(("_id", "_ids", "suppress_tokens")))


def vocabulary_faults(gguf: GGUF) -> Faults:
    """All that is wrong with a model's vocabulary: missing_key, bad_type, bad_array, bad_tokenizer, shape_mismatch."""
    tokens = gguf.metadata.get(PREFIX + "tokens")
    count = len(tokens) if isinstance(tokens, StringArray) else 0
    values: dict = {}
    yield from read(gguf, PREFIX, KEYS, {"tokens": count}, values)
    if values.get("model", DIALECTS[0]) not in DIALECTS:
        yield _fault(f"{PREFIX}model is {values['model']!r}: {' and '.join(DIALECTS)} are Gemma 4's")
    if "tokens" not in values:
        return
    for name in _IDS:
        ids = np.atleast_1d(values.get(name, 0))
        if count and (bad := ids[ids >= count]).size:
            yield _fault(f"{PREFIX}{name} is {bad[0]}; there are {count} tokens")
    if fault := _not_text(tokens):
        yield fault
    spelt = _bracketed(tokens)
    for role in ("bos", "eos"):
        if f"{role}_token_id" not in values and f"<{role}>".encode() not in spelt:
            yield _fault(f"the vocabulary has no <{role}> and the file no {PREFIX}{role}_token_id")
    if missing := [name.decode() for name in BYTES if name not in spelt]:
        yield _fault(f"the vocabulary lacks {len(missing)} of 256 byte tokens, the first is {missing[0]}")
    table = gguf.tensors.get("token_embd.weight")
    if table is not None and table.shape[0] != count:
        yield Gemma4qError("shape_mismatch", f"token_embd.weight has {table.shape[0]} rows for {count} tokens")


def duplicate_tokens(tokens: StringArray) -> Iterator[Gemma4qError]:
    """A fault for each token that stands under more than one id."""
    first: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            yield _fault(f"tokens {first[token]} and {i} are both {token[:40]!r}")


def _fault(text: str) -> Gemma4qError:
    return Gemma4qError("bad_tokenizer", text)


def _bracketed(tokens: StringArray) -> set[bytes]:
    """The tokens of at most six bytes that begin with `<`: bos, eos and bytes are among them."""
    short = np.flatnonzero((tokens.lengths > 0) & (tokens.lengths <= 6))
    return {tokens[int(i)] for i in short[tokens.data[tokens.starts[short]] == ord("<")]}


def _not_text(tokens: StringArray) -> Gemma4qError | None:
    """A fault when a token is empty or not UTF-8, found in the vocabulary as one piece."""
    if not tokens.lengths.all():
        return _fault(f"token {int(np.argmin(tokens.lengths))} is empty")
    text = np.ones(len(tokens.data), bool)
    text[(tokens.offsets[:-1, None] + np.arange(8)).ravel()] = False
    # Where no token begins inside a character, all are UTF-8 when their chain is.
    bad = tokens.data[tokens.starts] & 0xC0 == 0x80
    try:
        tokens.data[text].tobytes().decode()
    except UnicodeDecodeError:
        bad |= [not _decodes(token) for token in tokens]
    return _fault(f"token {int(np.argmax(bad))} is not UTF-8") if bad.any() else None


def _decodes(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
