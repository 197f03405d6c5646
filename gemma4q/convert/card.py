"""Where a model comes from and may be used for: the `general.*` keys, from its README's head and its directory's name.

Follows llama.cpp's converter key by key, since names and sizes in model lists come from these. Reads the part of YAML
that model cards use: `key: value`, and lists in brackets or one dash a line.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import Gemma4qError
from .files import read_text

LARGEST_CARD = 4 << 20
HUB = "https://huggingface.co/"

# general.* keys that a model card can say outright, by any of these words; the first that is there counts.
SAID = {
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
# general.sampling.* from generation_config.json: key, and the words there.
SAMPLING = {
    "top_k": (int, "top_k"),
    "top_p": (float, "top_p"),
    "min_p": (float, "min_p"),
    "xtc_probability": (float, "xtc_probability"),
    "xtc_threshold": (float, "xtc_threshold"),
    "temp": (float, "temperature"),
    "penalty_last_n": (int, "penalty_last_n"),
    "penalty_repeat": (float, "penalty_repeat", "repetition_penalty"),
}
_SIZE = re.compile(r"((A|\d+x)?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_QUANT = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)


def general_keys(folder: Path, config: dict, parameters: tuple[int, int, int]) -> dict[str, object]:
    """`general.name` and its kin. `parameters`: how many weights in all, of them in experts, and how many experts."""
    card = read_card(folder / "README.md")
    keys: dict[str, object] = {}
    for key, words in SAID.items():
        value = next((card[word] for word in words if isinstance(card.get(word), str)), None)
        keys |= {key: value} if value else {}
    name = next((card[word] for word in ("name", "model_name") if isinstance(card.get(word), str)), None)
    called, own = config.get("_name_or_path"), Path(os.path.abspath(folder)).name
    ids = [called] if isinstance(called, str) and called and called.count("/") <= 1 else []
    for parts in (name_parts(text, parameters[0]) for text in (*ids, own)):
        name = name or (title(parts["name"]) if "name" in parts else None)
        keys = {k: v for k, v in parts.items() if k != "name"} | keys
    keys.setdefault("size_label", size_label(*parameters))
    keys["name"] = name or own
    keys |= _sources("base_model", listed(card, "base_model", "base_models"), parameters[0])
    keys |= _sources("dataset", listed(card, "datasets", "dataset"), parameters[0])
    for key, words in {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}.items():
        keys |= {key: found} if (found := [item for word in words for item in listed(card, word)]) else {}
    return {f"general.{key}": value for key, value in keys.items()}


def sampling_keys(generation: dict) -> dict[str, object]:
    """`general.sampling.*`: what the model's makers recommend. Raises bad_config."""
    found = {}
    for key, (kind, *words) in SAMPLING.items():
        value = next((generation[word] for word in words if generation.get(word) is not None), None)
        if value is not None:
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1 << 31:
                raise Gemma4qError("bad_config", f"generation_config.json: {words[0]} is {value!r:.40}; want a number")
            found[f"general.sampling.{key}"] = kind(value)
    return found


def read_card(path: Path) -> dict[str, str | list[str]]:
    """The head of a model card, between two lines of dashes; empty where there is none."""
    if not path.exists():
        return {}
    lines = read_text(path, LARGEST_CARD).splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    card: dict[str, str | list[str]] = {}
    key = ""
    for line in lines[1 : lines.index("---", 1)]:
        if item := re.fullmatch(r"\s*-\s+(.+?)\s*", line):
            if isinstance(card.get(key), list):
                card[key].append(_plain(item[1]))
        elif pair := re.fullmatch(r"(\w+):\s*(.*?)\s*", line):
            key, value = pair[1], re.sub(r"(^|\s+)#.*", "", pair[2])
            if value.startswith("[") and value.endswith("]"):
                card[key] = [_plain(part) for part in value[1:-1].split(",") if part.strip()]
            else:
                card[key] = _plain(value) if value else []
    return card


