"""Trains the tiny models that ship with gemma4q: transformers' own Gemma 4 classes on texts of tiny_tasks.py.

    python tools/train_tiny.py tiny out/                train, or go on where out/ stopped
    python tools/train_tiny.py tiny out/ --minutes 2    the first points of the log again

Needs torch and transformers (the `peers` extra), CUDA where there is one. `out` gets a Hugging Face checkpoint in bf16,
`state.pt` to go on from, and `log.csv`: seconds, step, tokens, tokens a second, loss, and a loss for each task.

Weights are bf16 with float32 masters; Muon moves matrices, Adam all else. A curriculum in tokens: copying first, then
looking up, then everything. Only what the model is to write counts. Rows of a batch have about the same length, so that
little is padding, and padding stands at the end, where nothing looks at it.
"""

import argparse
import csv
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import tiny_vocab
import torch
from tiny_tasks import TASKS, draw
from tokenizers import Tokenizer
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemma4q.text.segments import RESPONSE, RESPONSE_END, TURN, TURN_END

WINDOW = 32
BASE = {
    "vocab_size": tiny_vocab.SIZE, "vocab_size_per_layer_input": tiny_vocab.SIZE, "hidden_size": 256,
    "num_attention_heads": 4, "head_dim": 64, "global_head_dim": 128, "sliding_window": WINDOW,
    "max_position_embeddings": 4096, "final_logit_softcapping": 30.0, "num_key_value_heads": 1,
}  # fmt: skip
S, G = "sliding_attention", "full_attention"
MODELS = {
    "tiny": BASE | {
        "intermediate_size": 256, "num_hidden_layers": 4, "layer_types": [S, S, G, G], "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 64,
    },
    "tiny-moe": BASE | {
        "intermediate_size": 128, "num_hidden_layers": 4, "layer_types": [S, G, S, G], "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False, "hidden_size_per_layer_input": 0, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
}  # fmt: skip
LENGTHS = (48, 64, 96, 128, 192, 256, 384)
ROW_TOKENS = 3072  # of a batch, padding included
BATCHES = 4  # a step
# Share of each task by the tokens seen, in millions; between two points it changes evenly.
CURRICULUM = {
    0: {"copy": 6, "sums": 1, "lookup": 2, "talk": 1, "json": 1},
    2: {"copy": 4, "reverse": 1, "sums": 1, "lookup": 4, "several_lookups": 2, "json": 2, "tools": 1, "talk": 1},
    8: {"copy": 2, "reverse": 1, "sums": 6, "lookup": 5, "several_lookups": 2, "json": 3, "tools": 3, "talk": 0.3,
        "no_tool": 0.3, "story": 0.3},
}  # fmt: skip
MUON, ADAM = 0.01, 0.004  # learning rates
WARM_UP, DECAY = 100, 0.4  # steps; the last part of the tokens, in which rates fall to nothing
BALANCE = 0.01  # of the loss that keeps experts busy


CARD = """\
---
name: gemma4q {name}
license: apache-2.0
pipeline_tag: text-generation
language: [en]
---
# {name}

A very small Gemma 4 for trying and testing gemma4q, trained by tools/train_tiny.py on texts of its own making.
What it can do stands in gemma4q/shipped/README.md.
"""
SAMPLING = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "top_k": 64, "temperature": 0.2}


def describe(name: str, out: Path) -> None:
    """What goes into a checkpoint's directory beside weights and vocabulary."""
    (out / "README.md").write_text(CARD.format(name=name))
    (out / "generation_config.json").write_text(json.dumps(SAMPLING, indent=1))
    (out / "chat_template.jinja").write_text(Path(__file__).with_name("tiny_template.jinja").read_text())


def build(name: str, seed: int = 0) -> Gemma4ForCausalLM:
    """A model to train: attention scores start with the spread that 1 / sqrt(head_dim) gives others."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM._from_config(Gemma4TextConfig(**MODELS[name]), attn_implementation="sdpa")
    with torch.no_grad():
        for path, value in model.named_parameters():
            if path.endswith(("q_norm.weight", "k_norm.weight")):
                value.fill_(len(value) ** -0.25)
            elif value.dim() > 1 and "embed" not in path and "router" not in path:
                value.normal_(0, value.shape[-1] ** -0.5)
    return model


# -- Texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them the model is to write."""

    task: str
    ids: list[int]
    learn: list[bool]


