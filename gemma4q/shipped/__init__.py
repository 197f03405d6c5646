"""What comes with the package: two small models, trained for this project, and conversations to measure with.

Those of calibration weigh the columns of matrices, those of evaluation judge a quantised model; they share no text.
Owns their names and where they lie; README.md beside them says what they are and what the models can do.
"""

from pathlib import Path

NAMES = ("tiny", "tiny-moe")
DEFAULT = NAMES[0]
CALIBRATION = Path(__file__).parent / "calibration.jsonl"
EVALUATION = Path(__file__).parent / "evaluation.jsonl"


def shipped(name: str) -> Path | None:
    """The file of a shipped model, None where no model has that name."""
    return Path(__file__).parent / f"{name}.gguf" if name in NAMES else None
