"""Products of few rows with a weight matrix for Hopper in Pallas Mosaic GPU: bound by reading the weights.

Persistent CTAs own tiles of 64 outputs. One warpgroup keeps TMA copies of weights coming, through all tiles of its CTA
without a pause, and another multiplies them. Tokens ride along with the weights, from the L2 cache, once for every
tile: that bounds their number. No sum is split over CTAs: 64 of them read as fast as 132 do, as long as each has its
shared memory full of copies in flight, and splits cost more than they gave.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.matmul.hopper import (
    TILE,
    Ring,
    fit_stages,
    ring_scratch,
    stage_features,
    swizzled,
    turned,
    whole_groups,
)
from pallas_kernels.platform import require_hopper
from pallas_kernels.tuning import tuned

Shaped = jax.Array | jax.ShapeDtypeStruct


def matmul(x: Float[Array, "T I"], weights: Float[Array, "O I"], out_dtype: DTypeLike) -> Float[Array, "T O"]:
    """See `pallas_kernels.matmul.matmul`."""
    ctas = require_hopper()
    check(x, weights, out_dtype)
    return call(x, weights, jnp.dtype(out_dtype), ctas)


def check(x: Shaped, weights: Shaped, out_dtype: DTypeLike) -> None:
    """Raise `NotImplementedError`, naming the values, for what the kernel was not measured to do faster than XLA."""
    tokens, (outputs, inputs) = len(x), weights.shape
    if x.dtype != jnp.bfloat16 or weights.dtype != jnp.bfloat16:
        raise NotImplementedError(f"dtypes of x and weights are {x.dtype} and {weights.dtype}, not bfloat16")
    this = {"outputs": outputs, "inputs": inputs, "result": jnp.dtype(out_dtype).name}
    measured = tuned("hopper", "matmul")["faster"]  # tokens with which this was faster than XLA's product on an H100
    if not any(this.items() <= one.items() and tokens in one["tokens"] for one in measured):
        raise NotImplementedError(
            f"not known to be faster for {tokens} tokens, {outputs} x {inputs} weights to {jnp.dtype(out_dtype).name}"
        )


@functools.partial(jax.jit, static_argnames=("out_dtype", "ctas", "interpret"))
def call(
    x: Float[Array, "T I"],
    weights: Float[Array, "O I"],
    out_dtype: jnp.dtype,
    ctas: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T O"]:
    """The kernel on at most `ctas` CTAs, whether or not it is faster than XLA.

    Raises:
        NotImplementedError: it cannot serve these shapes; the message names the values.
    """
    (tokens, inputs), outputs = x.shape, len(weights)
    if outputs % TILE:
        raise NotImplementedError(f"{outputs} outputs are not a multiple of {TILE}")
    rows, tiles = whole_groups(tokens), outputs // TILE
    ctas = min(ctas, tiles)
    longest = 256 if rows <= tuned("hopper", "matmul")["long_stage_tokens"] else 128  # with more, the ring is too short
    step = stage_features(inputs, longest)
    steps = inputs // step

    def load(x_ref: Any, weights_ref: Any, ring: Ring, cta: Any, total: Any) -> None:
        """The TMA warpgroup."""

        def one(i: Any, place: tuple[Any, Any]) -> tuple[Any, Any]:
            tile, k = place
            stage, features = ring.wait_free(i), pl.ds(k * step, step)
            wanted = weights_ref.at[pl.ds(tile * TILE, TILE), features]
            plgpu.copy_gmem_to_smem(wanted, ring.weights.at[stage], ring.full.at[stage])
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(0, rows), features], ring.tokens.at[stage], ring.full.at[stage])
            last = k + 1 == steps
            return jnp.where(last, tile + ctas, tile), jnp.where(last, 0, k + 1)

        lax.fori_loop(0, total, one, (cta, jnp.int32(0)))
        ring.drain(total)

    def compute(out_ref: Any, ring: Ring, out_s: Any, cta: Any, mine: Any) -> None:
        """The other warpgroup."""

        @pl.loop(0, mine)
        def _(r: Any):
            acc = ring.multiply(r * steps, steps)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
            out_s.T[...] = turned(acc.astype(out_dtype))
            plgpu.commit_smem()
            columns = pl.ds((cta + r * ctas) * TILE, TILE)
            plgpu.copy_smem_to_gmem(out_s, out_ref.at[pl.ds(0, rows), columns])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def matmul_stream(x_ref: Any, weights_ref: Any, out_ref: Any, out_s: Any, *ring_refs: Any) -> None:
        ring, cta, wg = Ring(*ring_refs), lax.axis_index("cta"), lax.axis_index("wg")
        mine = lax.div(tiles - cta + ctas - 1, ctas)
        pl.when(wg == 1)(lambda: load(x_ref, weights_ref, ring, cta, mine * steps))
        pl.when(wg == 0)(lambda: compute(out_ref, ring, out_s, cta, mine))

    return plgpu.kernel(
        matmul_stream,
        out_type=jax.ShapeDtypeStruct((tokens, outputs), out_dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((rows, TILE), out_dtype, transforms=swizzled(out_dtype)),
            *ring_scratch(rows, step, fit_stages(rows, step, rows * TILE * out_dtype.itemsize), 2, x.dtype),
        ],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(),
    )(x, weights)
