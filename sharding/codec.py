"""Plain host objects as bytes and back: msgpack with numpy arrays, and never code.

None, bool, int (64 bits), float, str, bytes, list, dict with str or int keys, and arrays of numbers or booleans.
"""

from typing import Any

import msgpack
import numpy as np

ARRAY = 1  # our msgpack extension: dtype, shape, and the elements in C order
ARRAY_KINDS = "biuf"  # numpy's letters for booleans, integers and floats


class CodecError(ValueError):
    """An object that cannot travel, or bytes that are no object."""


def encode(value: Any) -> bytes:
    """The bytes of a plain object.

    Raises:
        CodecError: it holds something else, such as a tuple or an object of a class.
    """
    try:
        return msgpack.packb(value, default=_pack_array, strict_types=True)  # pyright: ignore[reportReturnType]
    except (TypeError, OverflowError, ValueError) as error:
        raise CodecError(f"this cannot travel between processes: {error}") from error


def decode(data: bytes | memoryview) -> Any:
    """The object of `encode`'s bytes; arrays are read-only views of them.

    Raises:
        CodecError: these bytes are no object.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_unpack_array, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CodecError(f"a message is damaged: {error or type(error).__name__}") from error


def _pack_array(value: object) -> Any:
    if isinstance(value, np.generic) and value.dtype.kind in ARRAY_KINDS:
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in ARRAY_KINDS:
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{kind} is none of None, bool, int, float, str, bytes, list, dict and arrays of numbers")
    head = msgpack.packb([value.dtype.str, list(value.shape)]) or b""
    return msgpack.ExtType(ARRAY, head + value.tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ValueError(f"unknown extension {code}")
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    dtype_name, shape = unpacker.unpack()
    dtype = np.dtype(dtype_name)
    if dtype.kind not in ARRAY_KINDS:
        raise ValueError(f"an array of {dtype}")
    return np.frombuffer(data, dtype, offset=unpacker.tell()).reshape(shape)
