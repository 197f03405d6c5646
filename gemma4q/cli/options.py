"""What several commands share: the shape of a command, and the options that say how to load and how to sample.

Sampling options carry the names of the engine's; those not given are not passed on, so that defaults and limits are the
engine's and the model file's alone.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import click

from ..shipped import shipped
from .terminal import warn

BACKENDS = ("auto", "native", "portable", "reference")
KV_TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0")
KV_HELP = "Type of keys and values; q4_0 makes answers visibly worse, q8_0 next to not at all."
Q4_COSTS = "keys and values in q4_0 make answers visibly worse: q8_0 takes twice the memory and loses next to nothing"
HELP = {"help_option_names": ["-h", "--help"]}


def _debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.obj["debug"] = True


def command(**attributes) -> Callable:
    """A subcommand; all of them take --debug, also after their name."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show a traceback when something fails."
    )
    return lambda function: click.command(context_settings=HELP, **attributes)(debug(function))


def together(*options: Callable) -> Callable:
    """Several click options as one decorator, in this order in the help."""

    def apply(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


class Bias(click.ParamType):
    """`ID+BIAS` or `ID-BIAS`, as llama.cpp spells it; a bias of `-inf` forbids the token."""

    name = "ID+BIAS"

    def convert(self, value, param, ctx) -> tuple[int, float]:
        found = re.fullmatch(r"(\d{1,9})([+-](?:inf|\d+(?:\.\d*)?))", value)
        if not found:
            self.fail(f"{value!r} is not of the form 15043+1 or 15043-inf", param, ctx)
        return int(found[1]), float(found[2])


class Setting(NamedTuple):
    """A sampling option: the engine's name, its spellings, its type, and what it does."""

    name: str
    flags: str
    type: click.ParamType
    help: str
    multiple: bool = False


WHOLE, REAL, TEXT = click.INT, click.FLOAT, click.STRING
SAMPLING = (
    Setting(
        "max_tokens", "-n --predict --n-predict", WHOLE, "Answer with this many tokens at most; -1: until it is done."
    ),
    Setting("temperature", "--temp --temperature", REAL, "Distance from the likeliest token; 0: always the likeliest."),
    Setting("top_k", "--top-k", WHOLE, "Choose among this many of the likeliest; 0: all."),
    Setting("top_p", "--top-p", REAL, "Choose among the likeliest that hold this much probability."),
    Setting("min_p", "--min-p", REAL, "Drop what is less likely than this share of the likeliest."),
    Setting("typical_p", "--typical", REAL, "Choose among the most typical that hold this much probability."),
    Setting("top_n_sigma", "--top-nsigma", REAL, "Choose within so many standard deviations of the likeliest."),
    Setting("xtc_probability", "--xtc-probability", REAL, "How often to drop all likely tokens but the last of them."),
    Setting("xtc_threshold", "--xtc-threshold", REAL, "What XTC calls likely."),
    Setting("dynatemp_range", "--dynatemp-range", REAL, "Let the temperature follow the model's doubt by this much."),
    Setting("dynatemp_exponent", "--dynatemp-exp", REAL, "How it follows."),
    Setting("dry_multiplier", "--dry-multiplier", REAL, "Penalty for going on as an earlier passage did."),
    Setting("dry_base", "--dry-base", REAL, "How that penalty grows with the length of the passage."),
    Setting("dry_allowed_length", "--dry-allowed-length", WHOLE, "Passages up to this length repeat freely."),
    Setting("dry_last_n", "--dry-penalty-last-n", WHOLE, "Look so many tokens back for passages; -1: all."),
    Setting("dry_breakers", "--dry-sequence-breaker", TEXT, "Text that ends a passage; may be given often.", True),
    Setting("repeat_penalty", "--repeat-penalty", REAL, "Divide the logits of recent tokens; 1: off."),
    Setting("repeat_last_n", "--repeat-last-n", WHOLE, "How many tokens count as recent; -1: all."),
    Setting("presence_penalty", "--presence-penalty", REAL, "Subtract from the logits of recent tokens."),
    Setting("frequency_penalty", "--frequency-penalty", REAL, "Subtract for each time a token is among the recent."),
    Setting("logit_bias", "-l --logit-bias", Bias(), "Add to the logit of a token; may be given often.", True),
    Setting("seed", "-s --seed", WHOLE, "The same seed gives the same text; -1: a random one."),
    Setting("stop", "-r --stop --reverse-prompt", TEXT, "End the answer before this text; may be given often.", True),
)


def warn_of_kv(*kinds: str) -> None:
    """Says what keys and values in four bits cost, to whoever asked for that."""
    if "q4_0" in kinds:
        warn(Q4_COSTS, "warning")


def given(values: dict[str, object]) -> dict[str, object]:
    """Takes the sampling options that were given out of a command's values, as the engine wants them."""
    found = {setting.name: values.pop(setting.name) for setting in SAMPLING}
    found = {name: value for name, value in found.items() if value not in (None, ())}
    return found | {"ignore_eos": values.pop("ignore_eos"), "token_mask": not values.pop("no_token_mask")}


def check_writable(path: str | None) -> None:
    """Fails now, not after minutes."""
    if path is not None:
        there = os.path.exists(path)
        with open(path, "a"):
            pass
        if not there:
            os.unlink(path)


class ModelFile(click.ParamType):
    """A path, or the name of a model that comes with gemma4q where no file has that name."""

    name = "MODEL"

    def convert(self, value, param, ctx) -> str:
        return value if os.path.exists(value) else str(shipped(value) or value)


model = click.argument("model", type=ModelFile())
maybe_model = click.argument("model", type=ModelFile(), required=False)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
context_size = click.option(
    "-c", "--ctx-size", "context", type=click.IntRange(min=0), help="Tokens of context; default: as memory allows."
)
threads = click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads; default: the cores we may use.")
backend = click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="Who computes.")
isa = click.option("--isa", help="Use this instruction set (see `gemma4q doctor`), not the best one.")
kv = click.option("--kv", type=click.Choice(KV_TYPES), default="auto", help=KV_HELP)
machine = together(context_size, threads, backend, isa, kv)
sampling = together(
    *(click.option(*s.flags.split(), s.name, type=s.type, multiple=s.multiple, help=s.help) for s in SAMPLING),
    click.option("--ignore-eos", is_flag=True, help="Go on where the model would end."),
    click.option("--no-token-mask", is_flag=True, help="Allow tokens that no answer contains, as <pad>."),
)
talk = together(
    click.option("-sys", "--system", "--system-prompt", "system", help="What the model is told to be."),
    click.option("--tools", help="Functions that the model may call: a JSON file, the list `tools` of OpenAI's API."),
    click.option("--reasoning", type=click.Choice(["on", "off"]), default="on", help="Whether the model thinks first."),
    click.option(
        "--template-size", type=click.Choice(["small", "large"]), help="The template of E2B, E4B or of the others."
    ),
    click.option("--chat-template", help="`gguf`: the file's own template; or a file with one."),
)
