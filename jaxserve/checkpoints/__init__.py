"""Checkpoints on disk: finding a model, its configs, and its tensors by Hugging Face names."""

from pathlib import Path
from typing import Any

from jaxserve.checkpoints.base import Checkpoint, CheckpointError, read_json
from jaxserve.checkpoints.gguf import GGUFCheckpoint
from jaxserve.checkpoints.gguf_config import read_gguf_config, read_gguf_generation_config
from jaxserve.checkpoints.gguf_file import GGUFFile
from jaxserve.checkpoints.hub import find_default_model, find_model, refusal
from jaxserve.checkpoints.safetensors import SafetensorsCheckpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "GGUFFile",
    "find_default_model",
    "find_model",
    "open_checkpoint",
    "read_generation_config",
    "read_hf_config",
]


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The model's config in Hugging Face's keys, from config.json or made from a GGUF file's metadata.

    Raises:
        CheckpointError: no config.json, or one that cannot be read, or a damaged or unsupported GGUF file.
    """
    path = Path(path)
    if path.is_file():
        return read_gguf_config(GGUFFile(path))
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json; give a Hugging Face model folder or a .gguf file")
    return read_json(path / "config.json")


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The model's default sampling values and end-of-sequence ids in Hugging Face's keys; empty when it has none."""
    path = Path(path)
    if path.is_file():
        return read_gguf_generation_config(GGUFFile(path))
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def open_checkpoint(path: str | Path, load_format: str = "auto") -> Checkpoint:
    """The tensors of a GGUF file or of a folder with safetensors files.

    Args:
        path: as `find_model` returns it.
        load_format: "auto", "safetensors" or "gguf".

    Raises:
        CheckpointError: nothing readable there, only pickles, another format than asked for, or a damaged file.
    """
    path = Path(path)
    found = "gguf" if path.is_file() else "safetensors"
    if load_format not in ("auto", found):
        raise CheckpointError(f"{path} is a {found} model, but load_format={load_format!r} was asked for; use 'auto'")
    if path.is_file():
        return GGUFCheckpoint(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return SafetensorsCheckpoint(path)
    if pickles := sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        raise CheckpointError(refusal(pickles[0]))
    raise CheckpointError(f"{path} has no .safetensors files; download the model again or give a .gguf file")
