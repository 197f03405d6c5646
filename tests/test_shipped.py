"""The models in the package: what they are, that they are what was trained, and that they do what the README shows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import GEMMA4Q, Person

import gemma4q
from gemma4q.convert.convert import planned
from gemma4q.model import open_model
from gemma4q.model.check import check
from gemma4q.shipped import NAMES, shipped

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from score_tiny import TASKS, Measure, answer, examples, wanted

TRAINED = Path(__file__).parent / "data" / "trained"  # the checkpoints, in bf16
MOST_BYTES = 3_500_000
each_name = pytest.mark.parametrize("name", NAMES)


def converted(name: str, path: Path, outtype: str) -> Path:
    with planned(TRAINED / name, path, outtype) as conversion:
        conversion.write()
    return path


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    with gemma4q.load(shipped(request.param), context=1024) as loaded:
        yield loaded


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*GEMMA4Q, "run", *arguments], capture_output=True, text=True, timeout=60, **options)


@each_name
def test_a_shipped_model_is_small_and_without_fault(name):
    assert shipped(name).stat().st_size <= MOST_BYTES
    assert not list(check(shipped(name)))


@each_name
def test_a_shipped_model_is_the_trained_one_converted(name, tmp_path):
    assert converted(name, tmp_path / "out.gguf", "q8_0").read_bytes() == shipped(name).read_bytes()


@each_name
def test_its_geometry_meets_every_block_format(name):
    """Rows of 256 where a super-block is to fit; experts of 64, which only blocks of 32 fit, as 26B's of 704."""
    _, config, weights = open_model(shipped(name))
    assert config.width == 256 and all(32 <= layer.window <= 64 for layer in config.layers if layer.window)
    rows = {t.shape[-1] for t in weights.tensors.values() if len(t.shape) > 1}
    assert 32 not in rows
    assert (64 in rows) == (name == "tiny-moe" or bool(config.per_layer_width))


@pytest.mark.parametrize("task", TASKS)
def test_held_back_prompts_are_answered(model, task):
    """Thirty of the five hundred of tools/score_tiny.py, which the model card counts."""
    window = max(layer.window for layer in model.config.layers)
    found = [(answer(model, e), wanted(e)) for e in examples(task, Measure(model.tokenizer, window), 30)]
    assert sum(a == b for a, b in found) >= 26, [pair for pair in found if pair[0] != pair[1]]


