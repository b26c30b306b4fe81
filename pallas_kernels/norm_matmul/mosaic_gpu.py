"""Norm and product of a lone token and a small matrix for Hopper in Pallas Mosaic GPU.

XLA takes three kernels, two of them for the norm. Here every CTA norms the token for itself while its rows of the
weights are on their way to shared memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.matmul.lone import (
    GROUPS,
    PIECE,
    SMEM_BYTES,
    WARPS,
    copy_rows,
    dot,
    load_vectors,
    most_ctas,
    norm,
    pieces,
)
from pallas_kernels.platform import require_hopper
from pallas_kernels.tuning import tuned

Shaped = jax.Array | jax.ShapeDtypeStruct


def norm_matmul(
    x: Float[Array, "T D"],
    scale: Float[Array, "D"],
    weights: Float[Array, "*outputs D"],
    product: Callable[[Array, Array], Array],
    *,
    norm_eps: float,
    norm_offset: float = 0.0,
) -> Float[Array, "T *outputs"]:
    """See `pallas_kernels.norm_matmul.norm_matmul`."""
    del product  # there is none outside the kernel
    multiprocessors = require_hopper()
    check(x, scale, weights, norm_offset)
    rows = weights.reshape(-1, weights.shape[-1])
    flat = call(x, scale, rows, norm_eps=norm_eps, multiprocessors=multiprocessors)
    return flat.reshape(1, *weights.shape[:-1])


def check(x: Shaped, scale: Shaped, weights: Shaped, norm_offset: float) -> None:
    """Raise `NotImplementedError`, naming the values, for what the kernel was not measured to do faster than XLA."""
    (tokens, inputs), outputs = x.shape, math.prod(weights.shape[:-1])
    dtypes = {str(array.dtype) for array in (x, scale, weights)}
    if dtypes != {"bfloat16"}:
        raise NotImplementedError(f"dtypes are {sorted(dtypes)}, not bfloat16")
    if norm_offset:
        raise NotImplementedError(f"{norm_offset=}, not 0")
    this = {"outputs": outputs, "inputs": inputs}
    measured = tuned("hopper", "norm_matmul")["faster"]  # tokens with which this was faster than XLA on an H100
    if not any(this.items() <= one.items() and tokens in one["tokens"] for one in measured):
        raise NotImplementedError(f"not known to be faster for {tokens} tokens and {outputs} x {inputs} weights")


@functools.partial(jax.jit, static_argnames=("norm_eps", "multiprocessors", "interpret"))
def call(
    x: Float[Array, "T D"],
    scale: Float[Array, "D"],
    weights: Float[Array, "O D"],
    *,
    norm_eps: float,
    multiprocessors: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T O"]:
    """The kernel for a lone token, whether or not it is faster than XLA.

    Raises:
        NotImplementedError: it cannot serve these shapes; the message names the values.
    """
    if len(x) > 1:
        raise NotImplementedError(f"{len(x)} tokens, not one")
    outputs, inputs = weights.shape
    ctas = most_ctas(multiprocessors, outputs)
    rows = outputs // ctas
    if rows * inputs * 2 > SMEM_BYTES:
        raise NotImplementedError(f"{rows * inputs * 2} bytes of weights for each of {ctas} CTAs, not {SMEM_BYTES}")

    def norm_matmul_lone(x_ref: Any, scale_ref: Any, weights_ref: Any, out: Any, weights_s: Any, *others: Any) -> None:
        spare_s, came = others
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        mine = pl.ds(wg * (rows // GROUPS), rows // GROUPS)
        pl.when(wg == 0)(lambda: copy_rows(weights_ref, pl.ds(cta * rows, rows), weights_s, came))
        normed = norm(load_vectors(x_ref), scale_ref, norm_eps, spare_s.at[wg])
        plgpu.barrier_wait(came)
        sums = dot(lambda k: weights_s.at[k, mine], normed)
        out[pl.ds(cta * rows + wg * (rows // GROUPS), rows // GROUPS)] = sums.astype(x.dtype)

    return plgpu.kernel(
        norm_matmul_lone,
        out_type=jax.ShapeDtypeStruct((outputs,), x.dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=GROUPS,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((pieces(inputs), rows, PIECE), x.dtype),
            plgpu.SMEM((GROUPS, WARPS), jnp.float32),
            plgpu.Barrier(num_arrivals=pieces(inputs)),
        ],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(),
    )(x[0], scale, weights)[None]
