"""Plans: where buffers lie, where threads meet, what a batch holds, and that rewriting a plan keeps its numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4q.abi import BufferType, OpCode, OpRows, RowFlag, Space, TensorType
from gemma4q.plan.batch import Batch, Limits, Step
from gemma4q.plan.builder import Builder, Rope
from gemma4q.plan.fuse import quantize_inputs
from gemma4q.plan.pack import IN_PLACE, pack, place, size, waits
from gemma4q.plan.plan import Buffer, Op, Plan, Weight

LIMITS = Limits(rows=8, wanted=3, sequences=2, context=256, global_pages=4, local_pages=4)
PAGES = np.arange(4, dtype=np.int32)


@st.composite
def plans(draw):
    """Random straight-line plans of unary and binary ops over two spaces."""
    buffers = [Buffer("in", draw(st.integers(1, 8)) * 16)]
    ops = [Op(OpCode.EMBED, buffers[0])]
    for i in range(draw(st.integers(1, 25))):
        x = draw(st.sampled_from(buffers))
        code = draw(st.sampled_from([OpCode.ADD, OpCode.MATMUL, OpCode.SCALE, OpCode.WANTED]))
        space = Space.WANTED if code == OpCode.WANTED else x.space
        width = draw(st.integers(1, 8)) * 16 if code == OpCode.MATMUL else x.width
        inputs = (x, x) if code == OpCode.ADD else (x,)
        buffers.append(Buffer(f"b{i}", width, space))
        ops.append(Op(code, buffers[-1], inputs))
    return Plan(tuple(ops), (), buffers[-1], buffers[0], 16, 16)


@given(plans())
def test_two_buffers_share_bytes_only_when_their_lives_do_not_overlap(plan):
    offsets, last, arena = place(plan, LIMITS)
    born = {op.out: i for i, op in enumerate(plan.ops)}
    heir = {op.out: op.inputs[0] for op in plan.ops if op.code in IN_PLACE}
    for a in offsets:
        assert offsets[a] >= 0 and offsets[a] + size(a, LIMITS) <= arena
        for b in offsets:
            # b is written while a is still to be read, unless b is a's elementwise heir at a's last use.
            alive = born[a] < born[b] <= last.get(a, -1) and not (heir.get(b) is a and last[a] == born[b])
            if a is not b and alive:
                assert offsets[a] + size(a, LIMITS) <= offsets[b] or offsets[b] + size(b, LIMITS) <= offsets[a]


@given(plans())
def test_threads_meet_between_two_ops_that_touch_the_same_bytes(plan):
    offsets, _, _ = place(plan, LIMITS)
    spans = {b: (at, at + size(b, LIMITS)) for b, at in offsets.items()}
    flags = waits(plan, spans)
    for i, op in enumerate(plan.ops):
        for j in range(i):
            first = plan.ops[j]
            writes = [spans[first.out]]
            touches = writes + [spans[b] for b in first.inputs]
            reads, out = [spans[b] for b in op.inputs], spans[op.out]
            clash = any(a < d and c < b for a, b in writes for c, d in reads)
            clash |= any(a < out[1] and out[0] < b for a, b in touches)
            assert not clash or any(flags[j + 1 : i + 1]), (j, i)


def tiny_plan() -> Plan:
    b = Builder({"embd": (32, 64), "w": (96, 64), "norm": (64,), "head": (32, 96), "head.scale": (2,)}, 1e-6)
    x = b.embed("embd", 8.0)
    k = b.matmul(x, Weight("w", 32, 32))
    b.store_kv(k, k, 0, 16, local=True, from_values=0)
    x = b.wanted(x)
    q = b.rope(b.rms_norm(b.matmul(x, "w"), None, 16), 16, Rope(1e4, 16, 8))
    hidden = b.attend(q, 0, window=5)
    return b.finish(hidden, b.matmul(hidden, "head"))


class TestRecords:
    def test_a_record_names_its_buffers_weights_and_fields(self):
        packed = pack(tiny_plan(), LIMITS)
        embed, matmul = packed.ops[0], packed.ops[1]
        assert embed["code"] == OpCode.EMBED and embed["scale"] == 8.0 and embed["rows"] == OpRows.ALL
        assert matmul["in"].tolist() == [embed["out"], -1, -1, -1]
        assert packed.weights[matmul["weight"][0]] == Weight("w", 32, 32)
        attend = packed.ops[[op.code for op in packed.plan.ops].index(OpCode.ATTEND)]
        assert (attend["heads"], attend["kv_heads"], attend["window"], attend["rows"]) == (6, 2, 5, OpRows.WANTED)
        assert packed.buffers[attend["out"]]["stride"] == 96 * 4

    def test_results_outlive_the_run(self):
        packed = pack(tiny_plan(), LIMITS)
        ends = packed.buffers["offset"] + [size(b, LIMITS) for b in packed.numbers]
        for kept in (packed.plan.logits, packed.plan.hidden):
            n = packed.numbers[kept]
            for later in packed.ops[[op.out for op in packed.plan.ops].index(kept) + 1 :]:
                if (m := later["out"]) >= 0 and m != n:
                    assert packed.buffers[m]["offset"] >= ends[n] or ends[m] <= packed.buffers[n]["offset"]

    def test_rope_angles_are_computed_once_for_all_that_turn_alike(self):
        b = Builder({"embd": (32, 64)}, 1e-6)
        x = b.embed("embd", 1.0)
        for _ in range(3):
            x = b.rope(x, 16, Rope(1e4, 16, 8))
        assert sum(op.code == OpCode.ANGLES for op in b.ops) == 1


class TestQuantizeInputs:
    def test_a_row_is_quantized_once_for_all_matrices_it_meets(self):
        b = Builder({"embd": (32, 64), "a": (32, 64), "b": (32, 64), "c": (32, 64)}, 1e-6)
        x = b.embed("embd", 1.0)
        y = b.add(b.matmul(x, "a"), b.matmul(x, "b"))
        plan = b.finish(y, b.add(b.matmul(x, "c"), y))
        types = {"embd": TensorType.F32, "a": TensorType.Q4_0, "b": TensorType.Q8_0, "c": TensorType.F16}
        lowered = quantize_inputs(plan, types)
        assert [op.code for op in lowered.ops].count(OpCode.QUANTIZE) == 1
        by_weight = {op.weights[0].tensor: op.inputs[0] for op in lowered.ops if op.code == OpCode.MATMUL}
        assert by_weight["a"] is by_weight["b"] and by_weight["a"].type == BufferType.A8 and by_weight["c"] is x


class TestBatch:
    def test_prompt_rows_come_first_and_results_in_row_order(self):
        batch = Batch(LIMITS, 64, 32)
        generated = Step([7], 5, PAGES[:1], PAGES[1:2], generated=True)
        prompt = Step([1, 2, 3], 0, PAGES[2:3], PAGES[3:])
        assert batch.fill([generated, prompt]) == [(1, 2), (0, 0)]
        rows = batch.rows[: batch.header["rows"]]
        assert rows["token"].tolist() == [1, 2, 3, 7] and rows["position"].tolist() == [0, 1, 2, 5]
        assert rows["sequence"].tolist() == [0, 0, 0, 1] and batch.header["prompt_rows"] == 3
        assert batch.wanted[:2].tolist() == [2, 3] and rows["flags"][3] & RowFlag.GENERATED
        first, second = batch.sequences[:2]
        assert batch.pages[first["global_pages"]] == 2 and batch.pages[second["local_pages"]] == 1

    def test_nothing_of_the_step_before_stays(self):
        batch = Batch(LIMITS, 64, 32)
        soft = np.ones((1, 64), np.float32)
        mask = np.array([5], np.uint32)
        bias = np.array([(3, 1.0, -2.0)], batch.biases.dtype)
        full = Step([1, 0], 0, PAGES, PAGES, vector=np.array([-1, 0]), vectors=soft, mask=mask, bias=bias, store=False)
        batch.fill([full])
        assert batch.rows["vector"][:2].tolist() == [-1, 0] and batch.sequences[0]["biases"] == 1
        batch.fill([Step([4, 5], 2, PAGES, PAGES)])
        assert batch.rows["vector"][:2].tolist() == [-1, -1] and not batch.rows["flags"][0]
        assert batch.sequences[0]["biases"] == 0 and batch.sequences[0]["mask"] == -1

    def test_a_row_reaches_its_own_position_or_its_image_blocks_end(self):
        batch = Batch(LIMITS, 64, 32)
        batch.fill([Step([1, 2, 3], 4, PAGES, PAGES)])
        assert batch.rows["reach"][:3].tolist() == [4, 5, 6]
        batch.fill([Step([1, 2, 3], 4, PAGES, PAGES, reach=np.array([4, 6, 6]))])
        assert batch.rows["reach"][:3].tolist() == [4, 6, 6]

    def test_the_block_has_no_pointer_in_it(self):
        one, two = Batch(LIMITS, 64, 32), Batch(LIMITS, 64, 32)
        for batch in (one, two):
            batch.fill([Step([1, 2], 0, PAGES, PAGES)])
        assert (one.memory == two.memory).all()

    def test_more_than_fits_is_refused(self):
        with pytest.raises(ValueError):
            Batch(LIMITS, 64, 32).fill([Step(list(range(9)), 0, PAGES, PAGES)])
