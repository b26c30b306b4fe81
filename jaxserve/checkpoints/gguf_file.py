"""The GGUF container: metadata and where each tensor's bytes lie.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is parsed here, since the
`gguf` package's reader builds a numpy view for every element of every array (seconds for one vocabulary) and trusts
the lengths in the file; the quantised blocks themselves are decoded by that package.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import constants, quants
from gguf.constants import GGMLQuantizationType, GGUFValueType
from ml_dtypes import bfloat16

from jaxserve.checkpoints.base import CheckpointError

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(bfloat16),
}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ELEMENTS_AT_ONCE = 1 << 16  # decoded together: the temporaries stay in the processor's cache


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file: `shape` is slowest axis first, `offset` counts from the start of the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Cursor:
    """Reads little-endian GGUF values one after the other, never past the end of the file."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.offset = 0

    def unpack(self, code: str, count: int = 1) -> Sequence[Any]:
        """`count` scalars of one struct type code."""
        layout = f"<{count}{code}"
        end = self.offset + struct.calcsize(layout)
        if end > len(self.data):
            raise EOFError
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset = end
        return values

    def string(self) -> str:
        """A length-prefixed UTF-8 string (token pieces may hold stray bytes: replaced)."""
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings; a loop of its own, since vocabularies hold hundreds of thousands."""
        data, offset, end, lengths = self.data, self.offset, len(self.data), struct.Struct("<Q")
        texts = []
        for _ in range(count):
            start = offset + lengths.size
            if start > end:
                raise EOFError
            offset = start + lengths.unpack_from(data, offset)[0]
            if offset > end:
                raise EOFError
            texts.append(str(data[start:offset], "utf-8", "replace"))
        self.offset = offset
        return texts

    def value(self, kind: int) -> Any:
        """One metadata value of any type; arrays become lists."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item, count = self.unpack("I")[0], self.unpack("Q")[0]
            if count > len(self.data):  # every element takes a byte or more
                raise EOFError
            if item in SCALARS:
                return list(self.unpack(SCALARS[GGUFValueType(item)], count))
            if item == GGUFValueType.STRING:
                return self.strings(count)
            return [self.value(item) for _ in range(count)]
        return self.unpack(SCALARS[GGUFValueType(kind)])[0]


class GGUFFile:
    """A GGUF file opened for reading.

    Attributes:
        metadata: every key and its value (numbers, strings, lists).
        tensors: name -> `TensorInfo`, in file order.

    Raises:
        CheckpointError: not a GGUF file, a version other than 2 or 3, cut short, or malformed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.stat().st_size == 0:
            raise CheckpointError(f"{self.path} is empty; download the file again")
        self._data = np.memmap(self.path, mode="r", dtype=np.uint8)
        cursor = Cursor(memoryview(self._data))
        try:
            self.metadata, infos = _read_header(cursor, self.path)
        except EOFError:
            size = len(self._data)
            raise CheckpointError(
                f"{self.path} ends inside its header ({size:,} bytes); the file is cut short, download it again"
            ) from None
        except (ValueError, KeyError, struct.error, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} has a malformed GGUF header ({error}); download it again") from error
        self.tensors = self._locate(infos, cursor.offset)

    def _locate(self, infos: list[tuple[str, tuple[int, ...], int, int]], header_end: int) -> dict[str, TensorInfo]:
        """Turn the header's tensor entries into checked byte ranges."""
        alignment = self.metadata.get("general.alignment", constants.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{self.path} has general.alignment={alignment!r}, which must be positive")
        start = -(-header_end // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, code, offset in infos:
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise CheckpointError(f"{self.path}: tensor {name} has the unknown type number {code}") from None
            block, size = constants.GGML_QUANT_SIZES[kind]
            if name in tensors or not shape or shape[-1] % block:
                raise CheckpointError(f"{self.path}: tensor {name} {list(shape)} ({kind.name}) is malformed or twice")
            nbytes = math.prod(shape) // block * size
            end = start + offset + nbytes
            if end > len(self._data):
                raise CheckpointError(
                    f"{self.path} is cut short: tensor {name} {list(shape)} ({kind.name}) ends at byte {end:,} "
                    f"but the file has {len(self._data):,}; download it again"
                )
            tensors[name] = TensorInfo(kind, shape, start + offset, nbytes)
        return tensors

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in a new array of its shape: float32 when quantised, else as stored.

        Raises:
            CheckpointError: a tensor type that is not supported.
        """
        info = self.tensors[name]
        raw = self._data[info.offset : info.offset + info.nbytes]
        if info.type in PLAIN:
            return np.array(raw).view(PLAIN[info.type]).reshape(info.shape)
        if info.type.name not in QUANTISED:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {info.type.name}; supported are F32, F16, BF16, "
                f"{', '.join(QUANTISED)}: use a file quantised to one of them"
            )
        return dequantise(raw, info.type).reshape(info.shape)


def _read_header(cursor: Cursor, path: Path) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """The metadata and the `(name, shape, type number, offset)` of every tensor."""
    magic, version = cursor.unpack("I", 2)
    if magic != constants.GGUF_MAGIC:
        found = bytes(cursor.data[:4])
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {found!r} instead of b'GGUF'")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) are supported")
    num_tensors, num_keys = cursor.unpack("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    infos = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = cursor.unpack("Q", cursor.unpack("I")[0])[::-1]  # the file stores the fastest axis first
        kind, offset = cursor.unpack("I")[0], cursor.unpack("Q")[0]
        infos.append((name, tuple(shape), kind, offset))
    return metadata, infos


def dequantise(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Decode quantised blocks, uint8 `[nbytes]`, to float32 `[values]`."""
    block, size = constants.GGML_QUANT_SIZES[kind]
    decode = getattr(quants, kind.name).dequantize_blocks
    blocks = raw.view(np.ndarray).reshape(-1, size)
    values = np.empty((len(blocks), block), np.float32)
    step = ELEMENTS_AT_ONCE // block
    for start in range(0, len(blocks), step):
        values[start : start + step] = decode(blocks[start : start + step])
    return values.reshape(-1)
