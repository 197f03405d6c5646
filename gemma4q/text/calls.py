"""Reads the function calls that the model wrote (spec: chat 5.3).

A call's text holds `QUOTE` where the model emitted the quote token: a lone surrogate, which no decoded text contains. A
strict pass reads the trained syntax; a lenient one the drift seen in the field, helped by the function's JSON schema.
What cannot be read is returned as None and stays text: nothing is ever dropped.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gemma4q.text.tools import DEPTH

QUOTE = "\ud800"
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![^\s,}\])])")
WORD = re.compile(r"(true|false|null)(?![^\s,}\])])")
BARE_KEY = re.compile(r"[^:{}\[\],\"" + QUOTE + r"]+(?=:)")
JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
HEAD = re.compile(r"\s*call:([^{]*)\{")
LENIENT_HEAD = re.compile(r"\s*call:\s*([^{(]*)([{(])")
LENIENT_KEY = re.compile(r"[^:={}\[\](),\"'" + QUOTE + r"]+(?=[:=])")
NEXT_KEY = re.compile(rf"\s*[\"'{QUOTE}]?([^\s:={{}}\[\](),\"'{QUOTE}]+)[\"'{QUOTE}]?\s*[:=]")
AFTER_STRING = re.compile(rf"\s*{QUOTE}?\s*([,}}\])]|$)")
CLOSING = re.compile(r"[}\])\s]*\Z")
LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
CLOSERS = {"{": "}", "[": "]", "(": ")"}
EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]


class Unreadable(ValueError):
    """The text is no call."""


def spelled(text: str) -> str:
    """A call's text for people, quote tokens as the model's vocabulary spells them."""
    return text.replace(QUOTE, '<|"|>')


def parse_call(text: str, schemas: Mapping[str, Mapping[str, Any]] | None = None) -> Call | None:
    """The call between a call's two tokens, None if it cannot be read. `schemas`: function name to JSON schema.

    What JSON or UTF-8 cannot say, 1e999 or half a surrogate pair, cannot be read.
    """
    for read in (strict, lenient):
        try:
            call = read(text, schemas or EMPTY)
            json.dumps([call.name, call.arguments], allow_nan=False, ensure_ascii=False).encode()
        except ValueError:
            continue
        return call
    return None


def strict(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> Call:
    """The trained syntax, with a string or the last brackets left open repaired."""
    if text.count(QUOTE) % 2:
        end = len(text.rstrip("}] \n"))
        text = text[:end] + QUOTE + text[end:]
    head = HEAD.match(text)
    if not head or not head[1].strip():
        raise Unreadable
    name = head[1].strip()
    reader = Reader(text, head.end())
    arguments = reader.read_object("}", schemas.get(name) or EMPTY, 0)
    reader.end()
    return Call(name, arguments)


def lenient(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> Call:
    """The trained syntax as models misremember it."""
    head = LENIENT_HEAD.match(text)
    if not head or not head[1].strip():
        raise Unreadable
    name = head[1].strip()
    reader = LenientReader(text, head.end())
    arguments = reader.read_object(CLOSERS[head[2]], schemas.get(name) or EMPTY, 0)
    reader.end()
    return Call(name, arguments)


def schema_type(schema: Any) -> Any:
    return schema.get("type") if isinstance(schema, Mapping) else None


def below(schema: Any, key: str) -> Mapping[str, Any]:
    """A schema's mapping under `key`, empty if it has none."""
    found = schema.get(key) if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else EMPTY


