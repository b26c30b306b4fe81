"""What the Hopper kernels that stream weights share: a ring of tiles that TMA fills and a warpgroup multiplies.

64 outputs' weights are the left operand of a wgmma and the tokens its right one, so few tokens cost little of the
tensor cores. A stage of the ring holds some features of both. Memory is read best in long pieces of each row: with
stages of 64, 128 and 256 features a product of [24576, 4096] weights and 32 tokens took 77, 72 and 70 us on an H100.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike

TILE = 64  # outputs of a wgmma
SMEM_BYTES = 230_400  # of the 232,448 that a CTA may have; barriers and alignment need some
MAX_STAGES = 16
MIN_STAGES = 2


class Ring(NamedTuple):
    """References of the ring: `[stages, ...]` tiles of weights and tokens, and the barriers of each stage."""

    weights: Any
    tokens: Any
    full: Any
    free: Any

    @property
    def stages(self) -> int:
        return self.weights.shape[0]

    def wait_free(self, i: Any) -> Any:
        """The stage of the i-th load, when nobody reads it any more."""
        stage = lax.rem(i, self.stages)

        @pl.when(i >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[stage])

        return stage

    def drain(self, total: Any) -> None:
        """After all loads, so that every barrier ends in a completed phase."""

        @pl.loop(jnp.maximum(total - self.stages, 0), total)
        def _(i: Any):
            plgpu.barrier_wait(self.free.at[lax.rem(i, self.stages)])

    def multiply(self, first: Any, count: Any) -> Any:
        """Float32 `[TILE, tokens]`: the sum of the products of `count` stages from the `first` load on."""
        shape = TILE, self.tokens.shape[1]

        def product(acc: Any) -> Any:
            @pl.loop(0, count)
            def _(k: Any):
                stage = lax.rem(first + k, self.stages)
                plgpu.barrier_wait(self.full.at[stage])
                plgpu.wgmma(acc, self.weights.at[stage], self.tokens.at[stage].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.free.at[stage])

            return acc[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def ring_scratch(tokens: int, features: int, stages: int, copies: int, dtype: DTypeLike) -> list[Any]:
    """Shared memory and barriers of a `Ring`, of which each stage is filled by `copies` copies."""
    return [
        plgpu.SMEM((stages, TILE, features), dtype, transforms=swizzled(dtype)),
        plgpu.SMEM((stages, tokens, features), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        plgpu.Barrier(num_barriers=stages),
    ]


def fit_stages(tokens: int, features: int, other_bytes: int) -> int:
    """Stages of 16-bit tiles for which there is room beside other buffers.

    Raises:
        NotImplementedError: too few.
    """
    stages = min((SMEM_BYTES - other_bytes) // ((TILE + tokens) * features * 2), MAX_STAGES)
    if stages < MIN_STAGES:
        raise NotImplementedError(f"{tokens} tokens leave room for {stages} stages of {features} features")
    return stages


def stage_features(features: int, longest: int) -> int:
    """Features of a stage: as many as divide all, up to `longest`.

    Raises:
        NotImplementedError: `features` are not a multiple of 64.
    """
    for step in (256, 128, 64):
        if step <= longest and features % step == 0:
            return step
    raise NotImplementedError(f"{features} features are not a multiple of 64")


def swizzled(dtype: DTypeLike, row: int | None = None) -> tuple[Any, Any]:
    """Transforms of an SMEM matrix that wgmma reads or registers are stored to; rows may be shorter than 128 bytes."""
    size = jnp.dtype(dtype).itemsize
    width = next(w for w in (128, 64, 32) if row is None or row * size % w == 0)
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, width // size)), swizzling(width)  # pyright: ignore[reportAbstractUsage]


def whole_groups(tokens: int) -> int:
    """Tokens rounded up to what wgmma takes; TMA fills rows past the end with zeros and stores none of them."""
    return -(-tokens // 8) * 8


def turned(acc: Array) -> Array:
    """A wgmma's result in the layout in which it can be stored to a transposed reference."""
    return plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
