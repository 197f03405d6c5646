"""What depth costs: a token's time behind more and more others, beside what memory makes it cost, and a prompt's parts.

    python bench/depth.py MODEL.gguf -d 1024,4096,16384,65536 --csv depth.csv --plot bench/results/depth-NAME.svg

One prompt grows in steps of 512. At each depth of the list it stops for some generated tokens, timed in turns with as
many at depth 0 and plain reads of the weights, and then taken back. A token's roof is the time of reading its weights,
keys and values that fast. Were attention as near to the roof as the rest is, time would grow from depth 0 as the bytes
do: that is the line. Of each step the time in sliding attention, in global attention and in everything else is kept:
beyond their window sliding layers cost the same at every depth, and only global ones grow.

The CSV file has a row for each step of the prompt, and one for the generated tokens of each depth, a token's mean.
NAME in a picture's name becomes the model's.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import Driver, named, said_plainly, save, write_csv

from gemma4q.abi import PAGE, OpCode, missing
from gemma4q.engine.kv_cache import ROLLBACK, History
from gemma4q.measure.cost import Costs
from gemma4q.measure.gate import BUSY
from gemma4q.measure.machine import processor
from gemma4q.measure.pairs import Test
from gemma4q.measure.plot import BLUE, GREEN, GREY, ORANGE, canvas
from gemma4q.plan.plan import Op

PARTS = ("sliding_ms", "global_ms", "other_ms")
COLUMNS = ("machine", "model", "threads", "kind", "depth", "rows", "milliseconds", *PARTS,
           "weight_bytes", "kv_bytes", "read_gb_s", "roof_ms", "line_ms", "busy")  # fmt: skip
PATIENCE = 3  # times as many runs as asked for, when others want the cores too
TOLERANCE = 0.25  # that the deepest point may lie beside the line


class Growing:
    """A sequence that grows to one depth after the other; each step is a row of the CSV file."""

    def __init__(self, path: str, threads: int, depths: Sequence[int], tokens: int, runs: int, rows: int):
        self.driver = Driver(path, threads, max(depths) + tokens + PAGE)  # a page for depth 0
        self.costs = Costs(path, self.driver.model.kv.name.lower())
        self.places = np.array([place(op) for op in self.costs.ops])
        self.depths, self.tokens, self.runs = depths, tokens, runs
        self.rows = min(rows, self.driver.session.limits.rows)
        self.empty, self.history = self.driver.open(), self.driver.open()
        self.times = self.driver.session.profile(True)
        self.about = {"machine": processor(), "model": Path(path).name, "threads": threads}

    def steps(self) -> Iterator[dict]:
        for depth in self.depths:
            while self.history.length < depth:
                yield self.about | self.prompt(min(self.rows, depth - self.history.length))
            yield self.about | self.decode()

    def prompt(self, rows: int) -> dict:
        test = Test(prompt=rows, depth=self.history.length, batch=rows)
        about = {"kind": "prompt", "depth": test.depth, "rows": rows}
        return about | self.timed(self.history, rows, False) | self.bytes(test)

    def decode(self) -> dict:
        """A token's: the middle one of some runs of several, each after as many at depth 0 and between looks at memory.

        What had company on its cores is made again, if not for ever. Memory's speed wanders by half within minutes, so
        the line is drawn through depth 0 as it was just then: it grows from there as the bytes do.
        """
        tests = [Test(decode=self.tokens, depth=depth) for depth in (0, self.history.length)]
        bytes, (shallow, deep) = self.bytes(tests[1]), (sum(self.bytes(test).values()) for test in tests)
        self.run(self.history)
        look, found = self.driver.read(), []
        while len(calm(found)) < self.runs and len(found) < PATIENCE * self.runs:
            first, sample, before, look = self.run(self.empty), self.run(self.history), look, self.driver.read()
            read = (before + look) / 2
            sample["busy"] = min(first["busy"], sample["busy"])
            sample["line_ms"] = first["milliseconds"] * deep / shallow
            found.append(sample | {"read_gb_s": read / 1e9, "roof_ms": 1e3 * deep / read})
        kept = sorted(calm(found) or found, key=lambda sample: sample["milliseconds"] / sample["line_ms"])
        return {"kind": "decode", "depth": self.history.length, "rows": 1} | bytes | kept[len(kept) // 2]

    def run(self, history: History) -> dict:
        sample = self.timed(history, 1, True)
        history.rollback(self.tokens)
        return sample

    def timed(self, history: History, rows: int, generated: bool) -> dict:
        """Milliseconds of a step and of its parts; of generated tokens the mean of several."""
        self.times[:] = 0
        steps = [self.driver.step([(history, rows)], generated) for _ in range(self.tokens if generated else 1)]
        seconds, cpu = sum(step.seconds for step in steps), sum(step.cpu_seconds for step in steps)
        sliding, wide = (self.times[self.places == part].sum() / 1e9 for part in PARTS[:2])
        parts = zip(("milliseconds", *PARTS), (seconds, sliding, wide, seconds - sliding - wide), strict=True)
        return {name: 1e3 * part / len(steps) for name, part in parts} | {"busy": cpu / (self.driver.threads * seconds)}

    def bytes(self, test: Test) -> dict:
        """Of weights, and of keys and values, that a step reads; of generated tokens the mean."""
        sizes, steps = np.array([cost.bytes for cost in self.costs.of(test)]), max(1, test.decode)
        kept = self.places != PARTS[2]
        return {"weight_bytes": round(sizes[~kept].sum() / steps), "kv_bytes": round(sizes[kept].sum() / steps)}


def calm(records: Sequence[dict]) -> list[dict]:
    """Those that had their cores to themselves."""
    return [record for record in records if record["busy"] >= BUSY]


def place(op: Op) -> str:
    if op.code != OpCode.ATTEND:
        return PARTS[2]
    return PARTS[0] if op.args["window"] else PARTS[1]


def line(decode: dict, prompt: dict | None) -> str:
    """A depth's row of the table; `prompt`: the step before it."""
    speed = f"{1e3 * prompt['rows'] / prompt['milliseconds']:.1f}" if prompt else ""
    times = decode["milliseconds"], decode["roof_ms"], decode["milliseconds"] / decode["roof_ms"]
    return (
        f"{decode['depth']:7} {times[0]:8.2f} {times[1]:8.2f} {times[2]:7.2f} {decode['read_gb_s']:6.1f} "
        f"{decode['kv_bytes'] / 1e6:8.1f} {speed:>10} {decode['busy']:5.2f}"
    )


