"""Sizes of kernels that were found by measuring, as JSON files by kind of device and op."""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_tried: ContextVar[Mapping[tuple[str, str], dict[str, Any]] | None] = ContextVar("tried", default=None)


def path(device: str, op: str) -> Path:
    """The file of a kind of device, such as "hopper" or "tpu_v5e", and an op."""
    return Path(__file__).with_name("tuned") / device / f"{op}.json"


def tuned(device: str, op: str) -> dict[str, Any]:
    """What is in the file of a kind of device and an op. Not to be changed.

    Raises:
        NotImplementedError: nothing was measured for it.
    """
    tried = (_tried.get() or {}).get((device, op))
    return _read(path(device, op)) if tried is None else tried


@contextmanager
def trying(device: str, op: str, sizes: dict[str, Any]) -> Iterator[None]:
    """Programs traced inside, on this thread, use these sizes instead of the file's."""
    token = _tried.set({**(_tried.get() or {}), (device, op): sizes})
    try:
        yield
    finally:
        _tried.reset(token)


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise NotImplementedError(f"sizes of {file.stem} for {file.parent.name.replace('_', ' ')} are not known")
    return json.loads(file.read_text())
