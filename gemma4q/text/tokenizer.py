"""Text to token ids and back, for a vocabulary as a GGUF file holds it.

Owns what tokens mean: which are special, control, bytes, ends of an answer or never an answer. All of them are found by
their text, for converters disagree about types and small vocabularies about ids. Merging is csrc/tokenizer.c's, or
text/bpe.py's where no compiler was; what a chat looks like is the template's.
"""

import os
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from os import PathLike

import numpy as np

from gemma4q import abi
from gemma4q.errors import Gemma4qError
from gemma4q.text.bpe import SPACE_MARK, Problem, PythonBpe, refusal

KEY = "tokenizer.ggml."

# Print as nothing.
CONTROL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|think|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
# Print as themselves, and are recognised in text even where control tokens are not.
MARKUP = ("<|tool_call>", "<tool_call|>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>")
HANDOVER = "<|tool_response>"  # printed like markup, but it ends an answer
STOPS = ("<eos>", "<turn|>", HANDOVER)
# No answer can contain them: engines that sampled them have shown floods of padding.
NEVER = (*(text for text in CONTROL if text not in STOPS), "[multimodal]", "<tool_response|>")


class NativeBpe:
    """csrc/tokenizer.c: the same three methods as PythonBpe. Safe to call from many threads at once."""

    def __init__(self, tokens, merges):
        arrays = [_string_array(tokens), _string_array(merges)]
        made, where = abi.ffi.new("tokenizer **"), abi.ffi.new("int64_t *")
        seed = int.from_bytes(os.urandom(8))
        problem = abi.lib.tokenizer_new(arrays[0][0], arrays[1][0], seed, made, where)
        if problem != Problem.OK:
            raise refusal(problem, where[0])
        self._tokenizer = abi.ffi.gc(made[0], abi.lib.tokenizer_free)

    def find(self, text: str) -> int | None:
        data = text.encode()
        token = abi.lib.tokenizer_find(self._tokenizer, data, len(data))
        return None if token < 0 else token

    def text(self, token: int) -> bytes:
        size = abi.ffi.new("int64_t *")
        return bytes(abi.ffi.buffer(abi.lib.tokenizer_text(self._tokenizer, token, size), size[0]))

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data)
        while True:  # a second time only where bytes become several tokens each
            ids = np.empty(room, np.int32)
            count = abi.lib.tokenizer_encode(
                self._tokenizer, data, len(data), abi.ffi.from_buffer("int32_t *", ids), room
            )
            if count < 0:
                raise Gemma4qError("too_big", f"no memory to tokenize a text of {len(data)} bytes: send less at once")
            if count <= room:
                return ids[:count].tolist()
            room = count


