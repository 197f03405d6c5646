"""The `tokenizer.*` keys of a GGUF file, from tokenizer.json, or from tokenizer.model where that is all there is.

Owns how tokens, their types, merges, special ids and the chat template are found; what they mean is `text.tokenizer`'s.
Types are llama.cpp's: what its chat parser has to see is user-defined, all other special tokens are control.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError
from ..gguf.strings import StringArray
from ..text.tokenizer import CONTROL as CONTROL_TEXTS
from ..text.tokenizer import HANDOVER, KEY, MARKUP
from .files import is_count, optional_json, read_json, read_text

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SCORE = -1000.0  # of every token: merges alone decide
MOST_TOKENS, MOST_MERGES = 1 << 20, 1 << 22
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
VISIBLE = frozenset((*MARKUP, HANDOVER))
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
LARGEST_TEMPLATE = 4 << 20


def tokenizer_keys(folder: Path, config: dict) -> dict[str, object]:
    """The vocabulary, merges, special ids and chat template of a directory. Raises not_found or bad_tokenizer."""
    settings = optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        tokens, types, merges = _from_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        tokens, types, merges = _from_sentencepiece(folder / "tokenizer.model", settings)
    else:
        raise Gemma4qError("not_found", f"{folder} has neither tokenizer.json nor tokenizer.model")
    keys = {
        "model": "gemma4",
        "tokens": string_array(tokens),
        "scores": np.full(len(tokens), SCORE, "<f4"),
        "token_type": np.array(types, "<i4"),
        "merges": string_array(merges),
        **_special_ids(tokens, settings, config),
        "add_bos_token": True,
        "add_space_prefix": False,
    }
    template = _template(folder, settings)
    return {KEY + key: value for key, value in keys.items()} | template


def string_array(strings: Iterable[str]) -> StringArray:
    """Strings as a GGUF file holds them."""
    raw = [text.encode() for text in strings]
    data = b"".join(len(text).to_bytes(8, "little") + text for text in raw)
    offsets = np.cumsum([0, *(8 + len(text) for text in raw)])
    return StringArray(np.frombuffer(data, np.uint8), offsets)


def _from_json(path: Path) -> tuple[list[str], list[int], list[str]]:
    """Tokens by id, their types, and merges as `left right`, of a tokenizer.json."""
    found = read_json(path)
    model, added = found.get("model"), found.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _bad(path, "it is no byte pair encoding with byte fallback, as Gemma 4's is")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise _bad(path, "vocab, merges or added_tokens are missing")
    if len(vocab) > MOST_TOKENS or len(merges) > MOST_MERGES or len(added) > MOST_TOKENS:
        raise _bad(path, f"{len(vocab)} tokens and {len(merges)} merges are more than any Gemma has")
    ids, special = dict(vocab), set()
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise _bad(path, "an added token has no content")
        if ids.setdefault(token["content"], token.get("id")) != token.get("id"):
            raise _bad(path, f"{token['content'][:40]!r} has the ids {ids[token['content']]} and {token.get('id')}")
        special |= {token["content"]} if token.get("special") else set()
    return _by_id(path, ids), _types(_by_id(path, ids), special, set(vocab)), [_merge(path, pair) for pair in merges]


def _by_id(path: Path, ids: Mapping[str, object]) -> list[str]:
    tokens: list[str | None] = [None] * len(ids)
    for text, number in ids.items():
        if not is_count(number, len(ids) - 1) or tokens[number] is not None:
            raise _bad(path, f"token {text[:40]!r} has the id {number!r}: ids must be 0 to {len(ids) - 1}, each once")
        tokens[number] = text
    return tokens


def _types(tokens: Iterable[str], special: set[str], base: set[str]) -> list[int]:
    def type_of(text: str) -> int:
        if text in VISIBLE:
            return USER_DEFINED
        if text in BYTES:
            return BYTE
        return CONTROL if text in special else NORMAL if text in base else USER_DEFINED

    return [type_of(text) for text in tokens]


def _merge(path: Path, pair: object) -> str:
    """A merge as GGUF spells it: two pieces and a space; a space inside a piece would be taken for it."""
    parts = pair.split(" ", 1) if isinstance(pair, str) else pair
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
        raise _bad(path, f"merge {str(pair)[:60]!r} is not two pieces")
    return " ".join(part.replace(" ", "\u0120") for part in parts)


def _from_sentencepiece(path: Path, settings: dict) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a SentencePiece model, whose merges are the ways to put a piece together."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        hint = "pip install 'gemma4q[convert]', or put the model's tokenizer.json beside it"
        raise Gemma4qError("missing_package", f"{path} needs the package sentencepiece: {hint}") from None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise _bad(path, f"sentencepiece cannot read it: {error}") from None
    count = model.get_piece_size()
    tokens = [model.id_to_piece(i) for i in range(count)]
    scores = {tokens[i]: model.get_score(i) for i in range(count) if not (model.is_control(i) or model.is_byte(i))}
    decoder = settings.get("added_tokens_decoder", {})
    special = {token["content"] for token in decoder.values() if token.get("special")} | {*CONTROL_TEXTS}
    special |= {tokens[i] for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    return tokens, _types(tokens, special, set(tokens)), derived_merges(scores)


def derived_merges(scores: Mapping[str, float]) -> list[str]:
    """The merges a SentencePiece vocabulary stands for: every way to make a piece of two, the best piece first.

    Of one score, those with the longest left part come first: so are Gemma's published merges ordered.
    """
    found = []
    for piece, score in scores.items():
        if len(piece) > 1 and piece not in CONTROL_TEXTS and piece not in VISIBLE:
            cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            found += [(-score, -len(a), -len(b), f"{a} {b}") for a, b in cuts if a in scores and b in scores]
    return [merge for *_, merge in sorted(found, key=lambda entry: entry[:3])]


def _special_ids(tokens: list[str], settings: dict, config: dict) -> dict[str, int]:
    """`bos_token_id` and its kin: the token that tokenizer_config.json names, else the id that config.json gives."""
    index = {text: i for i, text in reversed(list(enumerate(tokens)))}
    inner = config.get("text_config")
    found = {}
    for role, name in ROLES.items():
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = index.get(text) if isinstance(text, str) else None
        for place in (config, inner if isinstance(inner, dict) else {}):
            given = place.get(f"{role}_token_id")
            number = given if number is None and is_count(given, len(tokens) - 1) else number
        if number is not None:
            found[f"{name}_token_id"] = number
    return found


def _template(folder: Path, settings: dict) -> dict[str, str]:
    """The chat template: the one in tokenizer_config.json, else chat_template.jinja, else chat_template.json."""
    text = settings.get("chat_template")
    if text is None and (folder / "chat_template.jinja").exists():
        text = read_text(folder / "chat_template.jinja", LARGEST_TEMPLATE)
    if text is None:
        text = optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(text, list):  # several, by name
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    return {"tokenizer.chat_template": text} if isinstance(text, str) else {}


def _bad(path: Path, text: str) -> Gemma4qError:
    return Gemma4qError("bad_tokenizer", f"{path}: {text}")
