"""Host arrays onto their devices."""

import jax
import numpy as np
from jax.sharding import NamedSharding


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put a host array, the same in every process, on the devices of `sharding`.

    Each process sends only the slices of its own devices. On CPU the result may share memory with `value`, so the
    caller must not write to it afterwards.
    """
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
