"""What the Hopper attention kernels share: constants, memory layouts, scores."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ACC = plgpu.WGMMAAccumulatorRef
LOG2E = math.log2(math.e)
NEG = -1e30  # the maximum of nothing; finite, since exp2(NEG - NEG) must not be NaN
WG_ROWS = 64  # rows that one warpgroup multiplies at a time
WG_THREADS = 128
PAGE = 64  # tokens per page that the kernels serve: one TMA box per page and head


def swizzled(row_bytes: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of a 16-bit SMEM matrix that wgmma reads, with the widest swizzle that divides its rows.

    Raises:
        NotImplementedError: no swizzle divides `row_bytes`.
    """
    for swizzle in (128, 64, 32):
        if row_bytes % swizzle == 0:
            tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
            return tiling((8, swizzle // 2)), swizzling(swizzle)  # pyright: ignore[reportAbstractUsage]
    raise NotImplementedError(f"rows of {row_bytes} bytes are not a multiple of 32")


def softmax_step(
    scores: jax.Array, top: jax.Array, total: jax.Array, scale: float, soft_cap: float | None, visible: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One block of the running softmax (Milakov and Gimelshein 2018), base 2.

    `scores[R, C]` are plain products; `top[R]` and `total[R]` the rows' scaled maximum and sum so far. Returns the
    block's weights, the factor by which older sums shrink, and the new `top` and `total`. Without a cap the scale goes
    into the exponent's multiply-add. The tanh instruction is too coarse for the cap: 1 - 2 / (e^2x + 1) is not.
    """
    if soft_cap is None:
        factor = scale * LOG2E
    else:
        power = jnp.exp2(scores * (2 * LOG2E * scale / soft_cap))
        scores, factor = 1 - 2 / (power + 1), soft_cap * LOG2E
    if visible is not None:
        # Not NEG: NEG x factor, rounded, and what the multiply-add below makes of it differ by more than exp2 can take.
        scores = jnp.where(visible, scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * factor - spread(new_top, scores))
    return weights, decay, new_top, total * decay + weights.sum(axis=1)


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """One value per row `[R]` to every column of `like[R, C]`."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def below(values: jax.Array, bounds: jax.Array) -> jax.Array:
    """For each bound, how many of the ascending values are at most it.

    One fused comparison; `jnp.searchsorted` is a loop on the device and a hundred times slower at these sizes.
    """
    return jnp.sum(values[None] <= bounds[:, None], axis=1, dtype=jnp.int32)


def running_sum(values: jax.Array) -> jax.Array:
    """Inclusive running sum of a short array as one fused masked sum; `jnp.cumsum` is several kernels on a GPU."""
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(index[None] <= index[:, None], values[None], 0), axis=1, dtype=jnp.int32)
