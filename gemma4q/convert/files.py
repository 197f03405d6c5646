"""The small files of a Hugging Face directory, read with care: JSON of bounded size, in which no key appears twice."""

import json
import os
import re
from collections import Counter
from pathlib import Path

from ..errors import Gemma4qError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LARGEST = 512 << 20  # bytes; Gemma's tokenizer.json has 32 MB


def read_json(path: Path, largest: int = LARGEST) -> dict:
    """The object in a JSON file. Raises not_found, not_readable or bad_json."""
    return parse_json(read_text(path, largest), path)


def optional_json(path: Path) -> dict:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A UTF-8 file's text. Raises not_found, not_readable, too_big or bad_string."""
    try:
        fileno = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Gemma4qError("not_found", f"{path}: there is no such file") from None
    except OSError as error:
        raise Gemma4qError("not_readable", f"{path}: {error.strerror}") from None
    try:
        size = os.fstat(fileno).st_size
        if size > largest:
            raise Gemma4qError("too_big", f"{path} has {size:,} bytes; at most {largest:,} are read")
        return read_text_file(path, fileno, 0, size)
    finally:
        os.close(fileno)


def read_text_file(path: Path, fileno: int, start: int, length: int) -> str:
    """`length` bytes of an open file as text."""
    try:
        with open(fileno, "rb", closefd=False) as file:
            file.seek(start)
            return file.read(length).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Gemma4qError("bad_string", f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise Gemma4qError("not_readable", f"{path}: {error.strerror}") from None


def parse_json(text: str, path: Path) -> dict:
    """The object that `text` of a file is. Raises bad_json, also for a key that appears twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise Gemma4qError("bad_json", f"{path}: {twice[:100]!r} appears twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise Gemma4qError("bad_json", f"{path} is nested too deeply") from None
    except ValueError as error:
        raise Gemma4qError("bad_json", f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise Gemma4qError("bad_json", f"{path} is not a JSON object")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Gemma4qError("bad_json", f"{path} holds half a character (a lone surrogate)") from None
    return value


def is_count(value: object, largest: int) -> bool:
    """Whether a JSON value is a whole number from 0 to `largest`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
