"""What a model takes is known before it is allocated, in bytes, and refused where it is not there."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import LAYERS, PER_LAYER, TOKENS, U32, WINDOW, tiny

from gemma4q import abi
from gemma4q.engine import memory
from gemma4q.engine.memory import MB, available_memory, limits_for, own_memory
from gemma4q.engine.model import Prepared, kv_type
from gemma4q.errors import Gemma4qError

HAVE = (1 << 40, "a test's")


def written(tmp_path, *changes, moe=False):
    file = tiny(moe)
    for change in changes:
        change(file)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(file.bytes())
    return path


def prepared(path, have=HAVE, **asked) -> Prepared:
    model = Prepared(path, backend="reference", **asked)
    model._before = (50 * MB, have)
    return model


def trained_for(tokens):
    return lambda file: file.set("gemma4.context_length", U32, tokens)


def entry(plan, name):
    return next(e for e in plan.entries if e.name == name)


def test_pages_of_keys_and_values_follow_from_context_and_window(tmp_path):
    plan = prepared(written(tmp_path, trained_for(100_000))).memory_plan(10_000)
    limits = plan.limits
    assert limits.global_pages == -(-10_000 // 64) + 1
    assert limits.local_pages * 64 >= WINDOW + limits.rows
    # Each of two owning layers keeps 64 positions of key and value a page, in 4 bytes: heads of 16 and 32 values.
    assert entry(plan, "keys and values, sliding").bytes == limits.local_pages * 64 * 2 * 16 * 4
    assert entry(plan, "keys and values, global").bytes == limits.global_pages * 64 * 2 * 32 * 4


def test_doubling_the_context_grows_only_the_global_pages(tmp_path):
    model = prepared(written(tmp_path, trained_for(100_000)))
    small, large = model.memory_plan(8192), model.memory_plan(16384)
    changed = {a.name for a, b in zip(small.entries, large.entries, strict=True) if a != b}
    assert changed == {"keys and values, global", "a step's rows"}
    assert entry(large, "a step's rows").bytes - entry(small, "a step's rows").bytes < 4096


def test_the_whole_file_is_in_the_plan_and_tables_are_not_touched(tmp_path):
    path = written(tmp_path)
    plan = prepared(path).memory_plan()
    assert plan.mapped == path.stat().st_size
    tables = entry(plan, "look-up tables, read row by row")
    assert (tables.bytes, tables.touched) == (len(TOKENS) * LAYERS * PER_LAYER // 32 * 34, 0)


def test_of_experts_only_the_used_ones_are_touched(tmp_path):
    model = prepared(written(tmp_path, moe=True))
    read, _ = memory.touched_weights(model.plan, model.weights.tensors)
    for name, size in read.items():
        assert size * (2 if "_exps.weight" in name else 1) == model.weights.tensors[name].nbytes


@pytest.mark.parametrize(
    "trained, room, chosen",
    [(10**5, 1 << 40, 8192), (10**5, "the smaller's", 4096), (10**5, 0, 4096), (5000, 1 << 40, 5000), (256, 0, 256)],
)
def test_the_default_context_is_what_fits_and_what_the_model_knows(tmp_path, trained, room, chosen):
    path = written(tmp_path, trained_for(trained))
    if room == "the smaller's":
        room = prepared(path).memory_plan(4096).needed
    assert prepared(path, (room, "a test's")).memory_plan().context == chosen


def test_too_little_memory_is_refused_with_what_is_needed_and_what_is_there(tmp_path):
    plan = prepared(written(tmp_path, trained_for(100_000)), (3 * MB, "left in this control group")).memory_plan(65536)
    assert plan.needed > 3 * MB
    with pytest.raises(Gemma4qError, match=rf"too_big: {plan.needed / MB:,.0f} MB .* 65,536 .* 3 MB .*control group"):
        plan.check()


@pytest.mark.parametrize(
    "asked", [{"context": 257}, {"context": -1}, {"sequences": 0}, {"sequences": 1000}, {"kv": "q4"}]
)
def test_what_cannot_be_is_refused(tmp_path, asked):
    with pytest.raises(Gemma4qError, match="bad_option"):
        Prepared(written(tmp_path), backend="reference", **asked)


def test_keys_and_values_follow_the_attention_weights():
    f32, q4 = abi.TensorType.F32, abi.TensorType.Q4_0
    assert kv_type("auto", {"blk.0.attn_q.weight": f32, "blk.0.ffn_up.weight": q4}) == f32
    assert kv_type("auto", {"blk.0.attn_q.weight": f32, "blk.1.attn_qkv.weight": q4}) == abi.TensorType.F16
    assert [kv_type(name, {}) for name in ("q8_0", "q4_0")] == [abi.TensorType.Q8_0, q4]


def test_limits_hold_for_every_size():
    for context in (1, 2, 63, 64, 100, 1152, 4096, 131072):
        for sequences in (1, 8, 40):
            limits = limits_for(context, sequences, 512)
            assert limits.rows >= min(context, 1120) and limits.rows >= sequences
            assert limits.wanted >= limits.sequences


def test_the_address_space_is_a_limit_too(tmp_path):
    """`ulimit -v` cannot be undone, so a child sets it."""
    lines = (
        "import resource, sys",
        "from gemma4q.engine.memory import available_memory",
        f"resource.setrlimit(resource.RLIMIT_AS, ({4 << 30}, {4 << 30}))",
        "print(*available_memory())",
    )
    done = subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    size, why = done.stdout.split(maxsplit=1)
    assert int(size) < 4 << 30
    assert "ulimit -v" in why or int(size) < 1 << 30


def test_own_memory_grows_with_what_is_touched():
    before = own_memory()
    held = np.ones(64 * MB, np.uint8)
    assert 60 * MB < own_memory() - before < 80 * MB
    assert held.any() and available_memory()[0] > 0


MEASURE = """
import json, sys
import gemma4q
from gemma4q.engine.memory import own_memory
with gemma4q.load(sys.argv[1], backend=sys.argv[2], threads=1, context=8192) as model:
    model.generate([2] + [11] * 1500, max_tokens=3, temperature=0).text()
    print(json.dumps([own_memory(), model.memory.anonymous]))
"""


@pytest.mark.skipif(abi.lib is None, reason="the C kernels were not built")
def test_memory_in_use_after_an_answer_is_what_was_planned(tmp_path):
    """Within a tenth, and a few MB that Python's own allocator keeps."""
    path = written(tmp_path, trained_for(100_000))
    command = [sys.executable, "-P", "-c", MEASURE, str(path), "native"]
    used, planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert abs(used - planned) < 0.1 * planned + 8 * MB