def _plain(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def listed(card: dict, *words: str) -> list[str]:
    """A card's entry under the first of `words` that it has, as a list."""
    value = next((card[word] for word in words if word in card), [])
    return [value] if isinstance(value, str) else list(value)


def _sources(kind: str, ids: Sequence[str], parameters: int) -> dict[str, object]:
    """`base_model.*` or `dataset.*`: what this was made from."""
    keys: dict[str, object] = {f"{kind}.count": len(ids)} if ids else {}
    for i, id in enumerate(ids):
        local = id.removeprefix(HUB)
        is_url = id.startswith(("http://", "https://", "ssh://"))
        if is_url:
            keys[f"{kind}.{i}.repo_url"] = id
            if local == id or local.count("/") != 1:
                continue
        parts = name_parts(local, parameters)
        keys |= {f"{kind}.{i}.name": title(parts["name"])} if "name" in parts else {}
        keys |= {f"{kind}.{i}.version": parts["version"]} if "version" in parts else {}
        if "organization" in parts:
            keys[f"{kind}.{i}.organization"] = title(parts["organization"])
            keys.setdefault(f"{kind}.{i}.repo_url", HUB + local)
    return keys


def title(text: str) -> str:
    """`gemma-4-E2B-it` as `Gemma 4 E2B It`."""
    words = text.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not re.match(r"^(v\d+(?:\.\d+)*|\d.*)$", w) else w for w in words)


def name_parts(id: str, parameters: int) -> dict[str, str]:
    """What a name like `google/gemma-4-26B-A4B-it` says: organization, name, basename, size_label, finetune."""
    if " " in id:
        return {"name": id}
    organization, _, full = id.rpartition("/")
    words = [_sort(i, word, parameters) for i, word in enumerate(filter(None, full.split("-")))]
    if any(sort == "size_label" and any(c.isdecimal() for c in word) for sort, word in words):
        words = [("other" if sort == "size_label" and word.isalpha() else sort, word) for sort, word in words]
    start = next((i for i, (sort, _) in enumerate(words) if sort not in ("version", "word")), len(words))
    base = start
    if start == len(words):  # a version that ends the whole name is no part of the base name
        while base and words[base - 1][0] == "version":
            base -= 1
    parts = {
        "basename": [word for _, word in words[:base]],
        "size_label": list(dict.fromkeys(word for sort, word in words if sort == "size_label")),
        "finetune": [w for i, (sort, w) in enumerate(words) if sort == "finetune" or (sort == "word" and i >= start)],
        "version": [word for sort, word in words[base:] if sort == "version"],
    }
    if not (parts["size_label"] or parts["finetune"] or parts["version"]):
        parts["basename"] = []  # one word alone could mean anything
    own = {"name": full} | ({"organization": organization} if organization and organization[0] != "." else {})
    return own | {key: "-".join(found) for key, found in parts.items() if found}


def _sort(i: int, word: str, parameters: int) -> tuple[str, str]:
    """What a word of a name says, `word` where its place decides; and how it is spelt."""
    if _VERSION.fullmatch(word):
        return "version", word
    if _QUANT.fullmatch(word):
        return "type", word.upper()
    if i and _SIZE.fullmatch(word):
        word = word.replace("_", ".")
        if word[-1] in "kmbt" and word[-2].isdecimal():
            word = word[:-1] + word[-1].upper()
        try:
            claimed = float(word[:-1]) * 1000 ** " KMBT".find(word[-1])
        except ValueError:
            return "size_label", word
        if abs(claimed - parameters) <= 7 * parameters // 8:
            return "size_label", word
        return "finetune", word[:-1] + word[-1].lower()  # a length of context, likely
    if i and _FINETUNE.fullmatch(word):
        return "finetune", word
    return ("word" if word[0].isalpha() else "finetune"), word


def size_label(parameters: int, in_experts: int, experts: int) -> str:
    """`4.6B`, or `128x1.2B` for a mixture of experts: how big, in two digits at least."""
    if experts:
        return f"{experts}x{_rounded(parameters - in_experts + in_experts // experts)}"
    return _rounded(parameters)


def _rounded(count: int) -> str:
    scale, suffix = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count > s), (1e3, "K"))
    value = count / scale
    digits = max(2 - len(str(round(value)).lstrip("0")), 0)
    return f"{value:.{digits}f}{suffix}"


def file_name(keys: dict[str, object], outtype: str, mmproj: bool) -> str:
    """What llama.cpp would call the output: `gemma-4-26B-A4B-it-BF16.gguf`."""
    parts = [keys.get("general.basename") or keys["general.name"], None if mmproj else keys.get("general.size_label")]
    parts += [keys.get("general.finetune"), keys.get("general.version"), outtype.upper()]
    name = "-".join(str(part).strip().replace(" ", "-").replace("/", "-") for part in parts if part)
    return ("mmproj-" if mmproj else "") + "".join(filter(str.isprintable, name)) + ".gguf"
