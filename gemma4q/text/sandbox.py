"""Jinja that cannot hurt: a template from a file runs here within a budget of steps, characters and time.

Owns the limits and the short lists of what templates may use; `template.py` owns what a chat template gets and gives.
Jinja's sandbox keeps code in, but lets it loop, fold and multiply for ever. So the syntax tree is checked against a
list, and rewritten so that every loop, comparison, literal and `~` passes through a guard (spec: reliability 2.3, 6).
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import LoopControlExtension
from jinja2.filters import do_round
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SOURCE, NODES, LEVELS, BRACKETS, DEPTH = 256 * 1024, 30_000, 128, 64, 64
STEPS, TEXT, PRODUCED, SECONDS = 400_000, 2_000_000, 64_000_000, 1.0
BITS = 16_384  # of an integer


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STATEMENTS = words(
    "Template Output TemplateData For If Macro CallBlock FilterBlock With ExprStmt Assign AssignBlock Name NSRef Const "
    "Tuple List Dict Pair Keyword CondExpr Filter Test Call Getitem Getattr Slice Concat Compare Operand Mul Div "
    "FloorDiv Add Sub Mod Pow And Or Not Neg Pos Continue Break"
)
TEXT_FILTERS = words("capitalize indent lower replace safe string title trim upper")
FILTERS = words(
    "abs count d default dictsort first float int items last length map max min reject rejectattr reverse select "
    "selectattr sort unique"
)
ORDERING = words("dictsort max min sort unique")
TESTS = words(
    "boolean callable defined divisibleby eq equalto even false float ge gt in integer iterable le lower lt mapping ne "
    "none number odd sameas sequence string true undefined upper == != < <= > >="
)
METHODS = {
    str: words(
        "capitalize count endswith find index isalnum isalpha isdigit isspace istitle join lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip "
        "title upper"
    ),
    dict: words("get items keys values"),
    list: words("count index"),
    tuple: words("count index"),
}


class Limit(TemplateError):
    """The template asked for more than it may have."""


class Budget:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.steps, self.characters = STEPS, PRODUCED
        self.deadline = time.monotonic() + SECONDS

    def look(self) -> None:
        if time.monotonic() > self.deadline:
            raise Limit(f"takes more than {SECONDS:g} s")

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise Limit(f"takes more than {STEPS:,} steps")
        self.look()

    def text(self, length: int) -> None:
        """Called before a text of that length is made."""
        self.characters -= length
        if length > TEXT or self.characters < 0:
            raise Limit(f"makes a text of more than {TEXT:,} characters, or {PRODUCED:,} in all")
        self.look()


class Guards(NodeTransformer):
    """Puts guards around what Jinja computes without asking its environment."""

    def guard(self, name: str, node: nodes.Node) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("has a recursive loop")
        self.generic_visit(node)
        node.iter = self.guard("#loop", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self.guard("#compared", node.expr)
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Operand:
        self.generic_visit(node)
        node.expr = self.guard("#compared", node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self.guard("#sliced", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self.guard("#joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `budget` is renewed for each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, functions: dict[str, Callable[..., Any]]):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[LoopControlExtension], finalize=output
        )
        self.budget = Budget()
        offered = self.filters
        self.filters = {name: self.filtered(name, offered[name]) for name in FILTERS}
        self.filters |= {name: self.text_filter(name, offered[name]) for name in TEXT_FILTERS}
        self.filters |= {
            "tojson": self.tojson, "join": self.join, "round": self.round, "list": lambda value: list(self.loop(value)),
            "#loop": self.loop, "#compared": self.compared, "#sliced": self.sliced, "#joined": self.join,
        }  # fmt: skip
        self.tests = {name: self.tested(self.tests[name]) for name in TESTS}
        self.globals = {"range": safe_range, "namespace": Namespace, "dict": dict, **functions}
        self.allowed = tuple(self.globals.values())

    def load(self, source: str) -> Any:
        """The compiled template; raises TemplateError or whatever Jinja and Python make of nonsense."""
        if len(source.encode(errors="replace")) > SOURCE:
            raise Limit(f"is longer than {SOURCE:,} bytes")
        depth = 0
        for _, kind, value in self.lex(source):
            if kind == "operator":
                depth += (value in "([{") - (value in ")]}")
                if depth > BRACKETS:
                    raise Limit(f"has brackets nested deeper than {BRACKETS}")
        tree = self.parse(source)
        check_nodes(tree)
        return self.template_class.from_code(self, self.compile(Guards().visit(tree)), dict(self.globals))

    def rendered(self, template: Any, variables: dict[str, Any]) -> str:
        self.budget = Budget()
        parts: list[str] = []
        length = 0
        for part in template.root_render_func(template.new_context(variables)):
            length += len(part)
            if length > 4 * TEXT:
                raise Limit(f"writes more than {4 * TEXT:,} characters")
            parts.append(part)
        return "".join(parts)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise TemplateError(f"reaches for {attribute}, which is not allowed")

    # -- guards

    def loop(self, value: Iterable[Any]) -> Iterator[Any]:
        for item in value:
            self.budget.step()
            yield item

    def compared(self, value: Any) -> Any:
        self.budget.look()
        if isinstance(value, (list, tuple, dict)):
            self.measure(value)
        return value

    def sliced(self, value: Any) -> Any:
        self.budget.step(1 + len(value) // 4096 if isinstance(value, (str, list, tuple)) else 1)
        return value

    def measure(self, value: Any) -> tuple[int, int, int]:
        """How many values and characters a JSON-like value holds when written out, and how deep it is."""
        level, count, characters, depth = [value], 0, 0, 0
        while level:
            count += len(level)
            below: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    characters += len(item)
                elif isinstance(item, (dict, list, tuple)):
                    self.budget.step(len(item))
                    below += item
                    below += item.values() if isinstance(item, dict) else ()
                elif item is not None and not isinstance(item, (int, float, Undefined)):
                    raise TemplateError(f"uses a {type(item).__name__} as a value")
            level, depth = below, depth + 1
            if depth > DEPTH:
                raise Limit(f"nests values deeper than {DEPTH}")
        return count, characters, depth

    def text(self, value: Any) -> str:
        """Any value as Jinja prints it, once it is known to be small enough."""
        if not isinstance(value, str):
            count, characters, _ = self.measure(value)
            self.budget.text(characters + 8 * count)
            value = str(value)
        self.budget.text(len(value))
        return value

    def checked(self, result: Any) -> Any:
        """A result of code that makes no more than it was given."""
        if isinstance(result, str):
            self.budget.text(len(result))
        elif isinstance(result, (list, tuple)):
            self.budget.step(len(result))
        return result

    # -- filters and tests

    def filtered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            for value in args:
                if name in ORDERING and isinstance(value, (list, tuple, dict)):
                    self.measure(value)
            return self.checked(function(*args, **kwargs))

        return guarded

    def text_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Filters of text, done by text's own methods where Jinja's would also escape."""

        def guarded(value: Any, *args: Any, **kwargs: Any) -> str:
            self.budget.step()
            value = self.text(value)
            if name in ("safe", "string"):
                return value
            if name == "replace":
                return self.replace(value, *map(self.text, args[:2]), *args[2:], **kwargs)
            if name == "indent":
                width = kwargs.get("width", args[0] if args else 4)
                added = len(width) if isinstance(width, str) else int(width)
                self.budget.text(len(value) + added * (value.count("\n") + 1))
            return self.checked(function(value, *args, **kwargs))

        return guarded

    def tested(self, function: Callable[..., Any]) -> Callable[..., bool]:
        @wraps(function)
        def guarded(*args: Any) -> bool:
            for value in args[-2:] if len(args) > 1 else ():
                self.compared(value)
            self.budget.look()
            return function(*args)

        return guarded

    def replace(self, text: str, old: str, new: str, count: int | None = None) -> str:
        found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        self.budget.text(len(text) + found * max(0, len(new) - len(old)))
        return text.replace(old, new, -1 if count is None else count)

    def join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        texts = [self.text(value) for value in self.loop(values)]
        self.budget.text(sum(map(len, texts)) + len(self.text(d)) * len(texts))
        return str(d).join(texts)

    def round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > 20:
            raise Limit("rounds to more than 20 digits")
        return do_round(value, precision, method)

    def tojson(self, value: Any, indent: int | None = None, **more: Any) -> str:
        """JSON without escapes, not for HTML either, as the tools that train with such templates have it."""
        count, characters, depth = self.measure(value)
        if not isinstance(indent, (int, type(None))):
            raise TemplateError("gives tojson an indent that is no number")
        self.budget.text(characters + count * (8 + (indent or 0) * depth))
        if more.pop("ensure_ascii", False) or not more.keys() <= {"separators", "sort_keys"}:
            raise TemplateError("gives tojson options it has not")
        return self.checked(json.dumps(value, indent=indent, ensure_ascii=False, **more))

    # -- operators and calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.look()
        sides = (left, right)
        if operator == "%" and isinstance(left, str):
            raise TemplateError("formats text with %")
        if operator == "**" and (max(map(bits, sides)) > 64 or abs(right) > 64):
            raise Limit("raises to a power beyond 64")
        if sum(map(bits, sides)) > BITS:
            raise Limit(f"computes integers of more than {BITS:,} bits")
        if operator in "+*" and any(isinstance(side, (str, list, tuple)) for side in sides):
            sizes = [len(side) if isinstance(side, (str, list, tuple)) else side for side in sides]
            size = max(0, sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
            if isinstance(left, str) or isinstance(right, str):
                self.budget.text(size)
            else:
                self.budget.step(size)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.budget.step()
        owner = getattr(function, "__self__", None)
        if isinstance(function, BuiltinMethodType) and function.__name__ in METHODS.get(type(owner), ()):
            own = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return self.call_method(owner, function, args, own)
        if isinstance(function, (Macro, Undefined)) or isinstance(owner, LoopContext) or function in self.allowed:
            return self.checked(super().call(context, function, *args, **kwargs))
        raise TemplateError(f"calls {getattr(function, '__name__', type(function).__name__)}, which is not allowed")

    def call_method(self, owner: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = method.__name__
        if isinstance(owner, str):
            self.budget.step(len(owner) // 4096)
            if name == "replace":
                return self.replace(owner, *args, **kwargs)
            if name == "join":
                return self.join(*args, owner)
            if name in ("split", "rsplit"):
                most = kwargs.get("maxsplit", args[1] if len(args) > 1 else -1)
                most = self.budget.steps + 1 if most < 0 else min(most, self.budget.steps + 1)
                return self.checked(method(kwargs.get("sep", args[0] if args else None), most))
            if name == "splitlines":
                self.budget.step(len(owner) // 64)
        elif name in ("count", "index"):
            self.measure(owner)
        return self.checked(method(*args, **kwargs))


@pass_context
def output(context: Any, value: Any) -> str:
    """Everything a template prints passes here."""
    return "" if isinstance(value, Undefined) else context.environment.text(value)


def bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def check_nodes(tree: nodes.Template) -> None:
    """Refuses trees that are too large or too deep, and statements that chat templates have no use for."""
    level: list[nodes.Node] = [tree]
    count = depth = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > NODES or depth > LEVELS:
            raise Limit(f"has more than {NODES:,} nodes, or {LEVELS} one within the other")
        for node in level:
            name = type(node).__name__
            if name not in STATEMENTS or (name == "Name" and node.name == "self"):
                raise TemplateError(f"uses {node.name if name == 'Name' else name.lower()}, which is not allowed")
        level = [below for node in level for below in node.iter_child_nodes()]
