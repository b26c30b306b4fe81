"""What every checkpoint reader offers, and the one error they raise."""

import json
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


class CheckpointError(ValueError):
    """A model file is missing, damaged, unsafe or does not fit the model; the message names it and the remedy."""


@runtime_checkable
class Checkpoint(Protocol):
    """Tensors by their Hugging Face names and in Hugging Face's conventions, whatever the file format.

    Linear weights are `[out, in]`; rotary query/key rows are in half-split order; norm weights as transformers
    stores them.
    """

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes in its file (for progress bars)."""
        ...

    def file(self, name: str) -> Path:
        """The file that holds the tensor (for error messages)."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in a host array of its own: float32, float16 or ml_dtypes.bfloat16."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}; download the file again")
    return value


def list_names(names: set[str] | list[str], limit: int = 8) -> str:
    """A sorted list of names for an error message, layer numbers in numeric order, the tail counted."""
    ordered = sorted(names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part)
                                              for part in re.split(r"\.", name)])  # fmt: skip
    tail = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + tail
