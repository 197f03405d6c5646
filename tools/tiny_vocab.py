"""The tiny models' vocabulary: pieces that sentencepiece learns from their own texts, in Gemma 4's arrangement.

1,024 tokens: Gemma's special tokens and 256 byte tokens where small_vocab.py puts them, every digit by itself, all of
printable ASCII, the newline and the space, then what is frequent. A word has the same pieces with a space before it and
without, so that a name is copied piece by piece from a sentence into a call; only words that are never copied come with
their space. Owns tokenizer.json; merges are read off the pieces: every way to put one together from two earlier ones.
"""

import io
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import sentencepiece
import tiny_words
from small_vocab import FIRST_BYTE, FIXED, MEDIA
from tiny_tasks import TASKS, draw

from gemma4q.text.segments import split_controls

SIZE = 1024
SAMPLES = 6000  # texts to learn from
SPACE = "\u2581"
SPACED = 80  # words that come with their space
ASCII = "".join(map(chr, range(33, 127)))


def corpus(count: int = SAMPLES, seed: int = 0) -> list[str]:
    """The training texts without control tokens."""
    r, out = Random(seed), []
    for i in range(count):
        example = draw(r, list(TASKS)[i % len(TASKS)])
        out += [s.text for s in split_controls(example.prompt() + example.turn()) if not s.control]
    return out


def learned(texts: list[str], count: int) -> list[str]:
    """`count` pieces of words, the likeliest to be merged first; single letters are among them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(word for text in texts for word in text.split()), model_writer=model, model_type="bpe",
        vocab_size=count + 3, normalization_rule_name="identity", add_dummy_prefix=False, split_digits=True,
        required_chars=ASCII, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = [processor.id_to_piece(i) for i in range(3, processor.vocab_size())]  # after <unk>, <s>, </s>
    return [piece for piece in found if SPACE not in piece]


def spaced(texts: list[str], pieces: list[str]) -> list[str]:
    """Words that are one piece, often follow a space and are in no list of words to choose from: with the space."""
    listed = {word for value in vars(tiny_words).values() if isinstance(value, list) for word in value}
    follow = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]{2,}", text))
    frequent = [w for w, _ in follow.most_common() if w in set(pieces) - listed]
    return [SPACE + word for word in frequent[:SPACED]]


def pieces(count: int) -> list[str]:
    texts = corpus()
    words = learned(texts, count - SPACED - 1)
    missing = count - SPACED - 1 - len(words)
    words = learned(texts, count - SPACED - 1 + missing) if missing else words
    return [SPACE, *words, *spaced(texts, words)]


def merges(ordered: list[str]) -> list[tuple[str, str]]:
    """How pieces come about, in the order in which the pieces were learned."""
    rank = {piece: i for i, piece in enumerate(ordered)}
    out = []
    for piece in ordered:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        out += sorted((s for s in splits if s[0] in rank and s[1] in rank), key=lambda s: (rank[s[0]], rank[s[1]]))
    return out


def tokenizer() -> dict:
    """tokenizer.json."""
    tokens = dict(FIXED) | {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    gaps = [id for id in range(SIZE) if id not in tokens]
    found = pieces(len(gaps) - len(MEDIA) - 1)
    tokens |= dict(zip(gaps, [*MEDIA, "\n", *found], strict=True))
    special = sorted(id for id, token in tokens.items() if id in FIXED or token in MEDIA)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": tokens[id], **flags} for id in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {tokens[id]: id for id in range(SIZE)}, "merges": [list(pair) for pair in merges(found)],
        },
    }  # fmt: skip


def save(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False, indent=1))
    names = {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "mask": 4}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    config |= {f"{name}_token": FIXED[id] for name, id in names.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
