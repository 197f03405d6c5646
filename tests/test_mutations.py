"""The tests that hold the numbers do hold them: a plan or a kernel that is wrong in one place turns them red.

Plans are broken at every op that can be left out and at every argument that means something, and must miss the goldens
by more than the line. Kernels are broken by one line of C, compiled, and handed to the test that is to notice.
"""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, GOLDENS, LIMITS, Model, Runner, step

from gemma4q import abi
from gemma4q.abi import OpCode
from gemma4q.plan.plan import Op, Plan

LINE = 1e-3
TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
# Ops whose output is their first input, more or less.
LEFT_OUT = (OpCode.RMS_NORM, OpCode.ADD, OpCode.SCALE, OpCode.ROPE, OpCode.GELU_MUL, OpCode.SOFTCAP)


def error(name: str, plan: Plan) -> float:
    """Largest logit error of a plan over a golden's tensors; infinite where it is not even a number."""
    model, numbers = opened(name)
    limits = replace(LIMITS, rows=72, wanted=72, global_pages=10, local_pages=10)
    found = Runner(replace(model, plan=plan), limits=limits).logits(step(numbers["ids"]))
    apart = np.abs(found - numbers["logits"]).max()
    return float(apart) if np.isfinite(apart) else np.inf


@cache
def opened(name: str):
    with np.load(GOLDEN / f"{name}.npz") as numbers:
        return Model.open(GOLDEN / f"{name}.gguf"), dict(numbers)


def without(plan: Plan, number: int) -> Plan:
    """The plan whose op `number` passes its first input on."""
    op = plan.ops[number]
    swap = {op.out: op.inputs[0]}
    ops = [replace(o, inputs=tuple(swap.get(b, b) for b in o.inputs)) for i, o in enumerate(plan.ops) if i != number]
    return replace(
        plan, ops=tuple(ops), logits=swap.get(plan.logits, plan.logits), hidden=swap.get(plan.hidden, plan.hidden)
    )


def changed(plan: Plan, number: int, **args) -> Plan:
    ops = list(plan.ops)
    ops[number] = replace(ops[number], args=ops[number].args | args)
    return replace(plan, ops=tuple(ops))


def undone(plan: Plan) -> str:
    """The one weight that cannot show: the last layer's factor, which the norm behind it takes out again."""
    return f"blk.{max(op.layer for op in plan.ops)}.layer_output_scale.weight"


