"""A model, loaded: what a program or the command line asks of one, text in and text out.

`load` settles what can fail (file, memory, threads, types) before the first token. All requests, also of several
threads, share one engine, one session and one cache.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import backends
from ..abi import TensorType
from ..errors import Gemma4qError
from ..model import open_model
from ..model.forward import build
from ..plan.batch import Batch
from ..text import chat, normalise, segments
from ..text.options import SamplingOptions
from ..text.penalties import parse_logit_bias
from ..text.sampler import allowed_mask
from ..text.stops import check_stops
from ..text.stream import OutputStream
from ..text.tokenizer import Tokenizer
from .engine import Engine
from .generation import Generation
from .memory import MB, MemoryPlan, available_memory, own_memory, plan_memory
from .prompt import Prompt
from .sequence import Answer, Scoring
from .threads import choose_threads

PAGE_BYTES = 4096
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def load(
    path: str | os.PathLike, backend: str = "auto", isa: str | None = None, threads: int | None = None,
    context: int | None = None, kv: str = "auto", sequences: int = 1,
) -> "Model":  # fmt: skip
    """Opens a GGUF file, checks it and makes it ready.

    backend: auto, native, portable or reference. isa: an instruction set below the best one. threads: None: the cores
    we may use. context: tokens of prompt and answer together; None: 8,192, or 4,096 where memory is short, and no more
    than the model was trained for. kv: the type of keys and values, f32, f16, bf16, q8_0, or q4_0, with which answers
    get visibly worse; auto: F32 for a model of F32, else F16. sequences: how many requests may run at once; each has a
    whole context.
    Raises `Gemma4qError`: a file's faults, `too_big` with what is needed and what is there, `bad_option`, ...
    """
    return Model(path, backend, isa, threads, context, kv, sequences)


class Prepared:
    """A model file that was opened and checked, and what it will take: all of `load` but the loading; see there.

    gguf, config, weights, plan: the file, what it says, its tensors, its forward pass. backend, threads, kv: what was
    chosen. memory: its plan. defaults: the file's sampling options. flavour: which template it was trained with.
    """

    def __init__(self, path, backend="auto", isa=None, threads=None, context=None, kv="auto", sequences=1):
        self.isa = isa
        self.gguf, self.config, self.weights = open_model(path)
        if self.config.target_width:
            fault = (
                "is an assistant: it drafts for another model, whose keys and values it reads, and says nothing alone"
            )
            raise Gemma4qError("bad_arch", f"{self.gguf.path} {fault}")
        self.backend = backends.get(backend)
        self.threads = choose_threads(threads)
        self.kv = kv_type(kv, {name: tensor.type for name, tensor in self.weights.tensors.items()})
        self.tokenizer = Tokenizer.from_gguf(self.gguf)
        self.plan = build(self.config, self.weights.shapes)
        self.defaults = SamplingOptions.from_metadata(self.gguf.metadata)
        parameters = sum(math.prod(tensor.shape) for tensor in self.weights.tensors.values())
        self.flavour = chat.flavour_of(self.gguf.metadata, file_name=self.gguf.path.name, parameters=parameters)
        self.sequences = sequences
        self._before = own_memory(), available_memory(self.threads.count)
        self.memory = self.memory_plan(context)

    def memory_plan(self, context: int | None = None) -> MemoryPlan:
        """What a context would take: entries (name, bytes, mapped, touched); prints as a table."""
        file_bytes = sum(len(file.bytes) for file in self.gguf.files)
        return plan_memory(
            self.config, self.plan, self.weights.tensors, file_bytes, self.backend, self.kv, self.threads.count,
            context or None, self.sequences, *self._before, self.isa,
        )  # fmt: skip


class Model(Prepared):
    """A loaded model; also a context manager. `context` is how many tokens fit, `session` what computes."""

    def __init__(self, path, backend="auto", isa=None, threads=None, context=None, kv="auto", sequences=1):
        super().__init__(path, backend, isa, threads, context, kv, sequences)
        self.memory.check()
        self.context = self.memory.context
        limits = self.memory.limits
        self.session = self.backend.load(self.plan, self.weights.tensors, limits, self.kv, self.threads.count, isa)
        self.session.fetch(self.memory.file_fits)
        batch = Batch(limits, self.plan.width, self.plan.vocab)
        batch.memory[::PAGE_BYTES] |= 0  # touched now, so that memory does not grow later
        window = max(layer.window for layer in self.config.layers)
        self.engine = Engine(self.session, batch, window, self.gguf.changed)

    def tokenize(self, text: str, bos: bool = False, special: bool | None = None) -> list[int]:
        """Ids of `text`. special: None: spelled-out special tokens stay text; True: they become tokens."""
        return self.tokenizer.encode(text, bos, special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as a reader would see it."""
        return self.tokenizer.decode(ids)

    def logits(self, ids: Iterable[int], wanted: Iterable[int] | None = None) -> np.ndarray:
        """Soft-capped logits after each of `ids`, or after the positions `wanted`, ascending: float32 [rows, vocab].

        Raises `too_big` when the result does not fit into memory, `context_length_exceeded`, `bad_token`, ...
        """
        prompt = Prompt(self._checked(ids))
        rows = np.arange(len(prompt)) if wanted is None else np.unique(np.fromiter(wanted, np.int64))
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(prompt):
            raise Gemma4qError("bad_option", f"wanted: positions must be in 0 .. {len(prompt) - 1}")
        need, (have, why) = len(rows) * self.plan.vocab * 4, available_memory()
        if need > have:
            fault = f"logits of {len(rows):,} rows take {need / MB:,.0f} MB, {have / MB:,.0f} MB are there ({why})"
            raise Gemma4qError("too_big", f"{fault}: ask for fewer rows at once")
        scoring = Scoring(prompt, rows, np.empty((len(rows), self.plan.vocab), np.float32))
        if len(rows):
            self.engine.submit(scoring)
            self.engine.finish(scoring)
        return scoring.logits

    def generate(
        self, prompt: str | Iterable[int], *, max_tokens: int | None = None, stop: Iterable[str] = (),
        token_mask: bool = True, special: bool | None = None, **sampling: Any,
    ) -> Generation:  # fmt: skip
        """Continues a text, or ids taken as they are, without a chat template.

        max_tokens: None: until the model ends or the context is full. stop: the answer ends before any of these.
        token_mask: leave out tokens that no answer contains. special: as in `tokenize`. sampling: the fields of
        `text.options.SamplingOptions`; those left out are the file's defaults.
        """
        ids = self.tokenize(prompt, bos=True, special=special) if isinstance(prompt, str) else self._checked(prompt)
        stream = OutputStream(self.tokenizer, stops=check_stops(stop), plain=True)
        return self._start(ids, stream, max_tokens, token_mask, sampling)

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, system: str | None = None, thinking: bool = False,
        tools: Iterable[Mapping[str, Any]] | None = None, max_tokens: int | None = None, stop: Iterable[str] = (),
        token_mask: bool = True, **sampling: Any,
    ) -> Generation:  # fmt: skip
        """Answers a conversation of {role, content} messages. Its pieces are the answer; thoughts are in `events()`.

        What was cached of the conversation is not computed again. Other arguments as for `generate`.
        Raises `bad_message` and `bad_tools` naming the place.
        """
        ids = self.render(messages, system=system, thinking=thinking, tools=tools)
        declared = {tool["function"]["name"]: tool["function"] for tool in normalise.tools(tools)}
        schemas = {name: function.get("parameters") or {} for name, function in declared.items()}
        stream = OutputStream(self.tokenizer, prompt=ids, stops=check_stops(stop), schemas=schemas)
        return self._start(ids, stream, max_tokens, token_mask, sampling)

    def render(self, messages, *, system=None, thinking=False, tools=None) -> list[int]:
        """The prompt of a conversation as ids; text in it never becomes a control token."""
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        turns, declared = normalise.messages(messages), normalise.tools(tools)
        if any(message["role"] == "system" for message in turns[1:]):
            raise Gemma4qError("bad_message", "only the first message may be the system's")
        return segments.encode(chat.render(turns, declared, flavour=self.flavour, thinking=thinking), self.tokenizer)

    def _start(self, ids: list[int], stream: OutputStream, max_tokens, token_mask: bool, sampling: dict) -> Generation:
        if max_tokens in (None, -1):
            max_tokens = self.context
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise Gemma4qError("bad_option", f"max_tokens: must be a positive number or -1, not {max_tokens!r}")
        if sampling.get("logit_bias"):
            sampling["logit_bias"] = parse_logit_bias(sampling["logit_bias"], self.tokenizer)
        options = self.defaults.but(**sampling)
        answer = Answer(Prompt(ids), self.tokenizer, stream, options, max_tokens, self._mask(token_mask))
        self.engine.submit(answer)
        return Generation(self.engine, answer)

    def _mask(self, token_mask: bool) -> np.ndarray | None:
        """Rows of the embedding behind the vocabulary's end are no tokens, masked or not."""
        nameless = range(self.tokenizer.size, self.plan.vocab)
        never = [*nameless, *(self.tokenizer.never if token_mask else ())]
        return allowed_mask(self.plan.vocab, never) if never else None

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = list(map(int, ids))
        bad = next((token for token in ids if not 0 <= token < self.plan.vocab), None)
        if bad is not None:
            raise Gemma4qError("bad_token", f"token {bad} is not in this vocabulary of {self.plan.vocab}")
        return ids

    def close(self) -> None:
        """Ends every request and frees the memory; nothing may be asked after that."""
        self.engine.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kv_type(asked: str, types: Mapping[str, int]) -> TensorType:
    """The type of keys and values: as asked, or by `auto` F32 when the attention's matrices are F32, else F16."""
    if asked == "auto":
        attention = {kind for name, kind in types.items() if name.endswith((".attn_q.weight", ".attn_qkv.weight"))}
        return TensorType.F32 if attention == {TensorType.F32} else TensorType.F16
    if asked not in KV_TYPES:
        raise Gemma4qError("bad_option", f"kv: {asked!r} is unknown: choose auto, {', '.join(KV_TYPES)}")
    return TensorType[asked.upper()]
