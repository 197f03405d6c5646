"""gemma4q: Google's Gemma 4 on your own machine. `load` a GGUF file, then `chat`, `generate` or ask for `logits`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.model import Model, load
    from .errors import Gemma4qError

__all__ = ["Gemma4qError", "Model", "__version__", "load"]

_HOMES = {"load": "engine.model", "Model": "engine.model", "Gemma4qError": "errors"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import gemma4q` costs nothing."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("gemma4q")
    if name not in _HOMES:
        raise AttributeError(f"module 'gemma4q' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
