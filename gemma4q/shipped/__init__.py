"""What comes with the package to try it with: two small models, trained for this project.

Owns their names and where they lie; README.md beside them says what they are and what they can do.
"""

from pathlib import Path

NAMES = ("tiny", "tiny-moe")
DEFAULT = NAMES[0]


def shipped(name: str) -> Path | None:
    """The file of a shipped model, None where no model has that name."""
    return Path(__file__).parent / f"{name}.gguf" if name in NAMES else None
