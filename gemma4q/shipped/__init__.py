"""What comes with the package to try it with: a small model, trained for this project.

Owns its name and where it lies; README.md beside it says what it is and what it can do.
"""

from pathlib import Path

NAMES = ("tiny",)
DEFAULT = NAMES[0]


def shipped(name: str) -> Path | None:
    """The file of a shipped model, None where no model has that name."""
    return Path(__file__).parent / f"{name}.gguf" if name in NAMES else None
