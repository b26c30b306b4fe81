"""What the Hopper kernels for a lone token share: its products, each thread's share of which is summed as it stands.

Rows of weights are dealt out to the warps of all CTAs, and all that a CTA needs is on its way to shared memory from the
start, in pieces of 256 features. A warp reads a piece of a row without bank conflicts, 16 bytes a thread.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

GROUPS = 2  # warpgroups of a CTA
WARPS = 4  # of a warpgroup
PIECE = 256  # features: 16 bytes a thread, and the most that a TMA copy takes of a row
SMEM_BYTES = 227 * 1024 - 4096  # of a CTA; barriers and alignment need some

# [rows, PIECE] in registers: a row in each warp, eight consecutive features in a thread.
MATRIX = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, PIECE), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
VECTOR = MATRIX.reduce(0)  # [PIECE], the same in each warp
SUMS = MATRIX.reduce(1)  # [rows], the same in each thread of a warp


def most_ctas(multiprocessors: int, *rows: int) -> int:
    """How many CTAs can take whole shares of so many rows each.

    Raises:
        NotImplementedError: none, without a warp that idles.
    """
    whole = [n for n in range(1, multiprocessors + 1) if all(count % (n * GROUPS * WARPS) == 0 for count in rows)]
    if not whole:
        raise NotImplementedError(f"{rows} outputs, not all of which are multiples of {GROUPS * WARPS}")
    return whole[-1]


def pieces(features: int) -> int:
    """Of a row.

    Raises:
        NotImplementedError: there is no whole number.
    """
    if features % PIECE:
        raise NotImplementedError(f"{features} features, not a multiple of {PIECE}")
    return features // PIECE


def load_vector(ref: Any, k: int) -> Array:
    """The k-th piece of a vector, as float32."""
    return plgpu.load(ref.at[pl.ds(k * PIECE, PIECE)], layout=VECTOR, optimized=False).astype(jnp.float32)


def load_vectors(ref: Any) -> list[Array]:
    """All pieces of a vector, as float32."""
    return [load_vector(ref, k) for k in range(pieces(ref.shape[0]))]


def copy_rows(matrix: Any, rows: Any, target: Any, barrier: Any) -> None:
    """Bring rows of a matrix to shared memory, `[pieces, rows, ..., PIECE]`; a piece is an arrival at the barrier."""
    for k in range(target.shape[0]):
        middle = (slice(None),) * (len(target.shape) - 3)
        plgpu.copy_gmem_to_smem(matrix.at[rows, *middle, pl.ds(k * PIECE, PIECE)], target.at[k], barrier)


def dot(piece: Callable[[int], Any], vectors: Sequence[Array]) -> Array:
    """The products, `SUMS`, of the rows in shared memory whose k-th pieces are `piece(k)` with a vector."""

    def part(k: int) -> Array:
        weights = plgpu.load(piece(k), layout=MATRIX, optimized=False).astype(jnp.float32)
        return weights * plgpu.layout_cast(lax.broadcast_in_dim(vectors[k], weights.shape, (1,)), MATRIX)

    return jnp.sum(sum((part(k) for k in range(1, len(vectors))), part(0)), axis=1)


def norm(vectors: Sequence[Array], scale: Any, eps: float, spare_s: Any) -> list[Array]:
    """The root-mean-square norm of a vector in pieces, rounded to bfloat16; `spare_s` is shared memory for a number.

    Every warpgroup needs its own. `scale` is in global memory.
    """
    squares = sum((vector * vector for vector in vectors[1:]), vectors[0] * vectors[0])
    spread = plgpu.layout_cast(lax.broadcast_in_dim(squares, (WARPS, PIECE), (1,)), MATRIX)
    spare_s[...] = lax.rsqrt(jnp.sum(spread, axis=1) / (len(vectors) * PIECE) + eps)
    plgpu.commit_smem()
    inverse = spare_s[0]
    normed = [vector * inverse * load_vector(scale, k) for k, vector in enumerate(vectors)]
    return [vector.astype(jnp.bfloat16).astype(jnp.float32) for vector in normed]
