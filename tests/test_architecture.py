"""The house rules that a program can hold: who imports whom, how large things grow, and that nothing is half there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from gemma4q import abi
from gemma4q.cli import COMMANDS, cli
from gemma4q.model import open_model
from gemma4q.model.forward import build
from gemma4q.plan.fuse import quantize_inputs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma4q"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON = [*MODULES, *sorted(p for room in ("tests", "tools", "bench") for p in (ROOT / room).rglob("*.py"))]
C = sorted(p for end in ("*.c", "*.h", "*.def") for p in (ROOT / "csrc").rglob(end))

# A room, or one module of it: what it may import of gemma4q. Everything may import errors, and its own room.
BELOW_ENGINE = {"text", "backends", "model", "plan", "gguf", "abi"}
MAY_IMPORT = {
    "errors": set(),
    "shipped": set(),
    "abi": set(),
    "gguf": {"abi"},
    "plan": {"abi"},
    "text": {"abi"},
    "text.tokenizer": {"abi", "gguf.reader"},
    "model": {"plan.builder", "plan.plan", "gguf", "abi"},
    "backends": {"plan", "abi", "gguf.quants"},
    "engine": BELOW_ENGINE,
    "convert": {"text.tokenizer", "model", "gguf", "abi"},
    "quantize": {"model", "gguf", "abi", "convert.output", "convert.split"},
    "measure": BELOW_ENGINE | {"engine"},
    "measure.calibration": BELOW_ENGINE | {"engine", "quantize.importance"},
    "measure.sensitivity": BELOW_ENGINE | {"engine", "quantize.quantize", "convert.output"},
    "measure.quality": BELOW_ENGINE | {"engine", "quantize.quantize"},
    "measure.logits_file": {"convert.output"},
    "cli": BELOW_ENGINE | {"shipped", "engine", "convert", "quantize", "measure"},
    "__init__": {"engine"},
    "__main__": {"cli"},
}
# Who may import what of others; `...` in a path is any module of the room.
ONLY_IN = {
    "cffi": ("abi",),
    "numba": ("backends.portable",),
    "click": ("cli",),
    "rich": ("cli",),
    "readline": ("cli",),
    "jinja2": ("text",),
    "sentencepiece": ("convert",),
    "matplotlib": ("measure.plot",),
    "llama_cpp": ("measure.worker",),
}
MAY_TOUCH_C = ("abi", "backends.native", "text.tokenizer", "quantize.encode")
OPS = [code for code in abi.OpCode if code.name != "COUNT"]
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def name_of(path: Path) -> str:
    """`gemma4q/plan/builder.py` is `plan.builder`, a room's `__init__.py` the room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of all modules a file imports anywhere; `from x import y` counts as x.y."""
    package = ["gemma4q", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, rooms: set[str] | tuple[str, ...]) -> bool:
    return any(name == room or name.startswith((f"{room}.", f"{room}_")) for room in rooms)


def parametrized(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


@parametrized(MODULES)
def test_imports_go_one_way(path):
    name = name_of(path)
    own = name.split(".")[0]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT[own]) | {"errors", own}
    for imported in imports(path):
        if imported.startswith("gemma4q."):
            what = imported.removeprefix("gemma4q.")
            assert inside(what, allowed | {"_native"} if own == "abi" else allowed), f"{name} must not import {what}"
        top = imported.split(".")[0]
        assert top not in ONLY_IN or inside(name, ONLY_IN[top]), f"{name} must not import {top}"


@parametrized(MODULES)
def test_only_four_modules_touch_the_c_library(path):
    if inside(name_of(path), MAY_TOUCH_C):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not {"ffi", "lib"} & {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "abi":
            assert node.attr not in ("ffi", "lib")


@parametrized(MODULES)
def test_only_the_command_line_reads_the_environment(path):
    if not inside(name_of(path), ("cli",)):
        assert not re.search(r"\bos\.(environ|getenv)|\benviron\b", path.read_text())


@parametrized(PYTHON + C)
def test_a_file_says_one_thing(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()) or path == Path(__file__)


@parametrized(PYTHON)
def test_a_file_says_what_it_owns_and_its_functions_fit_a_screen(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the first paragraph tells what the file owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} does not fit a screen"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(name):
    command = cli.get_command(None, name)
    assert command.help.strip().split("\n\n")[0].endswith("."), "a sentence says what it does"
    missing = [p.name for p in command.params if getattr(p, "help", "") is None and p.param_type_name == "option"]
    assert not missing, "every option has help"
    assert f"gemma4q {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", OPS, ids=lambda code: code.name)
def test_every_op_is_built_and_computed_by_every_backend(code):
    plan, backends = PACKAGE / "plan", PACKAGE / "backends"
    places = (
        (rf"OpCode\.{code.name}\b", [plan / "builder.py", plan / "fuse.py"]),
        (rf"def {code.name.lower()}\(", [backends / "reference.py"]),
        (rf"OpCode\.{code.name}\b", sorted(backends.glob("portable*.py"))),
        (rf"X\({code.name}, {code.name.lower()}\)", [ROOT / "csrc/isa/all.h"]),
    )
    for spelling, paths in places:
        assert any(re.search(spelling, path.read_text()) for path in paths), f"{spelling} is in none of {paths}"


def test_every_op_is_in_a_model_that_backends_are_tested_with(tmp_path):
    for moe in (False, True):
        (tmp_path / f"{moe}.gguf").write_bytes(tiny(moe).bytes())
    codes = set()
    for path in [*tmp_path.glob("*.gguf"), *(ROOT / "tests/data/golden").glob("*.gguf")]:
        _, config, weights = open_model(path)
        types = {name: tensor.type for name, tensor in weights.tensors.items()}
        codes |= {op.code for op in quantize_inputs(build(config, weights.shapes), types).ops}
    assert codes == set(OPS)


@pytest.mark.parametrize("kind", abi.BLOCKS, ids=lambda kind: kind.name)
def test_every_tensor_type_has_an_oracle(kind):
    from gemma4q.gguf.quants import dequantize

    values, size = abi.BLOCKS[kind]
    assert dequantize(np.zeros(3 * size, np.uint8), kind).size == 3 * values


def test_kernels_know_no_model():
    for path in (ROOT / "csrc").rglob("kernels/*"):
        assert "gemma" not in path.read_text().lower(), path


def test_the_repository_stands_alone():
    """Nothing reads data from beside the repository: a clone is complete."""
    for path in [*PYTHON, *C, ROOT / "README.md", ROOT / ".ci/run"]:
        if path != Path(__file__):
            assert not re.search(r"\.\./shared|/work/", path.read_text()), path


def test_help_imports_nothing_heavy():
    """`gemma4q --help` answers at once."""
    lines = (
        "import sys",
        "from gemma4q.cli import cli",
        "try: cli(['--help'])",
        "except SystemExit: pass",
        "heavy = {'numpy', 'numba', 'jinja2', 'rich', 'cffi'} & set(sys.modules)",
        "sys.exit(', '.join(heavy) or 0)",
    )
    done = subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
