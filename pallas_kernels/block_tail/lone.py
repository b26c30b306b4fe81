"""The second half of a layer for a lone token and a small model, for Hopper in Pallas Mosaic GPU.

XLA takes six kernels for it that each read some megabytes, which is over before the memory is at its full speed. Here
one kernel begins with copies of all of its weights to the shared memory of all multiprocessors, so that they are read
in one go, and CTAs only wait for each other: for what goes into the norm, and for the activations.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gated_mlp.mosaic_gpu_kernel import COUNTERS
from pallas_kernels.matmul.lone import (
    GROUPS,
    PIECE,
    SMEM_BYTES,
    SUMS,
    WARPS,
    copy_rows,
    dot,
    load_vectors,
    most_ctas,
    norm,
    pieces,
)


class Refs(NamedTuple):
    """The kernel's references: inputs, outputs, SMEM (`_s`) and a barrier for each matrix."""

    x: Any
    heads: Any
    projection: Any
    scale: Any
    gate_up: Any
    down: Any
    between: Any
    inner: Any
    out: Any
    projection_s: Any
    gate_up_s: Any
    down_s: Any
    spare_s: Any
    came: Any


@dataclass(frozen=True)
class Sizes:
    """Features of the arrays, and the number of CTAs."""

    heads: int
    width: int
    inner: int
    ctas: int

    @classmethod
    def fit(cls, heads: int, width: int, inner: int, multiprocessors: int) -> "Sizes":
        """The sizes for bfloat16 arrays.

        Raises:
            NotImplementedError: the kernel cannot serve these shapes; the message names the values.
        """
        sizes = cls(heads, width, inner, most_ctas(multiprocessors, width, inner))
        wanted = 2 * (width * heads + 3 * width * inner) // sizes.ctas
        if width == PIECE:  # Mosaic would choose a swizzle for gates and ups, in which they are not read
            raise NotImplementedError(f"{width=}, a single piece")
        if wanted > SMEM_BYTES:
            raise NotImplementedError(f"{wanted} bytes of weights for each of {sizes.ctas} CTAs, not {SMEM_BYTES}")
        return sizes

    @property
    def outputs(self) -> int:
        """Of a CTA, in the first product and in the last."""
        return self.width // self.ctas

    @property
    def features(self) -> int:
        """Inner ones of a CTA."""
        return self.inner // self.ctas


@functools.partial(jax.jit, static_argnames=("norm_eps", "multiprocessors"))
def call(
    x: Float[Array, "T D"],
    heads: Float[Array, "T N"],
    projection: Float[Array, "D N"],
    scale: Float[Array, "D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "D F"],
    *,
    norm_eps: float,
    multiprocessors: int,
) -> Float[Array, "T D"]:
    """The kernel, whether or not it is faster than XLA.

    Raises:
        NotImplementedError: it cannot serve these shapes; the message names the values.
    """
    if len(x) > 1:
        raise NotImplementedError(f"{len(x)} tokens, not one")
    sizes = Sizes.fit(heads.shape[1], x.shape[1], len(gate_up), multiprocessors)
    outputs, features = sizes.outputs, sizes.features

    def block_tail_lone(*references: Any) -> None:  # names the kernel in profiles
        kernel(sizes, norm_eps, Refs(*references))

    return plgpu.kernel(
        block_tail_lone,
        out_type=tuple(jax.ShapeDtypeStruct((size,), x.dtype) for size in (sizes.width, sizes.inner, sizes.width)),
        grid=(sizes.ctas,),
        grid_names=("cta",),
        num_threads=GROUPS,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((pieces(sizes.heads), outputs, PIECE), x.dtype),
            plgpu.SMEM((pieces(sizes.width), features, 2, PIECE), x.dtype),
            plgpu.SMEM((pieces(sizes.inner), outputs, PIECE), x.dtype),
            plgpu.SMEM((GROUPS, WARPS), jnp.float32),
            [plgpu.Barrier(num_arrivals=pieces(size)) for size in (sizes.heads, sizes.width, sizes.inner)],
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x[0], heads[0], projection, scale, gate_up, down)[-1][None]


def kernel(sizes: Sizes, eps: float, refs: Refs) -> None:
    """The body of both warpgroups, each with a half of the CTA's rows."""
    cta, wg, dtype = lax.axis_index("cta"), lax.axis_index("wg"), refs.out.dtype
    counters = pl.get_global(plgpu.SemaphoreType.REGULAR((COUNTERS,)))

    def mine(size: int) -> tuple[Any, Any]:
        """My rows of the CTA's, and of all."""
        half = size // GROUPS
        return pl.ds(wg * half, half), pl.ds(cta * size + wg * half, half)

    @pl.when(wg == 0)
    def _():
        rows, features = pl.ds(cta * sizes.outputs, sizes.outputs), pl.ds(cta * sizes.features, sizes.features)
        copy_rows(refs.projection, rows, refs.projection_s, refs.came[0])
        copy_rows(refs.gate_up, features, refs.gate_up_s, refs.came[1])
        copy_rows(refs.down, rows, refs.down_s, refs.came[2])

    rows, all_rows = mine(sizes.outputs)
    passing = plgpu.load(refs.x.at[all_rows], layout=SUMS, optimized=False).astype(jnp.float32)
    heads = load_vectors(refs.heads)
    plgpu.barrier_wait(refs.came[0])
    passing = add(passing, dot(lambda k: refs.projection_s.at[k, rows], heads), dtype)
    share(sizes, passing, refs.between.at[all_rows], counters.at[0])

    normed = norm(load_vectors(refs.between), refs.scale, eps, refs.spare_s.at[wg])
    plgpu.barrier_wait(refs.came[1])
    some, all_features = mine(sizes.features)
    gate, up = (dot(lambda k, which=which: refs.gate_up_s.at[k, some, which], normed) for which in range(2))
    share(sizes, gate / (1 + jnp.exp(-gate)) * up, refs.inner.at[all_features], counters.at[1])

    inner = load_vectors(refs.inner)
    plgpu.barrier_wait(refs.came[2])
    refs.out[all_rows] = add(passing, dot(lambda k: refs.down_s.at[k, rows], inner), dtype).astype(dtype)


def add(passing: Array, product: Array, dtype: Any) -> Array:
    """What goes through and what a product adds to it, each rounded."""
    return (passing + product.astype(dtype).astype(jnp.float32)).astype(dtype).astype(jnp.float32)


def share(sizes: Sizes, values: Array, place: Any, counter: Any) -> None:
    """Store my values for all, and wait until all others have stored theirs."""
    place[...] = values.astype(place.dtype)
    plgpu.semaphore_signal(counter, memory_scope="gpu")
    plgpu.semaphore_wait(counter, sizes.ctas * GROUPS, decrement=False, memory_scope="gpu")