class Tokenizer:
    """A vocabulary at work. `metadata`: a GGUF file's, with string arrays as (data, starts, lengths).

    bos, eos: ids. size: how many tokens. special_ids: text -> id of the special tokens that this vocabulary has.
    stops: ids that end an answer. never: ids that no answer contains.
    `python`: merge with text/bpe.py even where the compiled library exists.
    Raises Gemma4qError `bad_tokenizer`, `bad_type`, `bad_array` or `missing_key`, naming what is at fault.
    """

    def __init__(self, metadata: Mapping, python: bool = False):
        _check_model(metadata)
        tokens, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
        self.size = len(tokens.starts)
        _check_array(metadata, "scores", "f", self.size)
        _check_array(metadata, "token_type", "iu", self.size)
        self._bpe = (PythonBpe if python or abi.lib is None else NativeBpe)(tokens, merges)
        self.bos = self._role(metadata, "bos")
        self.eos = self._role(metadata, "eos")
        self.special_ids = self._present((*CONTROL, *MARKUP, HANDOVER))
        self.stops = frozenset({self.eos, *self._present(STOPS).values()})
        self.never = frozenset(
            {*self._present(NEVER).values(), *self._unused(tokens), *_suppressed(metadata, self.size)}
        )
        self._control = frozenset(self._present(CONTROL).values())
        self._bytes = {self._bpe.find(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
        self._patterns = {True: _any_of(self.special_ids), False: _any_of(self._present(MARKUP))}

    @classmethod
    def from_gguf(cls, source, python: bool = False) -> "Tokenizer":
        """From an open GGUF, or the path of one; a file with a vocabulary and no tensors will do."""
        if isinstance(source, (str, PathLike)):
            from gemma4q.gguf.reader import open_gguf

            source = open_gguf(source)
        return cls(source.metadata, python)

    def encode(self, text: str | bytes, bos: bool = False, special: bool | None = None) -> list[int]:
        """The ids of `text`; lone surrogates and bytes that are not UTF-8 count as U+FFFD.

        special: None takes the text as it is written, right for whatever a user or a tool wrote; True turns the
        spelling of a special token into that token; False does so for markup but not for control tokens (llama.cpp's
        parse_special=false). bos: begin with that token, once.
        """
        text = _unicode(text)
        ids = [self.bos] if bos else []
        if special is None:
            return ids + self._bpe.encode(text)
        for i, part in enumerate(self._patterns[special].split(text)):
            if i % 2:
                ids.append(self.special_ids[part])
            elif part:
                ids += self._bpe.encode(part)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, their bytes joined first; what is not UTF-8 becomes U+FFFD. special: as in piece."""
        return b"".join([self.piece(token, special) for token in ids]).decode("utf-8", "replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token adds to a text: none for a control token, or its spelling with `special`.

        Raises Gemma4qError `bad_token` for an id that the vocabulary does not have.
        """
        if not 0 <= token < self.size:
            raise Gemma4qError("bad_token", f"token {token} is not in this vocabulary of {self.size}")
        if token in self._bytes:
            return self._bytes[token]
        if token in self._control and not special:
            return b""
        return self._bpe.text(token).replace(SPACE_MARK.encode(), b" ")

    def token_id(self, text: str) -> int | None:
        """The token spelled exactly so in the file (a space is U+2581 there); None where there is none."""
        return self._bpe.find(_unicode(text))

    def id(self, text: str) -> int:
        """The token spelled exactly so, for a prompt that needs it; raises Gemma4qError `bad_tokenizer` without one."""
        token = self.token_id(text)
        if token is None:
            raise Gemma4qError("bad_tokenizer", f"the vocabulary has no {text}, which this prompt needs")
        return token

    def _present(self, texts: Iterable[str]) -> dict[str, int]:
        return {text: token for text in texts if (token := self._bpe.find(text)) is not None}

    def _role(self, metadata: Mapping, role: str) -> int:
        """The id of `<role>`; the file's number counts where no token has that text."""
        key = f"{KEY}{role}_token_id"
        token = metadata.get(key)
        if token is not None and (not _is_int(token) or not 0 <= token < self.size):
            raise Gemma4qError("bad_tokenizer", f"{key} is {token!r}, not one of {self.size} tokens")
        by_text = self._bpe.find(f"<{role}>")
        if by_text is None and token is None:
            raise Gemma4qError("bad_tokenizer", f"the vocabulary has no <{role}> and the file no {key}")
        return int(token) if by_text is None else by_text

    def _unused(self, tokens) -> list[int]:
        """Ids of `<unused0>`, `<unused1>`, ..."""
        openers = np.flatnonzero(np.asarray(tokens.data)[tokens.starts] == ord("<")).tolist()
        return [token for token in openers if re.fullmatch(rb"<unused\d+>", self._bpe.text(token))]


def _string_array(array):
    """The C view of a string array, and the arrays that must outlive it."""
    starts = np.ascontiguousarray(array.starts, np.int64)
    lengths = np.ascontiguousarray(array.lengths, np.int64)
    data = np.asarray(array.data)
    view = abi.ffi.new("string_array *")
    view.data, view.data_bytes, view.count = abi.address(data), len(data), len(starts)
    view.starts = abi.ffi.cast("int64_t *", starts.ctypes.data)
    view.lengths = abi.ffi.cast("int64_t *", lengths.ctypes.data)
    return view, (starts, lengths, data)


def _is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _unicode(text: str | bytes) -> str:
    """Text that can be UTF-8: every lone surrogate and every byte that is none of a character is U+FFFD."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Splits at the longest of `texts` that starts leftmost; with none of them, nowhere."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")" if texts else "(?!)")


def _check_model(metadata: Mapping):
    """This algorithm is `gemma4`'s; some converters call it `llama` and say gemma4 elsewhere."""
    model, *dialects = (str(metadata.get(key)) for key in (KEY + "model", KEY + "pre", "general.architecture"))
    if model != "gemma4" and not (model == "llama" and "gemma4" in dialects):
        raise Gemma4qError("bad_tokenizer", f"{KEY}model is {model[:80]!r}: gemma4 is the one understood here")


def _strings(metadata: Mapping, name: str):
    array = metadata.get(KEY + name)
    if array is None:
        raise Gemma4qError("missing_key" if name == "merges" else "bad_tokenizer", f"the file has no {KEY}{name}")
    if not all(hasattr(array, part) for part in ("data", "starts", "lengths")) or isinstance(array, np.ndarray):
        raise Gemma4qError("bad_type", f"{KEY}{name} is not an array of strings")
    return array


def _check_array(metadata: Mapping, name: str, kinds: str, size: int):
    """Scores and types are not used, but a file that has them wrong is not to be trusted with the rest."""
    if (array := metadata.get(KEY + name)) is None:
        return
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.dtype.itemsize != 4:
        wanted = "floats" if kinds == "f" else "integers"
        raise Gemma4qError("bad_type", f"{KEY}{name} is not an array of 32-bit {wanted}")
    if len(array) != size:
        raise Gemma4qError("bad_array", f"{KEY}{name} has {len(array)} entries for {size} tokens")


def _suppressed(metadata: Mapping, size: int) -> list[int]:
    array = metadata.get(KEY + "suppress_tokens")
    if array is None:
        return []
    if not isinstance(array, np.ndarray) or (len(array) and array.dtype.kind not in "iu"):
        raise Gemma4qError("bad_type", f"{KEY}suppress_tokens is not an array of integers")
    bad = (array < 0) | (array >= size)
    if bad.any():
        raise Gemma4qError("bad_tokenizer", f"{KEY}suppress_tokens names {array[bad][0]}, not one of {size} tokens")
    return array.tolist()
