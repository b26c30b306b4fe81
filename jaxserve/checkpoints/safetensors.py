"""Safetensors checkpoints: one file, or several with an index."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to return it
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.checkpoints.base import CheckpointError, list_names, read_json

INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16", "F64")


class SafetensorsCheckpoint:
    """The tensors of the safetensors files in a folder; every file stays memory-mapped, tensors are copied one by one.

    Raises:
        CheckpointError: a shard is missing, damaged, outside the folder, or disagrees with the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = _read_index(folder)
        files = sorted(set(listed.values())) if listed else _find_files(folder)
        self._files = {name: _open(folder / name) for name in files}
        self._where: dict[str, str] = {}
        for file, handle in self._files.items():
            for tensor in list(handle.keys()):
                if tensor in self._where:
                    raise CheckpointError(
                        f"tensor {tensor} is both in {folder / self._where[tensor]} and in {folder / file}; "
                        "remove the files that do not belong to the checkpoint"
                    )
                self._where[tensor] = file
        if absent := {name for name, file in listed.items() if self._where.get(name) != file}:
            raise CheckpointError(
                f"{folder / INDEX} lists tensors that its files lack: {list_names(absent)}; download the model again"
            )

    def names(self) -> set[str]:
        return set(self._where)

    def file(self, name: str) -> Path:
        return self.folder / self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The stored dtype in safetensors' spelling, such as "BF16"."""
        return self._slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        bits = re.search(r"\d+", self.dtype(name))
        return int(np.prod(self.shape(name), dtype=np.int64)) * (int(bits[0]) if bits else 8) // 8

    def read(self, name: str) -> np.ndarray:
        if (dtype := self.dtype(name)) not in DTYPES:
            raise CheckpointError(
                f"{self.file(name)}: tensor {name} {list(self.shape(name))} is stored as {dtype}; supported are "
                f"{', '.join(DTYPES)}: use a checkpoint that is not quantised"
            )
        try:
            return self._files[self._where[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file(name)}: tensor {name} cannot be read ({error})") from error

    def _slice(self, name: str):
        return self._files[self._where[name]].get_slice(name)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty without an index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names; download it again")
    files = set(listed.values())
    if unsafe := {file for file in files if not _is_inside(file)}:
        raise CheckpointError(f"{path} names files outside its folder, which is refused: {list_names(unsafe)}")
    if absent := {file for file in files if not (folder / file).exists()}:
        raise CheckpointError(f"{folder} lacks {list_names(absent)}, which {INDEX} names; download the model again")
    return listed


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _find_files(folder: Path) -> Iterable[str]:
    """The files of a folder without an index: `model*.safetensors` if there are any, else all."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return [file for file in files if file.startswith("model")] or files


def _open(path: Path):
    """The memory-mapped file, its header checked (size, JSON, ranges that cover the file exactly)."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}; it has {path.stat().st_size:,} bytes); "
            "download it again"
        ) from error