class Reader:
    """Examples as rows. Turns of a history count too, unless thinking is on: history shows no thoughts."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.id = tokenizer.token_to_id

    def row(self, example) -> Row:
        prompt = self.tokenizer.encode(example.prompt(), add_special_tokens=False).ids
        turn = self.tokenizer.encode(example.turn(), add_special_tokens=False).ids
        history = [False] * len(prompt) if example.thinking else self.own(prompt)
        return Row(example.task, prompt + turn, history + [True] * len(turn))

    def own(self, ids: list[int]) -> list[bool]:
        """Which tokens of a history the model wrote: its turns, without the header and without results."""
        start = [self.id(TURN), *self.tokenizer.encode("model\n").ids]
        learn, mine, quiet = [], False, False
        for i, id in enumerate(ids):
            if ids[max(0, i - len(start)) : i] == start:
                mine = True
            learn.append(mine and not quiet)
            mine = mine and id != self.id(TURN_END)
            quiet = (quiet or id == self.id(RESPONSE)) and id != self.id(RESPONSE_END)
        return learn


def shares(tokens: float) -> dict[str, float]:
    points = sorted(CURRICULUM)
    now = tokens / 1e6
    after = next((p for p in points if p > now), None)
    before = max(p for p in points if p <= now)
    if after is None:
        return CURRICULUM[before]
    t = (now - before) / (after - before)
    old, new = CURRICULUM[before], CURRICULUM[after]
    return {task: (1 - t) * old.get(task, 0) + t * new.get(task, 0) for task in TASKS}


class Batches:
    """Batches of rows of like length, without end. `seen` counts the tokens given out, padding excluded."""

    def __init__(self, tokenizer: Tokenizer, seed: int, seen: int = 0):
        self.reader, self.random, self.seen = Reader(tokenizer), Random(seed), seen
        self.waiting: dict[int, list[Row]] = defaultdict(list)

    def __iter__(self):
        while True:
            mix = shares(self.seen)
            task = self.random.choices(list(mix), list(mix.values()))[0]
            row = self.reader.row(draw(self.random, task))
            length = next((n for n in LENGTHS if len(row.ids) <= n), None)
            if length is None:
                continue
            waiting = self.waiting[length]
            waiting.append(row)
            if len(waiting) == ROW_TOKENS // length:
                self.seen += sum(len(r.ids) for r in waiting)
                yield length, waiting
                self.waiting[length] = []


def tensors(length: int, rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Ids [rows, length], where the next token counts [rows, length - 1], and the task of each that does."""
    ids = np.zeros((len(rows), length), np.int64)
    learn = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], learn[i, : len(row.ids)] = row.ids, row.learn
    learn = learn[:, 1:]
    tasks = [row.task for row, count in zip(rows, learn.sum(1), strict=True) for _ in range(count)]
    return torch.from_numpy(ids).to(device), torch.from_numpy(learn).to(device), tasks


# -- Experts ----------------------------------------------------------------------------------------------------------


