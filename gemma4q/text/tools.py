"""Functions as Gemma 4 reads and writes them: declarations, values, calls and results (spec: chat 5.1, 5.2, 5.4).

Owns how a JSON schema or a JSON value is spelled between control tokens. Checking what a client sent is the part of
`normalise.py`, reading what the model wrote is `calls.py`'s.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gemma4q.errors import Gemma4qError
from gemma4q.text.segments import CALL, CALL_END, QUOTE, RESPONSE, RESPONSE_END, TOOL, TOOL_END, Writer

DEPTH = 64  # of nested schemas and values
STRUCTURE = frozenset(("description", "type", "properties", "required", "nullable"))


def by_name(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items in the order of the trained format: by name, case folded; names that fold alike keep their order."""
    return sorted(mapping.items(), key=lambda item: str(item[0]).lower())


def deeper(depth: int) -> int:
    """The next depth, or `bad_message` where values nest beyond any use."""
    if depth >= DEPTH:
        raise Gemma4qError("bad_message", f"values or schemas nest deeper than {DEPTH}")
    return depth + 1


class Fields:
    """Writes `name:value` pairs with commas between them."""

    def __init__(self, out: Writer):
        self.out = out
        self.separator = ""

    def name(self, name: str, *, quoted: bool = False) -> None:
        self.out.literal(self.separator)
        self.separator = ","
        if quoted:
            self.out.quoted(name)
        else:
            self.out.text(name)
        self.out.literal(":")


def write_value(out: Writer, value: Any, *, quoted_keys: bool, depth: int = 0) -> None:
    """A JSON value: strings between quote tokens, numbers as Python prints them, keys bare or quoted."""
    if value is None:
        out.literal("null")
    elif isinstance(value, str):
        out.quoted(value)
    elif isinstance(value, bool):
        out.literal("true" if value else "false")
    elif isinstance(value, Mapping):
        write_object(out, value, quoted_keys=quoted_keys, depth=depth)
    elif isinstance(value, (list, tuple)):
        out.literal("[")
        for index, item in enumerate(value):
            out.literal("," if index else "")
            write_value(out, item, quoted_keys=quoted_keys, depth=deeper(depth))
        out.literal("]")
    else:
        out.text(str(value))


def write_object(out: Writer, value: Mapping[str, Any], *, quoted_keys: bool = False, depth: int = 0) -> None:
    """`{key:value,...}`, keys sorted."""
    fields = Fields(out)
    out.literal("{")
    for key, item in by_name(value):
        fields.name(key, quoted=quoted_keys)
        write_value(out, item, quoted_keys=quoted_keys, depth=deeper(depth))
    out.literal("}")


def write_names(out: Writer, names: Iterable[Any]) -> None:
    """`[<|"|>a<|"|>,...]`"""
    out.literal("[")
    for index, name in enumerate(names):
        out.literal("," if index else "")
        out.quoted(str(name))
    out.literal("]")


def upper(schema_type: Any) -> str:
    """A schema's type as the format prints it: upper case, and a union as Python prints a list."""
    return str(schema_type).upper()


def write_properties(out: Writer, properties: Mapping[str, Any], depth: int, *, skip: frozenset[str]) -> None:
    """`{name:{...},...}`, sorted; names in `skip` are left out."""
    fields = Fields(out)
    out.literal("{")
    for name, schema in by_name(properties):
        if name not in skip:
            fields.name(name)
            write_property(out, schema if isinstance(schema, Mapping) else {}, deeper(depth))
    out.literal("}")


def write_property(out: Writer, schema: Mapping[str, Any], depth: int) -> None:
    """One property's schema. What the format has no word for (`anyOf`, `minimum`, `default`, ...) is left out."""
    fields = Fields(out)
    out.literal("{")
    kind = upper(schema.get("type", ""))
    if schema.get("description"):
        fields.name("description")
        out.quoted(str(schema["description"]))
    if kind == "STRING" and schema.get("enum"):
        fields.name("enum")
        write_value(out, schema["enum"], quoted_keys=True, depth=depth)
    if kind == "ARRAY" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        fields.name("items")
        write_items(out, schema["items"], depth)
    if schema.get("nullable"):
        fields.name("nullable")
        out.literal("true")
    if kind == "OBJECT":
        fields.name("properties")
        if isinstance(schema.get("properties"), Mapping):
            write_properties(out, schema["properties"], depth, skip=frozenset())
        else:
            write_properties(out, schema, depth, skip=STRUCTURE)
        if schema.get("required"):
            fields.name("required")
            write_names(out, schema["required"])
    fields.name("type")
    out.quoted(kind)
    out.literal("}")


def write_items(out: Writer, items: Mapping[str, Any], depth: int) -> None:
    """The schema of an array's items: known keys as in a property, all others as plain values with quoted keys."""
    fields = Fields(out)
    out.literal("{")
    for key, value in by_name(items):
        if value is None:
            continue
        fields.name(key)
        if key == "properties":
            write_properties(out, value if isinstance(value, Mapping) else {}, deeper(depth), skip=frozenset())
        elif key == "required":
            write_names(out, value)
        elif key == "type":
            kinds = value.upper() if isinstance(value, str) else [str(kind).upper() for kind in value]
            write_value(out, kinds, quoted_keys=True)
        else:
            write_value(out, value, quoted_keys=True, depth=deeper(depth))
    out.literal("}")


def write_declaration(out: Writer, tool: Mapping[str, Any]) -> None:
    """One tool: `<|tool>declaration:NAME{...}<tool|>`. As in the original, parameters without a type stay unclosed."""
    function = tool["function"]
    out.literal(f"{TOOL}declaration:")
    out.text(str(function["name"]))
    out.literal("{description:")
    out.quoted(str(function.get("description", "")))
    parameters = function.get("parameters")
    if parameters:
        out.literal(",parameters:{")
        if parameters.get("properties"):
            out.literal("properties:")
            write_properties(out, parameters["properties"], 0, skip=frozenset())
            out.literal(",")
        if parameters.get("required"):
            out.literal("required:")
            write_names(out, parameters["required"])
            out.literal(",")
        if parameters.get("type"):
            out.literal("type:")
            out.quoted(upper(parameters["type"]))
            out.literal("}")
    if "response" in function:
        write_response_schema(out, function["response"] or {})
    out.literal("}" + TOOL_END)


def write_response_schema(out: Writer, response: Mapping[str, Any]) -> None:
    """What a tool promises to return; closed only when it is an object, as in the original."""
    out.literal(",response:{")
    if response.get("description"):
        out.literal("description:")
        out.quoted(str(response["description"]))
        out.literal(",")
    if upper(response.get("type")) == "OBJECT":
        out.literal(f"type:{QUOTE}OBJECT{QUOTE}" + "}")


def write_call(out: Writer, call: Mapping[str, Any]) -> None:
    """`<|tool_call>call:NAME{...}<tool_call|>`; raises `bad_message` for arguments that are not an object or null."""
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping) and arguments is not None:
        raise Gemma4qError("bad_message", f"the arguments of a call of {function['name']} are not a JSON object")
    out.literal(f"{CALL}call:")
    out.text(str(function["name"]))
    write_object(out, arguments or {})
    out.literal(CALL_END)


def write_result(out: Writer, name: str, result: Any) -> None:
    """`<|tool_response>response:NAME{...}<tool_response|>`; anything but an object becomes its `value`."""
    out.literal(f"{RESPONSE}response:")
    out.text(name)
    write_object(out, result if isinstance(result, Mapping) else {"value": result})
    out.literal(RESPONSE_END)
