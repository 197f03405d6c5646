"""The command line as people and scripts meet it: what goes where, how it ends, and what one error looks like."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from terminal import GEMMA4Q, SURE, chatty
from tiny import U32, tiny

from gemma4q.cli import COMMANDS, cli
from gemma4q.cli.answer import Display
from gemma4q.cli.options import Q4_COSTS
from gemma4q.cli.prompt import is_text, unescape
from gemma4q.cli.run import why_slow
from gemma4q.cli.terminal import columns, harmless, human_bytes
from gemma4q.engine.memory import RUNTIME
from gemma4q.text.calls import Call
from gemma4q.text.stream import Event

ERROR_LINE = re.compile(r"error: [a-z_0-9]+: .+\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(chatty())
    return str(path)


def invoke(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(cli, list(arguments), input=stdin)


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The program itself, without a terminal."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60} | options
    return subprocess.run([*GEMMA4Q, *arguments], **options)


class TestHelp:
    def test_of_the_program_names_every_command_as_the_command_itself_does(self):
        listed = invoke("--help").stdout
        for name, (_, purpose) in COMMANDS.items():
            assert re.search(rf"{name} +{re.escape(purpose)}", listed)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_a_command_shows_its_options(self, name):
        for flag in ("-h", "--help"):
            done = invoke(name, flag)
            assert done.exit_code == 0 and f"Usage: gemma4q {name}" in done.stdout and not done.stderr

    def test_comes_at_once(self):
        def seconds() -> float:
            start = time.perf_counter()
            assert run("--help").returncode == 0
            return time.perf_counter() - start

        assert min(seconds() for _ in range(5)) < 0.3

    def test_version(self):
        assert re.fullmatch(r"\d+\.\d+\.\d+\n", invoke("--version").stdout)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments",
        [(), ("nonsense",), ("show",), ("show", "--nonsense", "x"), ("run", "x", "--top-k", "many"), ("plan",)],
    )
    def test_wrong_usage_is_exit_status_2(self, arguments):
        done = invoke(*arguments, stdin="")
        assert done.exit_code == 2 and not done.stdout and "Usage:" in done.stderr

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("doctor", "convert")])  # no file in
    def test_a_model_that_is_not_there_is_one_line_and_exit_status_1(self, name):
        needed = {"split": ["--max-part-size", "1G"], "quantize": ["Q8_0"]}.get(name, [])
        done = invoke(name, "no/such.gguf", *needed, stdin="1 2 3")
        assert done.exit_code == 1
        line = done.stdout if name == "check" else done.stderr
        assert line == "error: not_found: no/such.gguf: there is no such file\n"

    def test_control_characters_of_a_name_never_reach_the_terminal(self):
        done = invoke("show", "\x1b[31m\nred")
        assert "\x1b" not in done.output and done.stderr.count("\n") == 1

    def test_debug_shows_the_traceback_before_or_after_the_command(self):
        for arguments in (["--debug", "show", "nowhere"], ["show", "--debug", "nowhere"]):
            done = run(*arguments)
            assert done.returncode == 1 and b"Traceback" in done.stderr
        assert b"Traceback" not in run("show", "nowhere").stderr

    def test_a_defect_is_one_line_too(self, monkeypatch):
        monkeypatch.setattr("gemma4q.gguf.reader.open_gguf", lambda path: 1 / 0)
        done = invoke("show", "x")
        assert (
            done.exit_code == 1 and ERROR_LINE.fullmatch(done.stderr) and "internal: ZeroDivisionError" in done.stderr
        )

    def test_a_full_disk_is_one_line(self, model):
        with open("/dev/full", "w") as full:
            done = run("show", model, stdout=full, stderr=subprocess.PIPE, capture_output=False)
        assert done.returncode == 1 and done.stderr == b"error: io: No space left on device\n"

    def test_closed_streams_do_no_harm(self, model):
        for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
            command = f"exec {' '.join(GEMMA4Q)} show {model} {closed}"
            done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
            assert done.returncode == 0 and not done.stderr

    @pytest.mark.parametrize(
        "setting", [{"LC_ALL": "C"}, {"LC_ALL": "tr_TR.ISO-8859-9"}, {"PYTHONOPTIMIZE": "2"}, {"TZ": "X"}]
    )
    def test_odd_surroundings_change_nothing(self, model, setting):
        done = run("tokenize", model, "hi é", env=os.environ | setting)
        assert done.returncode == 0 and done.stdout == run("tokenize", model, "hi é").stdout

    def test_a_reader_that_leaves_a_pipe_is_no_error(self, model):
        shell = f"{' '.join(GEMMA4Q)} show --tensors {model} | head -1"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=60)
        assert done.stdout.startswith(b"/") and done.stdout.count(b"\n") == 1 and not done.stderr


class TestShow:
    def test_prints_metadata_types_and_tensors(self, model):
        text = invoke("show", model, "--tensors").stdout
        assert re.search(r"gemma4\.block_count +4\n", text)
        assert re.search(r"tokenizer\.ggml\.merges +4 values: h i, ▁ h, ▁h i, …\n", text)
        assert re.search(r"blk\.0\.attn_q\.weight +Q8_0 +32 x 64 ", text)

    def test_escapes_what_the_file_says(self, model):
        for arguments in ([], ["--json"], ["--template"]):
            assert "\x1b" not in invoke("show", model, *arguments).stdout
        assert r"evil \x1b[31m name" in invoke("show", model).stdout

    def test_json_is_one_object(self, model):
        shown = json.loads(invoke("show", model, "--json").stdout)
        assert shown["metadata"]["gemma4.block_count"] == 4
        assert shown["metadata"]["tokenizer.ggml.merges"] == {"count": 4, "first": ["h i", "▁ h", "▁h i"]}
        assert sum(shown["types"].values()) == shown["bytes"] == sum(tensor["bytes"] for tensor in shown["tensors"])

    def test_prints_the_template_alone(self, model):
        assert invoke("show", model, "--template").stdout == "{{ messages }}\n"


class TestCheck:
    def test_says_so_when_nothing_is_wrong(self, model):
        done = invoke("check", model)
        assert done.exit_code == 0 and done.stdout == "no faults\n"

    def test_prints_every_fault_in_a_line_and_ends_with_status_1(self, tmp_path):
        file = tiny()
        file.set("gemma4.attention.sliding_window", U32, 0)
        file.set("tokenizer.ggml.bos_token_id", U32, 10_000)
        (tmp_path / "bad.gguf").write_bytes(file.bytes())
        done = invoke("check", str(tmp_path / "bad.gguf"))
        assert done.exit_code == 1
        assert {line.split(":")[1] for line in done.stdout.splitlines()} == {" bad_hparam", " bad_tokenizer"}
        found = json.loads(invoke("check", "--json", str(tmp_path / "bad.gguf")).stdout)
        assert found["faults"] == 2 == len(found["findings"])


class TestTokens:
    def test_text_becomes_tokens_and_text_again(self, model):
        assert invoke("tokenize", model, "hi", "hi\tö").stdout.split("\n")[0].endswith("'hi'")
        ids = invoke("tokenize", model, "--ids", stdin="hi hi\tö").stdout
        assert invoke("detokenize", model, stdin=f"[{ids.strip().replace(' ', ', ')}]").stdout == "hi hi\tö\n"

    def test_special_tokens_count_only_when_asked_for(self, model):
        plain, special = (
            invoke("tokenize", model, "--ids", *more, "<turn|>", stdin="").stdout for more in ([], ["--special"])
        )
        assert special == "6\n" and len(plain.split()) == 7

    def test_json(self, model):
        found = json.loads(invoke("tokenize", model, "--json", "--bos", "hi", stdin="").stdout)
        assert found["pieces"] == ["<bos>", "hi"] and found["ids"][0] == 2

    @pytest.mark.parametrize("ids", ["-1", "1000000", "99999999999999999999999", "one", "1.5"])
    def test_what_is_no_token_is_refused(self, model, ids):
        done = invoke("detokenize", model, "--", ids, stdin="")
        assert done.exit_code == 1 and done.stderr.startswith("error: bad_token: ")

    def test_the_prompt_is_shown_as_the_model_reads_it(self, model):
        done = invoke("template", model, "hi <turn|>", "--reasoning", "off", "-sys", "be kind", stdin="")
        wanted = "<bos><|turn>system\nbe kind<turn|>\n<|turn>user\nhi <turn|><turn|>\n<|turn>model\n"
        assert done.stdout == wanted + "\n"

    def test_a_conversation_can_be_rendered(self, model):
        talk = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        done = invoke("template", model, "--messages", "--reasoning", "off", stdin=json.dumps(talk))
        assert "<|turn>model\nb<turn|>\n<|turn>user\nc<turn|>\n" in done.stdout
        for wrong in ("{", "{}", '[{"role": "nobody", "content": ""}]', "[" * 100_000):
            refused = invoke("template", model, "--messages", stdin=wrong)
            assert refused.exit_code == 1 and refused.stderr.startswith("error: bad_message: ")


class TestReadme:
    """What it shows works as shown."""

    TEXT = (Path(__file__).parent.parent / "README.md").read_text()

    @pytest.mark.parametrize("line", re.findall(r"^(?:.*\| )?gemma4q (.*?)(?: +#.*)?$", TEXT, re.MULTILINE))
    def test_command_lines_are_right(self, line):
        name, *arguments = shlex.split(line)
        command = cli.get_command(None, name)
        given = command.make_context(name, arguments, obj={}).params
        if name == "convert":
            assert Path(given["folder"]).suffix == ""
        elif name == "imatrix" and given["model"] is None:
            assert given["before"]
        elif name != "run" or not is_text(given["model"]):
            assert str(given["model"]).endswith((".gguf", "MODEL"))

    def test_the_python_example_runs(self, model, capsys):
        (program,) = re.findall(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        exec(program.replace("gemma-4-E2B-it-Q4_0.gguf", model), {})
        assert "Stats(prompt_tokens=" in capsys.readouterr().out


class TestText:
    def test_escapes(self):
        assert unescape(r"a\nb\t\\n\q\"") == 'a\nb\t\\n\\q"'
        assert unescape("end\\") == "end\\"

    def test_output_cannot_drive_a_terminal(self):
        assert harmless("a\x1b[2J\x07b\n\tc\x9b") == "a[2Jb\n\tc"

    def test_sizes(self):
        assert [human_bytes(n) for n in (0, 1023, 1024, 5 << 30)] == ["0 bytes", "1,023 bytes", "1.00 KiB", "5.00 GiB"]

    def test_columns(self):
        assert columns([("a", 1), ("bcd", 22)], right=(1,)) == "a     1\nbcd  22"
        assert columns([]) == ""


class TestDisplay:
    def shown(self, capsys, *events: Event):
        display = Display()
        for event in events:
            display.add(event)
        display.close()
        return display, capsys.readouterr()

    def test_a_call_is_a_line_of_its_own(self, capsys):
        call = Event("call", "", Call("f\n", {"é": "a\nb"}))
        display, out = self.shown(capsys, Event("thought", "hm"), Event("content", "So:"), call, call)
        line = 'f\\n {"é": "a\\nb"}\n'
        assert (out.out, out.err) == (f"So:\n{line}{line}", "hm\n")
        assert display.message()["tool_calls"] == 2 * [{"type": "function", "function": vars(call.call)}]

    def test_a_call_that_cannot_be_read_is_part_of_the_text(self, capsys):
        display, out = self.shown(capsys, Event("content", "So:"), Event("unparsed", "call:f{"))
        assert out.out == "So:\ncall:f{\n" and display.unreadable
        assert display.message() == {"role": "assistant", "content": "So:\ncall:f{"}


class TestPlan:
    def test_says_what_a_context_takes(self, model):
        small, large = (json.loads(invoke("plan", model, "-c", size, "--json").stdout) for size in ("256", "8192"))
        own = [p["anonymous"] - sum(e["bytes"] for e in p["entries"] if e["name"] == RUNTIME) for p in (small, large)]
        assert small["fits"] and own[0] < own[1] and small["mapped"] == large["mapped"]
        kv = [sum(e["bytes"] for e in p["entries"] if "keys and values, global" in e["name"]) for p in (small, large)]
        assert 20 < kv[1] / kv[0] < 32
        assert "in all, for 256 tokens" in invoke("plan", model, "-c", "256").stdout

    def test_four_bits_a_key_take_half_of_eight_and_are_warned_of(self, model):
        plans = {kv: invoke("plan", model, "--kv", kv, "--json") for kv in ("q8_0", "q4_0")}
        entries = [json.loads(done.stdout)["entries"] for done in plans.values()]
        eight, four = (sum(e["bytes"] for e in part if e["name"].startswith("keys and values")) for part in entries)
        assert 18 / 34 <= four / eight <= 10 / 18  # heads of 16 have as many scales as those of 32
        assert not plans["q8_0"].stderr and plans["q4_0"].stderr == f"warning: {Q4_COSTS}\n"

    def test_a_context_the_model_cannot_have_is_refused(self, model):
        done = invoke("plan", model, "-c", "1000000000")
        assert done.exit_code == 1 and done.stderr.startswith("error: bad_option: context: ")


def test_doctor_says_what_was_chosen_and_why():
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["backends"][facts["backend"]].startswith("chosen") and facts["threads"][0].isdigit()
    assert facts["backend"] != "native" or "scalar" in facts["instruction_sets"]
    assert "threads" in invoke("doctor").stdout


SLOW = ("--backend", "reference", "--ignore-eos")


class TestRun:
    def test_text_goes_to_stdout_and_all_else_to_stderr(self, model):
        done = invoke("run", model, "hi", "-n", "8", *SURE, stdin="")
        assert (
            done.exit_code == 0 and done.stdout.endswith("\n") and "tokens/s" in done.stderr and "seed 7" in done.stderr
        )
        quiet = invoke("run", model, "hi", "-n", "8", "--quiet", *SURE, stdin="")
        assert quiet.stdout == done.stdout and not quiet.stderr

    @pytest.mark.parametrize("quiet, lines", [((), [f"warning: {Q4_COSTS}"]), (("--quiet",), [])])
    def test_keys_in_four_bits_are_warned_of_in_a_line(self, model, quiet, lines):
        done = invoke("run", model, "hi", "-n", "3", "--kv", "q4_0", *SURE, *quiet, stdin="")
        assert done.exit_code == 0
        assert [line for line in done.stderr.splitlines() if line.startswith("warning: ")] == lines

    def test_the_same_seed_gives_the_same_text_and_another_another(self, model):
        one, same, other = (
            invoke("run", model, "--raw", "hi", "-n", "12", "--quiet", "-s", seed, stdin="").stdout for seed in "112"
        )
        assert one == same != other

    def test_json_is_one_object(self, model):
        done = invoke("run", model, "hi", "-n", "8", "--json", *SURE, stdin="")
        found = json.loads(done.stdout)
        assert found["finish"] in ("stop", "length") and found["seed"] == 7
        assert found["text"] + "\n" == invoke("run", model, "hi", "-n", "8", *SURE, stdin="").stdout
        assert found["stats"]["generated_tokens"] <= 8

    def test_a_prompt_comes_from_words_a_file_and_a_pipe_together(self, model, tmp_path):
        (tmp_path / "text").write_text("b\n")
        tokens = invoke("tokenize", model, "--bos", "--ids", stdin="a a\nb\nc").stdout.split()
        done = invoke("run", model, "--raw", "a", "a", "-f", str(tmp_path / "text"), "-n", "1", "--json", stdin="c\n")
        assert json.loads(done.stdout)["stats"]["prompt_tokens"] == len(tokens)

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("{", "bad_tools: FILE is not JSON: "),
            ("[NaN]", "bad_tools: FILE is not JSON: it holds NaN"),
            ("[" * 100_000, "bad_tools: FILE is not JSON: "),
            ("{}", "bad_tools: FILE: tools must be a list"),
            ('[{"name": "a b"}]', "bad_tools: FILE: tools[0]: 'a b' is no name "),
            ('[{"name": "a"}, {"name": "b", "parameters": 1}]', "bad_tools: FILE: tools[1] (b).parameters must be"),
        ],
    )
    def test_functions_that_cannot_be_declared_are_one_line(self, model, tmp_path, text, fault):
        path = tmp_path / "tools.json"
        path.write_text(text)
        for command in ("run", "template"):
            done = invoke(command, model, "hi", "--tools", str(path), stdin="")
            assert done.exit_code == 1 and ERROR_LINE.fullmatch(done.stderr)
            assert done.stderr.startswith("error: " + fault.replace("FILE", str(path)))
        assert invoke("run", model, "hi", "--raw", "--tools", str(path), stdin="").exit_code == 2

    def test_a_model_without_the_tokens_of_calls_refuses_functions(self, model, tmp_path):
        (tmp_path / "tools.json").write_text('[{"name": "a"}]')
        done = invoke("run", model, "hi", "--tools", str(tmp_path / "tools.json"), stdin="")
        assert done.exit_code == 1 and done.stderr.startswith("error: bad_tokenizer: ")

    def test_escapes_are_read_only_when_asked_for(self, model):
        counts = [
            json.loads(invoke("run", model, "--raw", r"\n\n", "-n", "1", "--json", *more, stdin="").stdout)["stats"]
            for more in ([], ["-e"])
        ]
        assert [stats["prompt_tokens"] for stats in counts] == [5, 3]

    def test_without_a_prompt_or_a_terminal_it_is_wrong_usage(self, model):
        assert run("run", model).returncode == 2
        assert invoke("run", model, stdin="").exit_code == 2

    def test_a_file_without_a_template_completes_text_and_says_so(self, tmp_path):
        (tmp_path / "plain.gguf").write_bytes(tiny().bytes())
        done = invoke("run", str(tmp_path / "plain.gguf"), "hi", "-n", "2", *SURE, stdin="")
        raw = invoke("run", str(tmp_path / "plain.gguf"), "hi", "-n", "2", "--raw", *SURE, stdin="")
        assert done.stdout == raw.stdout and "--raw" in done.stderr and "template" not in raw.stderr

    def test_a_prompt_may_take_several_steps(self, model):
        done = invoke("run", model, "--raw", "-n", "2", "--ignore-eos", "--json", "-c", "8192", stdin="hi" * 3000)
        assert json.loads(done.stdout)["stats"]["prompt_tokens"] == 3001

    def test_a_slow_backend_is_never_taken_silently(self, monkeypatch):
        assert why_slow("native") is None
        monkeypatch.setattr("gemma4q.backends.native.Native.available", lambda self: "no compiler was there")
        assert why_slow("portable") == "portable computes, many times slower: backend native: no compiler was there"

    def test_another_template_writes_the_prompt(self, model, tmp_path):
        (tmp_path / "jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
        done = invoke(
            "run", model, "hi <bos>", "-n", "1", "--json", "--chat-template", str(tmp_path / "jinja"), stdin=""
        )
        tokens = invoke("tokenize", model, "--bos", "--ids", "hi <bos>", stdin="").stdout.split()
        assert json.loads(done.stdout)["stats"]["prompt_tokens"] == len(tokens)
        (tmp_path / "jinja").write_text("{% for x in range(1000000000) %}{% endfor %}")
        refused = invoke("run", model, "hi", "--chat-template", str(tmp_path / "jinja"), stdin="")
        assert refused.exit_code == 1 and refused.stderr.startswith("error: bad_template: ")

    def test_an_answer_that_was_cut_is_said_to_be(self, model):
        done = invoke("run", model, "hi", "-n", "3", "--ignore-eos", *SURE, stdin="")
        assert "cut at 3 tokens" in done.stderr

    def test_a_full_context_is_said(self, model):
        done = invoke("run", model, "--raw", "hi", "-c", "16", *SLOW, stdin="")
        assert done.exit_code == 0 and "the context is full" in done.stderr
        long = invoke("run", model, "--raw", "-c", "16", *SLOW, stdin="hi " * 100)
        assert long.exit_code == 1 and long.stderr.startswith("error: context_length_exceeded: ")

    @pytest.mark.parametrize(
        "wrong",
        [("--temp", "-1"), ("--top-p", "2"), ("-n", "0"), ("--stop", ""), ("-l", "99999999+1"), ("--isa", "z80")],
    )
    def test_a_number_out_of_range_is_one_line(self, model, wrong):
        done = invoke("run", model, "--raw", "hi", *wrong, stdin="")
        assert done.exit_code == 1 and ERROR_LINE.fullmatch(done.stderr)

    def test_biases_and_stop_strings_are_heard(self, model):
        forced = invoke("run", model, "--raw", "x", "-n", "3", "-l", "267+1000", "--quiet", *SURE, stdin="").stdout
        assert forced == "aaa\n"
        stopped = invoke("run", model, "--raw", "x", "-n", "9", "-l", "267+1000", "-r", "aa", "--json", stdin="").stdout
        assert json.loads(stopped)["finish"] == "stop" and json.loads(stopped)["text"] == ""

    def test_ctrl_c_keeps_the_text_and_ends_with_130(self, model):
        command = [*GEMMA4Q, "run", model, "--raw", "hi", *SLOW]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as going:
            first = os.read(going.stdout.fileno(), 1)
            start = time.monotonic()
            going.send_signal(signal.SIGINT)
            rest, notes = going.communicate(timeout=30)
        assert going.returncode == 130 and time.monotonic() - start < 5
        assert (first + rest).endswith(b"\n") and b"stopped" in notes and b"Traceback" not in notes

    def test_a_reader_that_leaves_ends_it(self, model):
        shell = f"{' '.join(GEMMA4Q)} run {model} --raw hi {' '.join(SLOW)} < /dev/null | head -c 1 | wc -c"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=60)
        assert done.stdout.strip() == b"1" and not done.stderr
