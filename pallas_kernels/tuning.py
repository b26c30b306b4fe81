"""Sizes of kernels that were found by measuring, as JSON files by kind of device and op."""

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def tuned(device: str, op: str) -> dict[str, Any]:
    """What is in the file of a kind of device, such as "hopper" or "tpu_v5e", and an op. Not to be changed.

    Raises:
        NotImplementedError: nothing was measured for it.
    """
    file = resources.files("pallas_kernels") / "tuned" / device / f"{op}.json"
    if not file.is_file():
        raise NotImplementedError(f"sizes of {op} for {device.replace('_', ' ')} are not known")
    return json.loads(file.read_text())
