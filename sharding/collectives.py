"""Sums and choices over the devices that share a copy of the model, inside a `shard_map`; elsewhere they do nothing.

So one program text serves a device alone and many: layers say where partial sums must be added up, and whoever works on
a part of the vocabulary asks where that part begins.
"""

import jax
from jax import lax
from jaxtyping import Array, Int, Num

MODEL = "model"


def shards() -> int:
    """The number of devices that share a copy of the model here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[MODEL] if MODEL in mesh.manual_axes else 1


def shard() -> int | Int[Array, ""]:
    """Which of them this is, from 0."""
    return lax.axis_index(MODEL) if shards() > 1 else 0


def total(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """The sum over the shards."""
    return lax.psum(x, MODEL) if shards() > 1 else x


def most(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """The largest over the shards, element by element."""
    return lax.pmax(x, MODEL) if shards() > 1 else x


def gathered(x: Num[Array, "rows _"]) -> Num[Array, "rows _"]:
    """The columns of all shards side by side, on every one of them."""
    return lax.all_gather(x, MODEL, axis=1, tiled=True) if shards() > 1 else x