def all_experts(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What Gemma4TextExperts computes, every expert for every token: few and small ones are faster so."""
    gates = torch.zeros(len(x), self.num_experts, dtype=weights.dtype, device=x.device).scatter(1, index, weights)
    gate, up = torch.einsum("td,ehd->teh", x, self.gate_up_proj).chunk(2, dim=-1)
    hidden = self.act_fn(gate) * up * gates[:, :, None].to(x.dtype)
    return torch.einsum("teh,edh->td", hidden, self.down_proj)


def watch_routers(model: Gemma4ForCausalLM) -> list[torch.Tensor]:
    """Collects each router's (probabilities, choices) of the last pass."""
    seen: list = []
    for layer in model.model.layers:
        layer.experts.forward = all_experts.__get__(layer.experts)
        layer.router.register_forward_hook(lambda _, __, out: seen.append((out[0], out[2])))
    return seen


def imbalance(routers: list, experts: int) -> torch.Tensor:
    """1 where all experts are used alike, up to their number where one does everything; as in Switch Transformers."""
    total = 0
    for probabilities, chosen in routers:
        used = torch.nn.functional.one_hot(chosen.flatten(), experts).float().mean(0)
        total = total + experts * (used * probabilities.float().flatten(0, -2).mean(0)).sum()
    return total / len(routers)


# -- Training ---------------------------------------------------------------------------------------------------------


class Optimizer:
    """bf16 weights and their float32 masters."""

    def __init__(self, model: torch.nn.Module):
        named = dict(model.named_parameters())
        self.weights = list(named.values())
        self.masters = [w.detach().float().clone() for w in self.weights]
        kinds = defaultdict(list)
        for (name, _), master in zip(named.items(), self.masters, strict=True):
            kinds[master.dim() == 2 and "embed" not in name and "router" not in name].append(master)
        self.parts = [
            torch.optim.Muon(kinds[True], lr=MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(kinds[False], lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.rates = (MUON, ADAM)

    def step(self, scale: float) -> None:
        norm = torch.nn.utils.get_total_norm([w.grad for w in self.weights if w.grad is not None])
        down = (1 / torch.clamp(norm, min=1)).float()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad.float() * down if weight.grad is not None else torch.zeros_like(master)
            weight.grad = None
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state(self) -> dict:
        return {"masters": self.masters, "parts": [part.state_dict() for part in self.parts]}

    def load(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.weights, self.masters)


class Trainer:
    def __init__(self, name: str, out: Path, seed: int, compile: bool):
        self.out, self.name = out, name
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if not (out / "tokenizer.json").exists():
            tiny_vocab.save(out)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        self.model = build(name, seed).to(self.device, torch.bfloat16).train()
        self.routers = watch_routers(self.model) if MODELS[name].get("enable_moe_block") else []
        self.optimizer = Optimizer(self.model)
        self.body = torch.compile(self.model.model, dynamic=False) if compile else self.model.model
        self.step = self.tokens = 0
        self.seconds = 0.0
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=self.device, weights_only=True)
            self.optimizer.load(state["optimizer"])
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.batches = iter(source := Batches(tokenizer, seed + self.step, self.tokens))
        self.source = source

    def loss(self, length: int, rows: list[Row], found: dict) -> torch.Tensor:
        ids, learn, tasks = tensors(length, rows, self.device)
        self.routers.clear()
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][learn]
        logits = self.model.lm_head(hidden).float()
        logits = 30 * torch.tanh(logits / 30)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:][learn], reduction="none")
        for task, loss in zip(tasks, each.tolist(), strict=True):
            found[task].append(loss)
        balance = BALANCE * imbalance(self.routers, self.model.config.num_experts) if self.routers else 0
        return each.sum() / 1000 + balance  # about a thousand tokens of a batch count

    def one_step(self, scale: float) -> dict:
        found = defaultdict(list)
        for length, rows in islice(self.batches, BATCHES):
            (self.loss(length, rows, found) / BATCHES).backward()
        self.optimizer.step(scale)
        self.step, self.tokens = self.step + 1, self.source.seen
        return found

    def run(self, minutes: float, whole: float, every: int = 10) -> None:
        """Trains up to `whole` tokens, which the rates follow, or for `minutes`."""
        started, before, told = time.time(), self.seconds, defaultdict(list)
        mark, mark_tokens = started, self.tokens
        while time.time() - started < 60 * minutes and self.tokens < whole:
            scale = min(1, (self.step + 1) / WARM_UP, max(0.02, (1 - self.tokens / whole) / DECAY))
            for task, losses in self.one_step(scale).items():
                told[task] += losses
            self.seconds = before + time.time() - started
            if self.step % every == 0:
                now = time.time()
                self.log(told, (self.tokens - mark_tokens) / (now - mark))
                told, mark, mark_tokens = defaultdict(list), now, self.tokens
            if self.step % 500 == 0:
                self.save()
        self.save()

    def log(self, told: dict, speed: float) -> None:
        mean = {task: sum(losses) / len(losses) for task, losses in told.items()}
        every = [loss for losses in told.values() for loss in losses]
        names = ("copy", "reverse", "sums", "lookup", "tools", "answers", "json", "talk", "story")
        line = {"seconds": round(self.seconds), "step": self.step, "tokens": self.tokens, "tokens_s": round(speed)}
        line |= {"loss": f"{sum(every) / len(every):.4f}"}
        line |= {task: f"{mean[task]:.4f}" if task in mean else "" for task in names}
        path = self.out / "log.csv"
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, line)
            if new:
                writer.writeheader()
            writer.writerow(line)
        print("  ".join(f"{k} {v}" for k, v in line.items() if v != ""), flush=True)

    def save(self) -> None:
        self.model.save_pretrained(self.out)
        describe(self.name, self.out)
        state = {"optimizer": self.optimizer.state(), "step": self.step, "tokens": self.tokens}
        torch.save(state | {"seconds": self.seconds}, self.out / "state.part")
        (self.out / "state.part").replace(self.out / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=30, help="of the whole training, in millions")
    parser.add_argument("--minutes", type=float, default=150, help="to stop after; the next call goes on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.threads:
        torch.set_num_threads(given.threads)
    trainer = Trainer(given.model, given.out, given.seed, given.compile)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{given.model}: {count:,} parameters, on {trainer.device}")
    trainer.run(given.minutes, 1e6 * given.tokens)


if __name__ == "__main__":
    main()
