"""llama.cpp's part of tools/accuracy.py, for an interpreter that has llama-cpp-python; of gemma4q it needs nothing.

    python llama_logits.py MODEL.gguf TEXTS.json OUT.npz     its logits of texts, lists of token ids, on the CPU

OUT.npz holds, over the rows of all texts, `prompt-f32` (each text one batch; keys, values and attention in F32),
`prompt-f16`, `generated-f32` (token by token), `generated-f16`: float32 [rows, vocab]; with `.experts` behind these
names what each row's layers chose: int32 [rows, layers * used], no columns where a model has no experts; and `about`.
"""

import sys

import llama_cpp as llama
import numpy as np
from llama_ggml import Reader, libggml, opened, texts_of, values

# ggml_type, llama_flash_attn_type: flash attention reads keys and values as F16 whatever they are kept as, as
# build_attn_mha of llama-graph.cpp has it, so F32 is had without it; F16 is as llama.cpp runs unless told otherwise.
KV = {"f32": (0, 0), "f16": (1, -1)}
CHOICE = b"ffn_moe_topk"  # what llama-graph.cpp calls the experts chosen: [rows, used] of a wider matrix


class Run(Reader):
    """What comes of texts of up to `most` tokens, one after the other."""

    def __init__(self, model, kv: str, most: int):
        super().__init__(model, most, self.look, *KV[kv])
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.choices: list[np.ndarray] = []

    def look(self, tensor: int, ask: bool) -> bool:
        """Keeps experts, int32 [rows, used], in ascending order."""
        chosen = libggml.ggml_get_name(tensor).startswith(CHOICE)
        if chosen and not ask:
            self.choices.append(np.sort(values(tensor, np.int32)[0], axis=1))
        return chosen or not ask

    def step(self, ids: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [rows, vocab] and experts chosen [rows, layers * used] of the next tokens."""
        self.choices.clear()
        self.read(ids, start)
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(ids), self.vocab)).copy()
        return logits, np.concatenate([np.zeros((len(ids), 0), np.int32), *self.choices], axis=1)

    def text(self, ids: list[int], together: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        self.forget()
        if together:
            return [self.step(ids, 0)]
        return [self.step(ids[i : i + 1], i) for i in range(len(ids))]


def run(path: str, texts: str, out: str) -> None:
    model, texts = opened(path), texts_of(texts)
    found = {"about": f"llama-cpp-python {llama.__version__}: {llama.llama_print_system_info().decode()}"}
    for kv in KV:
        context = Run(model, kv, max(map(len, texts)))
        for name, together in (("prompt", True), ("generated", False)):
            parts = [part for ids in texts for part in context.text(ids, together)]
            for key, rows in zip((f"{name}-{kv}", f"{name}-{kv}.experts"), zip(*parts, strict=True), strict=True):
                found[key] = np.concatenate(rows)
    np.savez(out, **found)


if __name__ == "__main__":
    run(*sys.argv[1:])