def verdict(last: dict) -> str:
    """Whether the deepest point lies on the line: the roof, by the share of it that depth 0 reached meanwhile."""
    off = last["milliseconds"] / last["line_ms"] - 1
    within = f"{'within' if abs(off) <= TOLERANCE else 'NOT within'} {100 * TOLERANCE:.0f} %"
    where = f"{100 * abs(off):.0f} % {'above' if off > 0 else 'below'}"
    return f"{last['depth']:,} deep a token lies {where} the roof's line through depth 0: {within}"


def draw(figure, records: Sequence[dict]) -> None:
    """Above: tokens beside their roof. Below: where a prompt's time goes, a line through the steps without company."""
    first = records[0]
    decodes, prompts = ([r for r in records if r["kind"] == kind] for kind in ("decode", "prompt"))
    panels = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{first['model']}, {first['threads']} threads, {first['machine']}", fontsize=11)
    draw_decodes(panels[0], decodes)
    draw_prompts(panels[1], prompts)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=9, borderaxespad=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].xaxis.set_major_formatter(lambda depth, _: f"{depth:,.0f}")
    panels[1].set_xlabel("tokens before")


def draw_decodes(panel, decodes: Sequence[dict]) -> None:
    at = [r["depth"] for r in decodes]
    line = np.array([r["line_ms"] for r in decodes])
    panel.fill_between(at, (1 - TOLERANCE) * line, (1 + TOLERANCE) * line, color=BLUE, alpha=0.12, linewidth=0,
                       label=f"roof's line through depth 0, ± {100 * TOLERANCE:.0f} %")  # fmt: skip
    panel.plot(at, [r["milliseconds"] for r in decodes], "o-", color=BLUE, label="measured")
    panel.plot(at, [r["roof_ms"] for r in decodes], "--", color="black", linewidth=1.2, label="roof")
    panel.set_ylabel("ms a token")
    panel.set_title("Generating", loc="left", fontsize=11)


def draw_prompts(panel, prompts: Sequence[dict]) -> None:
    names = ("sliding attention", "global attention", "everything else")
    for part, name, colour in zip(PARTS, names, (ORANGE, GREEN, GREY), strict=True):
        for records, look in (
            (prompts, {"marker": ".", "linestyle": "", "alpha": 0.4}),
            (calm(prompts), {"label": name}),
        ):
            at, times = [r["depth"] for r in records], [1e3 * r[part] / r["rows"] for r in records]
            panel.plot(at, times, color=colour, **look)
    panel.set_ylabel("µs a token")
    panel.set_title(f"Prompt, in steps of {max((r['rows'] for r in prompts), default=0)}", loc="left", fontsize=11)


def depths(text: str) -> list[int]:
    """Ascending, 0 always among them: `1024,4096`."""
    try:
        found = sorted({0, *map(int, text.split(","))})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,1024,4096") from None
    if found[0] < 0 or len(found) < 2:
        raise argparse.ArgumentTypeError(f"{text}: there must be a depth beyond 0, and none below")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-d", "--depths", type=depths, default="1024,4096,16384", help="tokens before, and always 0")
    parser.add_argument("-n", "--tokens", type=int, default=8, help=f"generated in a run; {ROLLBACK} at most")
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("-b", "--batch-size", type=int, default=512, help="prompt rows of a step")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG, PNG or PDF")
    given = parser.parse_args()
    if not (1 <= given.tokens <= ROLLBACK and given.runs > 0 and given.batch_size > 0):
        parser.error(f"there must be runs, of 1 to {ROLLBACK} tokens, and rows of a step")
    return given


@said_plainly()
def main() -> None:
    if missing:
        raise SystemExit(missing)
    given = arguments()
    plot = given.plot and named(given.plot, given.model)
    figure = plot and canvas(plot, 8, 7)  # before minutes of measuring
    growing = Growing(given.model, given.threads, given.depths, given.tokens, given.runs, given.batch_size)
    records: list[dict] = []
    print(f"{'depth':>7} {'ms':>8} {'roof':>8} {'by roof':>7} {'GB/s':>6} {'KV MB':>8} {'prompt t/s':>10} {'busy':>5}")
    for record in growing.steps():
        if record["kind"] == "decode":
            print(line(record, records[-1] if records else None), flush=True)
        records.append(record)
    print(verdict(records[-1]))
    if given.csv:
        write_csv(given.csv, COLUMNS, records)
    if plot:
        draw(figure, records)
        save(figure, plot)


if __name__ == "__main__":
    main()
