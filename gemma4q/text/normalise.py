"""What clients send, brought to one form or refused with the place named (spec: chat 3.5, 5.1, 5.4).

Owns the roles, the names of fields and the limits of conversations and tools. The order of the prompt is `chat.py`'s.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gemma4q.errors import Gemma4qError
from gemma4q.text.chat import REASONING
from gemma4q.text.tools import DEPTH

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "model": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "image": "image", "image_url": "image",
    "input_image": "image", "audio": "audio", "input_audio": "audio", "video": "video", "input_video": "video",
    "video_url": "video",
}  # fmt: skip
MESSAGES, TOOLS, NODES = 20_000, 256, 100_000  # at most; NODES of values in one tool or call
TOOL_NAME = re.compile(r"[^\s{}:\"'<>|]{1,128}")


def refuse(where: str, what: str) -> NoReturn:
    raise Gemma4qError("bad_message", f"{where} {what}")


def check_json(value: Any, where: str) -> None:
    """Refuses what is not JSON, or is too deep or too large to be meant."""
    level, nodes = [value], 0
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    refuse(where, "has a key that is not text")
                below += item.values()
            elif isinstance(item, (list, tuple)):
                below += item
            elif item is not None and not isinstance(item, (str, int, float)):
                refuse(where, f"holds a {type(item).__name__}, which JSON has not")
        nodes += len(level)
        if nodes > NODES:
            refuse(where, f"has more than {NODES:,} values")
        if not below:
            return
        level = below
    refuse(where, f"nests deeper than {DEPTH}")


def messages(conversation: Any) -> list[dict[str, Any]]:
    """A conversation in the one form that `chat.render` reads; raises `bad_message` naming message and field.

    Roles are folded (`developer` is `system`, `function` is `tool`), arguments decoded, `images` put before the text,
    results that are not text become JSON text. A result without a call is refused: the template would drop it.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        refuse("messages", "must be a list")
    if len(conversation) > MESSAGES:
        refuse("messages", f"are more than {MESSAGES:,}")
    result: list[dict[str, Any]] = []
    answerable = False
    for index, message in enumerate(conversation):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            refuse(where, "must be an object")
        given = message.get("role")
        role = ROLES.get(given.lower()) if isinstance(given, str) else None
        if role is None:
            refuse(f"{where}.role", f"is {given!r}: use system, developer, user, assistant or tool")
        if role == "tool" and not answerable:
            refuse(where, "is a tool's result, but no call goes before it")
        result.append(one_message(message, role, where))
        answerable = bool(result[-1].get("tool_calls")) or (role == "tool" and answerable)
    return result