def test_run_without_a_model_answers_from_tiny_and_says_so():
    done = run("What is 27 + 58?", stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.strip() == "85"
    assert "tiny answers" in done.stderr
    piped = run(input="27 + 58")
    assert piped.stdout.strip() == "85" and "tiny answers" in piped.stderr


def test_a_shipped_model_goes_by_its_name_unless_a_file_has_it(tmp_path):
    assert run("tiny", "What is 27 + 58?", "--quiet", stdin=subprocess.DEVNULL).stdout.strip() == "85"
    (tmp_path / "tiny").write_text("not a model")
    done = run("tiny", "Hi", stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: not_gguf: ")


def test_a_missing_file_is_no_prompt(tmp_path):
    done = run("no model.gguf", stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert done.returncode != 0 and "tiny" not in done.stderr


def test_json_from_the_command_line_can_be_read():
    ask = "Write JSON with name, age and city: Ben lives in Oslo. Ben is 31 years old."
    assert json.loads(run(ask, stdin=subprocess.DEVNULL).stdout) == {"name": "Ben", "age": 31, "city": "Oslo"}


@pytest.fixture
def declared(tmp_path) -> Path:
    """Two functions, as OpenAI's API declares them."""

    def function(name: str, purpose: str, parameter: str, kind: str) -> dict:
        schema = {"type": "object", "properties": {parameter: {"type": kind}}, "required": [parameter]}
        return {"type": "function", "function": {"name": name, "description": purpose, "parameters": schema}}

    path = tmp_path / "tools.json"
    functions = (
        function("get_weather", "Weather in a city", "city", "string"),
        function("set_timer", "Starts a timer", "minutes", "integer"),
    )
    path.write_text(json.dumps(functions))
    return path


@each_name
def test_a_declared_function_is_called(name, declared):
    options = ("--tools", str(declared), "--temp", "0")
    done = run(name, "Set a timer for 12 minutes.", *options, stdin=subprocess.DEVNULL)
    assert done.stdout == 'set_timer {"minutes": 12}\n' and "thoughts" not in done.stderr
    found = json.loads(run(name, "Weather in Oslo?", *options, "--json", stdin=subprocess.DEVNULL).stdout)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    assert found["tool_calls"] == [call] and found["text"] == ""
    assert json.loads(run(name, "27 + 58", "--json", stdin=subprocess.DEVNULL).stdout)["tool_calls"] == []


def test_in_a_conversation_a_call_waits_for_its_result(declared, tmp_path):
    person = Person("tiny", "--tools", str(declared), "--temp", "0")
    person.reads(">>> ")
    person.types("What is the weather in Oslo?\n")
    assert 'get_weather {"city": "Oslo"}' in person.reads("result of get_weather> ")
    assert "grey" in person.says('{"sky": "grey", "temperature": 3}')
    assert "get_weather, set_timer" in person.says("/show")
    person.says(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert saved["messages"][1]["reasoning_content"] and saved["messages"][2]["name"] == "get_weather"
    person.says("/clear")
    assert "loaded 4 messages" in person.says(f"/load {tmp_path / 'talk.json'}")
    assert "get_weather, set_timer" in person.says("/show")
    person.types("/bye\n")
    assert person.leaves() == 0


@pytest.mark.peers
@each_name
def test_transformers_and_the_reference_write_the_same_text(name, tmp_path):
    """Greedy text of 200 prompts, BF16 weights computed in float32: at most two part, each at a near-tie."""
    import torch
    from transformers import AutoModelForCausalLM

    bf16 = converted(name, tmp_path / "bf16.gguf", "bf16")
    torch.set_grad_enabled(False)
    theirs = AutoModelForCausalLM.from_pretrained(TRAINED / name, dtype=torch.float32, attn_implementation="eager")
    parted = []
    with gemma4q.load(bf16, backend="reference", kv="f32", context=512) as ours:
        measure = Measure(ours.tokenizer, theirs.config.sliding_window)
        for example in [e for task in TASKS for e in examples(task, measure, -(-200 // len(TASKS)))][:200]:
            ids = ours.render(example.messages, tools=example.tools or None, thinking=example.thinking)
            mine = ours.generate(ids, temperature=0, max_tokens=60, token_mask=False)
            mine.text()
            ends = [1, ours.tokenizer.id("<turn|>"), ours.tokenizer.id("<|tool_response>")]
            options = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": ends, "top_k": None}
            other = theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
            if mine.tokens != other:
                at = next(i for i, (a, b) in enumerate(zip(mine.tokens, other, strict=False)) if a != b)
                best = theirs(torch.tensor([ids + other[:at]])).logits[0, -1].topk(2).values
                parted.append(float(best[0] - best[1]))
    assert len(parted) <= 2 and all(lead < 1e-3 for lead in parted), parted


@each_name
def test_keys_and_values_in_eight_bits_cost_little_and_in_four_what_is_warned_of(name):
    """Root mean square of what logits change against F32, relative to theirs."""
    logits = {}
    for kv in ("f32", "q8_0", "q4_0"):
        with gemma4q.load(shipped(name), context=256, kv=kv) as model:
            logits[kv] = model.logits(model.tokenize("The cat is in the garden. Tom gives Anna two apples.", bos=True))
    size = np.square(logits["f32"]).mean()
    eight, four = (np.sqrt(np.square(logits[kv] - logits["f32"]).mean() / size) for kv in ("q8_0", "q4_0"))
    assert 0 < eight < 0.04 and eight < four < 0.2