class Reader:
    """Recursive descent over one call. The end of the text closes whatever is open behind a whole value."""

    key_ends = ":"

    def __init__(self, text: str, at: int):
        self.text = text
        self.at = at

    def fail(self) -> NoReturn:
        raise Unreadable(f"at {self.at}")

    def skip(self) -> str:
        """The next character that is not space, not consumed; empty at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match[0] if match else None

    def end(self) -> None:
        if self.skip():
            self.fail()

    def until_quote(self) -> str:
        """The text from behind a quote token to the next one; both are consumed."""
        end = self.text.find(QUOTE, self.at + 1)
        if end < 0:
            self.fail()
        inside, self.at = self.text[self.at + 1 : end], end + 1
        return inside

    def json_text(self) -> str:
        written = self.take(JSON_TEXT)
        if written is None:
            self.fail()
        return json.loads(written, strict=False)

    def read_object(self, close: str, schema: Any, depth: int) -> dict[str, Any]:
        """Behind the opening bracket, to behind the closing one."""
        if depth > DEPTH:
            self.fail()
        properties, result = below(schema, "properties"), {}
        if self.closed(close):
            return result
        while True:
            key = self.read_key()
            if not self.skip() or self.text[self.at] not in self.key_ends:
                self.fail()
            self.at += 1
            result[key] = self.read_value(close, properties.get(key), properties, depth)
            if not self.more(close):
                return result

    def read_array(self, schema: Any, depth: int) -> list[Any]:
        if depth > DEPTH:
            self.fail()
        result: list[Any] = []
        if self.closed("]"):
            return result
        while True:
            result.append(self.read_value("]", below(schema, "items"), EMPTY, depth))
            if not self.more("]"):
                return result

    def closed(self, close: str) -> bool:
        """Whether the bracket closes here, which consumes it; the end of the text closes all."""
        found = self.skip()
        self.at += found == close
        return found in ("", close)

    def more(self, close: str) -> bool:
        """Whether a comma promises another item, which consumes it."""
        if self.closed(close):
            return False
        if self.text[self.at] != ",":
            self.fail()
        self.at += 1
        return True

    def read_key(self) -> str:
        start = self.skip()
        if start == QUOTE:
            return self.until_quote()
        if start == '"':
            return self.json_text()
        key = self.take(BARE_KEY)
        if key is None:
            self.fail()
        return key.strip()

    def read_value(self, close: str, schema: Any, siblings: Mapping[str, Any], depth: int) -> Any:
        start = self.skip()
        if start == QUOTE:
            return self.until_quote()
        if start == '"':
            return self.json_text()
        if start == "{":
            self.at += 1
            return self.read_object("}", schema, depth + 1)
        if start == "[":
            self.at += 1
            return self.read_array(schema, depth + 1)
        return self.read_bare(close, schema, siblings, depth)

    def read_bare(self, close: str, schema: Any, siblings: Mapping[str, Any], depth: int) -> Any:
        """A number or a literal."""
        source = self.take(NUMBER) or self.take(WORD)
        if source is None:
            self.fail()
        return as_json(source, schema)


class LenientReader(Reader):
    """The same, where drift is read as what was meant."""

    key_ends = ":="

    def more(self, close: str) -> bool:
        return super().more(close) and not self.closed(close)

    def read_key(self) -> str:
        if self.skip() == "'":
            return self.loose_key()
        if self.text[self.at : self.at + 1] in (QUOTE, '"'):
            return super().read_key()
        key = self.take(LENIENT_KEY)
        if key is None:
            self.fail()
        return key.strip()

    def read_value(self, close: str, schema: Any, siblings: Mapping[str, Any], depth: int) -> Any:
        start = self.skip()
        if start and start in "\"'":
            return self.loose_text(start, siblings)
        if start in ("{", "[") and schema_type(schema) == "string":
            return self.read_bare(close, schema, siblings, depth)
        value = super().read_value(close, schema, siblings, depth)
        if start == QUOTE and self.skip() == QUOTE:
            self.at += 1
        return value

    def loose_key(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            self.fail()
        key, self.at = self.text[self.at + 1 : end], end + 1
        return key

    def loose_text(self, mark: str, siblings: Mapping[str, Any]) -> str:
        """A quoted string that may hold its own quote: it ends at the first one that an item could end at."""
        start, end = self.at + 1, self.at
        while True:
            end = self.text.find(mark, end + 1)
            if end < 0:
                self.fail()
            if mark == '"' and end > start and self.text[end - 1] == "\\":
                continue
            after = AFTER_STRING.match(self.text, end + 1)
            if after and (after[1] != "," or not siblings or self.starts_item(after.end(), siblings)):
                break
        written, self.at = self.text[start:end], end + 1
        if self.skip() == QUOTE:
            self.at += 1
        if mark == '"':
            try:
                return json.loads(f'"{written}"', strict=False)
            except ValueError:
                pass
        return written

    def starts_item(self, at: int, siblings: Mapping[str, Any]) -> bool:
        """Whether a key follows a comma (a declared one, where they are known), or nothing more but brackets."""
        key = NEXT_KEY.match(self.text, at)
        return bool(key and (not siblings or key[1] in siblings)) or bool(CLOSING.match(self.text, at))

    def read_bare(self, close: str, schema: Any, siblings: Mapping[str, Any], depth: int) -> Any:
        """Text without quotes, to the next item or the closing bracket."""
        end = self.end_of_bare(close, siblings, depth)
        quote = self.text.find(QUOTE, self.at, end)
        if quote >= 0:
            text, self.at = self.text[self.at : quote], quote + 1
            return text.strip()
        text, self.at = self.text[self.at : end].strip(), end
        if not text:
            self.fail()
        return as_json(text, schema)

    def end_of_bare(self, close: str, siblings: Mapping[str, Any], depth: int) -> int:
        """Where it ends; the call's own last bracket may have others before it, which are text."""
        last = len(self.text.rstrip()) - 1
        outermost = depth == 0 and close != "]" and self.text[last] == close
        open_brackets = 0
        for at in range(self.at, len(self.text)):
            character = self.text[at]
            if character in "{[(":
                open_brackets += 1
            elif character in "}])":
                if at == last and outermost:
                    return at
                if not outermost and open_brackets == 0:
                    return at
                open_brackets -= 1
            elif character == "," and (close == "]" or self.starts_item(at + 1, siblings)):
                return at
        return len(self.text)


def as_json(source: str, schema: Any) -> Any:
    """A bare word as the schema wants it: text where it says string, an integer where it says integer."""
    kind = schema_type(schema)
    if kind == "string":
        return source
    if source in LITERALS:
        return LITERALS[source]
    if not NUMBER.fullmatch(source):
        return source
    value = json.loads(source)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