def wrong_args(plan: Plan, op: Op) -> Iterator[dict]:
    """Arguments an op might have been given instead."""
    a = op.args
    match op.code:
        case OpCode.EMBED:
            yield {"scale": a["scale"] * 1.002}
        case OpCode.ATTEND:
            if a["window"]:
                yield from ({"window": a["window"] + 1}, {"window": a["window"] - 1}, {"window": 0})
            else:
                yield {"window": 32}
            like = [kv.layer for kv in plan.kv if (kv.head_dim, kv.local) == (a["head_dim"], a["window"] > 0)]
            yield from ({"kv_layer": layer} for layer in like if layer != a["kv_layer"] and layer < op.layer)
        case OpCode.ANGLES:
            yield from ({"base": a["base"] * 1.01}, {"size": a["size"] + 2})
        case OpCode.ROPE:
            yield {"pairs": a["pairs"] - 1}
        case OpCode.EMBED_ROWS:
            yield {"scale": a["scale"] * 1.002}
        case OpCode.GELU_MUL:
            width = next(b for b in op.inputs[1:]).width
            yield from ({"part": part} for part in range(width // op.out.width) if part != a["part"])
        case OpCode.SOFTCAP:
            yield {"scale": a["scale"] * 1.001}
        case OpCode.RMS_NORM:
            if a["size"] < op.out.width:
                yield {"size": op.out.width}


@pytest.mark.parametrize("name", GOLDENS)
def test_no_op_can_be_left_out(name):
    plan = opened(name)[0].plan
    assert error(name, plan) < LINE
    kept = {i: error(name, without(plan, i)) for i, op in enumerate(plan.ops) if op.code in LEFT_OUT}
    assert len(kept) > 30
    assert [plan.ops[i].name for i, e in kept.items() if e <= LINE] == [f"scale({undone(plan)})"]


@pytest.mark.parametrize("name", GOLDENS)
def test_no_argument_can_be_another(name):
    plan = opened(name)[0].plan
    wrong = [(i, args) for i, op in enumerate(plan.ops) for args in wrong_args(plan, op)]
    assert len(wrong) > 15
    unseen = [
        (plan.ops[i].name, plan.ops[i].layer, args)
        for i, args in wrong
        if error(name, changed(plan, i, **args)) <= LINE
    ]
    assert not unseen


@pytest.mark.parametrize("name", GOLDENS)
def test_no_weight_can_be_another_layers(name):
    """Every tensor of a layer, exchanged for the same one of another layer where it has that shape."""
    plan, tensors = opened(name)[0].plan, opened(name)[0].tensors
    unseen, tried = [], 0
    for i, op in enumerate(plan.ops):
        for j, weight in enumerate(op.weights):
            own = f"blk.{op.layer}."
            others = [weight.tensor.replace(own, f"blk.{layer}.") for layer in range(9) if layer != op.layer]
            others = [o for o in others if o in tensors and tensors[o].shape == tensors[weight.tensor].shape]
            if op.layer < 0 or not weight.tensor.startswith(own) or not others:
                continue
            swapped = tuple(replace(w, tensor=others[0]) if n == j else w for n, w in enumerate(op.weights))
            ops = (*plan.ops[:i], replace(op, weights=swapped), *plan.ops[i + 1 :])
            tried += 1
            if error(name, replace(plan, ops=ops)) <= LINE:
                unseen.append(weight.tensor)
    assert tried > 20 and unseen == [undone(plan)]


# -- One line of C ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slip:
    """`old` becomes `new` in a file of csrc; the tests named `noticed_by` (file::-k expression) must fail."""

    file: str
    old: str
    new: str
    noticed_by: str


FORWARD = "test_forward.py::logits_and_hidden and scalar"
SLIPS = [
    Slip("kernels.h", "r->position - o->window + 1 : 0", "r->position - o->window : 0", FORWARD),
    Slip("kernels/elementwise.h", "b * cosine[i] + a * sine[i]", "b * cosine[i] - a * sine[i]", FORWARD),
    Slip("kernels/experts.h", "share[n] / sum * scale[best[n]]", "share[n] / sum", FORWARD),
    Slip("kernels/elementwise.h", "0.044715f * (x * x * x)", "0.0448f * (x * x * x)", FORWARD),
]
MORE_SLIPS = [
    Slip("kernels.h", "return o->window || r->reach", "return 1 || r->reach",
         "test_forward.py::images_are_seen and scalar"),
    Slip("kernels/elementwise.h", "-2.0 * i / o->size", "-2.0 * i / (2 * o->pairs)", FORWARD),
    Slip("kernels/elementwise.h", "const float d = top / 127.0f", "const float d = top / 128.0f",
         "test_kernels.py::activations_are_rounded"),
    Slip("kernels/logits.h", "id < ids[at - 1]", "id > ids[at - 1]", "test_native.py::stable_sort and 65"),
    Slip("kernels/unpack.h", "K(cut)(third, 4 * h + g, ONES, 2)", "K(cut)(third, 4 * h + g, ONES, 1)",
         "test_kernels.py::every_width and Q3_K"),
    Slip("kernels/unpack.h", "a->minus_sum - a->minus_half", "a->minus_sum", "test_kernels.py::every_width and Q6_K"),
    Slip("memory.c", "if (r->used[i] < r->used[slot])", "if (r->used[i] > r->used[slot])",
         "test_native.py::small_cache"),
    Slip("exec.c", "s->barrier[i] = 1;", "s->barrier[i] = 0;",
         "test_forward.py::instruction_sets_and_threads and scalar"),
    Slip("kernels/attend.h", "at < high && base + at < a->first[r]", "at < low && base + at < a->first[r]",
         "test_attend.py::window_edges"),
    Slip("kernels/attend.h", "kept[1] = a.sum[r];", "kept[1] = 1;", "test_attend.py::spans_of_1024 and scalar"),
]  # fmt: skip


class Workshop:
    """csrc and what is compiled of it, the scalar kernels alone and unoptimised: a second for each slip."""

    def __init__(self, room: Path):
        self.room, self.csrc = room, room / "csrc"
        shutil.copytree(CSRC, self.csrc)
        header = Path(abi.__file__).with_name("abi.h")
        shutil.copy(header, room)
        (room / "prelude.c").write_text('#include <stdint.h>\n#include "abi.h"\n')
        glue = ["-m", "cffi.gen_src", "read-sources", "gemma4q._native", "abi.h", "prelude.c", "_native.c"]
        subprocess.run([sys.executable, *glue], cwd=room, check=True, capture_output=True)
        self.parts = {f"{p.name}": p for p in self.csrc.glob("*.c")} | {"scalar.c": self.csrc / "isa/scalar.c"}
        self.parts["_native.c"] = room / "_native.c"
        for part in self.parts.values():
            self.compile(part, room / f"{part.stem}.o")

    def compile(self, source: Path, target: Path) -> None:
        include = [f"-I{path}" for path in (self.room, self.csrc, sysconfig.get_paths()["include"])]
        flags = ["-O0", "-fPIC", "-w", "-std=gnu11", "-ffp-contract=off", "-pthread", *include]
        subprocess.run([compiler(), *flags, "-c", source, "-o", target], check=True)

    def with_slip(self, slip: Slip) -> Path:
        """The library with one line changed."""
        file = self.csrc / slip.file
        sound = file.read_text()
        assert sound.count(slip.old) == 1, f"{slip.file} has changed: choose another slip for {slip.old!r}"
        name = file.name if file.suffix == ".c" else "scalar.c"
        file.write_text(sound.replace(slip.old, slip.new))
        try:
            self.compile(self.parts[name], self.room / "slip.o")
        finally:
            file.write_text(sound)
        return self.link(
            [*(self.room / f"{p.stem}.o" for n, p in self.parts.items() if n != name), self.room / "slip.o"]
        )

    def sound(self) -> Path:
        return self.link([self.room / f"{part.stem}.o" for part in self.parts.values()])

    def link(self, objects: list[Path]) -> Path:
        target = self.room / "_native.abi3.so"
        target.unlink(missing_ok=True)
        subprocess.run([compiler(), "-shared", "-pthread", *objects, "-lm", "-o", target], check=True)
        return target


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    assert found, "a C compiler is needed here"
    return found


RUN = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("gemma4q._native", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def noticed(library: Path, tests: str) -> int:
    """pytest's exit status over a library: 0 nothing noticed, 1 tests failed."""
    file, _, expression = tests.partition("::")
    given = [sys.executable, "-c", RUN, library, TESTS / file, "-k", expression]
    done = subprocess.run(given, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1, -6, -7, -11), done.stdout + done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mutations") / "room")


def titled(slips: list[Slip]) -> Callable:
    return pytest.mark.parametrize("slip", slips, ids=lambda slip: f"{slip.file}: {slip.new}")


def test_a_sound_library_passes_where_broken_ones_fail(workshop):
    assert noticed(workshop.sound(), FORWARD) == 0


@titled(SLIPS)
def test_a_slip_in_a_kernel_is_noticed(workshop, slip):
    assert noticed(workshop.with_slip(slip), slip.noticed_by) != 0


@pytest.mark.slow
@titled(MORE_SLIPS)
def test_more_slips_are_noticed(workshop, slip):
    assert noticed(workshop.sound(), slip.noticed_by) == 0
    assert noticed(workshop.with_slip(slip), slip.noticed_by) != 0