def one_message(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    clean: dict[str, Any] = {"role": role, "content": content_of(message, role, f"{where}.content")}
    if role == "assistant":
        thought = next((message[key] for key in REASONING if message.get(key)), "")
        if not isinstance(thought, str):
            refuse(f"{where}.reasoning_content", "must be text")
        if thought:
            clean["reasoning_content"] = thought
        calls = message.get("tool_calls") or []
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            refuse(f"{where}.tool_calls", "must be a list")
        if calls:
            clean["tool_calls"] = [one_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if message.get("tool_responses"):
            clean["tool_responses"] = tool_responses(message["tool_responses"], f"{where}.tool_responses")
    if role == "tool":
        for key in ("tool_call_id", "name", "tool_name"):
            if message.get(key) is not None:
                if not isinstance(message[key], str):
                    refuse(f"{where}.{key}", "must be text")
                clean["name" if key == "tool_name" else key] = message[key]
    return clean


def content_of(message: Mapping[str, Any], role: str, where: str) -> str | list[dict[str, Any]]:
    """Text, or a list of parts whose types are text, image, audio and video; other fields of a part are kept."""
    content = message.get("content")
    images = message.get("images") or []
    if not isinstance(images, Sequence) or isinstance(images, str):
        refuse(where.replace("content", "images"), "must be a list")
    if role == "tool" and not isinstance(content, str) and content is not None and not is_parts(content):
        check_json(content, where)
        content = json.dumps(content, ensure_ascii=False)
    if content is None:
        content = ""
    if isinstance(content, str):
        if not images:
            return content
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, Sequence):
        refuse(where, "must be text or a list of parts")
    parts = [{"type": "image", "image": image} for image in images]
    parts += [one_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    if role == "system" and any(part["type"] != "text" for part in parts):
        refuse(where, "of a system message may hold text only")
    return parts


def is_parts(content: Any) -> bool:
    """Whether a tool's result is a list of content parts rather than JSON."""
    return (
        isinstance(content, Sequence)
        and bool(content)
        and all(isinstance(part, Mapping) and part.get("type") in PARTS for part in content)
    )


def one_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        refuse(where, "must be an object with a type")
    kind = PARTS.get(part.get("type")) if isinstance(part.get("type"), str) else None
    if kind is None:
        refuse(f"{where}.type", f"is {part.get('type')!r}: use text, image_url, input_audio or video")
    if kind == "text" and not isinstance(part.get("text"), str):
        refuse(f"{where}.text", "must be text")
    return {**part, "type": kind}


def one_call(call: Any, where: str) -> dict[str, Any]:
    """A call with its arguments as an object; JSON text is decoded, nothing at all means no arguments."""
    if not isinstance(call, Mapping):
        refuse(where, "must be an object")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        refuse(f"{where}.function.name", "is missing")
    arguments = function.get("arguments")
    where = f"{where}.function.arguments"
    if isinstance(arguments, str):
        arguments = decoded(arguments, where)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        refuse(where, "must be a JSON object")
    check_json(arguments, where)
    clean: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    if call.get("id") is not None:
        clean["id"] = str(call["id"])
    return clean


def decoded(text: str, where: str) -> Any:
    """JSON text as a value; empty text is no arguments."""

    def no_constant(name: str) -> NoReturn:
        refuse(where, f"hold {name}, which JSON has not")

    try:
        return json.loads(text, parse_constant=no_constant) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        refuse(where, f"are not JSON: {error}")


def tool_responses(responses: Any, where: str) -> list[dict[str, Any]]:
    """Google's older form of results, on the assistant's message itself."""
    if not isinstance(responses, Sequence) or not all(isinstance(response, Mapping) for response in responses):
        refuse(where, "must be a list of objects")
    for response in responses:
        check_json(response, where)
    return [
        {"name": str(response.get("name") or "unknown"), "response": response.get("response")} for response in responses
    ]


def tools(declared: Any) -> list[dict[str, Any]]:
    """Tools as `{"type": "function", "function": {...}}`, bare functions wrapped; raises `bad_tools` with the index."""
    if declared is None:
        return []
    if not isinstance(declared, Sequence) or isinstance(declared, str):
        raise Gemma4qError("bad_tools", "tools must be a list")
    if len(declared) > TOOLS:
        raise Gemma4qError("bad_tools", f"{len(declared):,} tools: at most {TOOLS} can be declared")
    return [one_tool(tool, f"tools[{index}]") for index, tool in enumerate(declared)]


def one_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise Gemma4qError("bad_tools", f"{where} must be an object with a function")
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise Gemma4qError("bad_tools", f"{where}: {name!r} is no name for a function (letters, digits, _, - and .)")
    where = f"{where} ({name})"
    clean = {key: value for key, value in function.items() if key != "strict" and value is not None}
    try:
        check_json(clean, where)
        for key in ("parameters", "response"):
            if key in clean:
                clean[key] = top_schema(clean[key], f"{where}.{key}")
        if str(clean.get("response", {}).get("type")).lower() != "object":
            clean.pop("response", None)
    except Gemma4qError as error:
        raise Gemma4qError("bad_tools", error.message) from None
    return {"type": "function", "function": clean}


def top_schema(schema: Any, where: str) -> dict[str, Any]:
    """A checked schema that has a type: without one the template would leave a brace open."""
    if not isinstance(schema or {}, Mapping):
        refuse(where, "must be a JSON schema object")
    check_schema(schema or {}, where)
    return {**schema, "type": schema.get("type") or "object"} if schema else {}


def check_schema(schema: Any, where: str) -> None:
    """Refuses a schema whose keywords have the wrong kind of value; `check_json` has bounded it."""
    if schema is None or isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        refuse(where, "has a schema that is not an object")
    properties, required, kind = schema.get("properties"), schema.get("required"), schema.get("type")
    if properties is not None and not isinstance(properties, Mapping):
        refuse(where, "has properties that are not an object")
    if required is not None and not isinstance(required, (list, tuple)):
        refuse(where, "has a required that is not a list")
    if kind is not None and not isinstance(kind, (str, list, tuple)):
        refuse(where, "has a type that is neither text nor a list")
    for below in (properties or {}).values():
        check_schema(below, where)
    if isinstance(schema.get("items"), Mapping):
        check_schema(schema["items"], where)
