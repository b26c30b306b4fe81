"""Gate, up and activation of some hundred tokens in one Hopper kernel in Pallas Mosaic GPU: bound by tensor cores.

A CTA multiplies up to 256 tokens with the weights of 96 inner features: 128 CTAs for Qwen3-8B, one wave
on the 132 multiprocessors of an H100. Tokens are the left operand of the wgmmas and the right one is the 96 gates'
weights with the 96 ups' under them, so a thread has the gates and ups of the same features in registers.

Tried and not faster (85.0 us at 256 tokens): tokens shared by clusters of two CTAs (85.6) or four (141), three stages
instead of four (85 to 90), waiting for every wgmma (86.6), weights read into the L2 cache ahead of their copies (117).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.matmul.hopper import swizzled

FEATURES = 96  # inner features of a CTA
STEP = 64  # features of a stage: 128 bytes, the widest swizzle
STAGES = 4  # of the ring
TILE_TOKENS = 256
GROUPS = 2  # warpgroups that multiply
CHUNK = 32  # inner features that are activated and stored together


@dataclass(frozen=True)
class Sizes:
    """What is known when a call is traced: tokens of a CTA, features of each, dtype of the arrays."""

    tokens: int
    width: int
    dtype: DTypeLike

    @property
    def steps(self) -> int:
        return self.width // STEP

    @property
    def rows(self) -> int:
        """Tokens of a warpgroup."""
        return self.tokens // GROUPS


class Refs(NamedTuple):
    """The kernel's references: inputs, output, SMEM (`_s`) and the barriers of each stage.

    The output's buffer is where the ring's tokens were, and `done` tells when they are not read any more.
    """

    x: Any
    gate_up: Any
    out: Any
    tokens_s: Any
    out_s: Any
    weights_s: Any
    full: Any
    free: Any
    done: Any


@dataclass(frozen=True)
class Place:
    """Where the tokens and inner features of a CTA begin."""

    tokens: Any
    inner: Any


@functools.partial(jax.jit, static_argnames=("interpret",))
def call(
    x: Float[Array, "T D"], gate_up: Float[Array, "F 2 D"], interpret: plgpu.InterpretGPUParams | None = None
) -> Float[Array, "T F"]:
    """`silu(gate(x)) * up(x)` of bfloat16 arrays, of which only the result is rounded.

    Raises:
        NotImplementedError: `T` is not 128 nor a multiple of 256, `D` none of 64 or below 256, or `F` none of 96.
    """
    (tokens, width), inner = x.shape, len(gate_up)
    if (
        (tokens != TILE_TOKENS // 2 and tokens % TILE_TOKENS)
        or width % STEP
        or width < STAGES * STEP
        or inner % FEATURES
    ):
        raise NotImplementedError(f"{tokens} tokens, {width} -> {inner} features")
    sizes = Sizes(min(tokens, TILE_TOKENS), width, x.dtype)

    def gate_up_tiled(*refs: Any) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    return plgpu.kernel(
        gate_up_tiled,
        out_type=jax.ShapeDtypeStruct((tokens, inner), x.dtype),
        grid=(inner // FEATURES, tokens // sizes.tokens),
        grid_names=("tile", "part"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch(sizes),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, gate_up)


def scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    dtype = sizes.dtype
    tokens = plgpu.SMEM((STAGES, sizes.tokens, STEP), dtype, transforms=swizzled(dtype))
    out = plgpu.SMEM((GROUPS, sizes.rows, FEATURES), dtype, transforms=swizzled(dtype, CHUNK))
    return [
        plgpu.RefUnion(tokens, out),
        plgpu.SMEM((STAGES, 2 * FEATURES, STEP), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=3),  # copies: tokens, gates and ups
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=GROUPS),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]


def kernel(sizes: Sizes, x: Any, gate_up: Any, out: Any, union: Any, *others: Any) -> None:
    """The body: two warpgroups that multiply and one for TMA."""
    refs, wg = Refs(x, gate_up, out, *union, *others), lax.axis_index("wg")
    place = Place(lax.axis_index("part") * sizes.tokens, lax.axis_index("tile") * FEATURES)
    pl.when(wg < GROUPS)(lambda: compute(sizes, refs, place, wg))
    pl.when(wg == GROUPS)(lambda: load(sizes, refs, place))


def load(sizes: Sizes, refs: Refs, place: Place) -> None:
    """The TMA warpgroup."""
    plgpu.set_max_registers(24, action="decrease")
    rows, inner = pl.ds(place.tokens, sizes.tokens), pl.ds(place.inner, FEATURES)

    def copy(k: Any) -> None:
        stage, features = lax.rem(k, STAGES), pl.ds(k * STEP, STEP)
        full = refs.full.at[stage]
        for which in range(2):
            target = refs.weights_s.at[stage, pl.ds(which * FEATURES, FEATURES)]
            plgpu.copy_gmem_to_smem(refs.gate_up.at[inner, which, features], target, full)
        plgpu.copy_gmem_to_smem(refs.x.at[rows, features], refs.tokens_s.at[stage], full)

    def wait(k: Any) -> None:
        plgpu.barrier_wait(refs.free.at[lax.rem(k, STAGES)])

    def refill(k: Any) -> None:
        wait(k)
        copy(k)

    pl.loop(0, STAGES)(copy)
    pl.loop(STAGES, sizes.steps)(refill)
    pl.loop(sizes.steps - STAGES, sizes.steps)(wait)  # every barrier ends in a completed phase


def compute(sizes: Sizes, refs: Refs, place: Place, wg: Any) -> None:
    """A warpgroup's half of the tokens."""
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds(wg * sizes.rows, sizes.rows)

    def product(acc: Any) -> Any:
        def multiply(k: Any) -> None:
            stage = lax.rem(k, STAGES)
            plgpu.barrier_wait(refs.full.at[stage])
            plgpu.wgmma(acc, refs.tokens_s.at[stage, mine], refs.weights_s.at[stage].T)
            plgpu.wgmma_wait(1)  # the one before is done with its stage

        def step(k: Any) -> None:
            multiply(k)
            plgpu.barrier_arrive(refs.free.at[lax.rem(k - 1, STAGES)])

        multiply(jnp.int32(0))
        pl.loop(1, sizes.steps)(step)
        result = acc[...]
        plgpu.barrier_arrive(refs.free.at[(sizes.steps - 1) % STAGES])
        return result

    acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((sizes.rows, 2 * FEATURES), jnp.float32))
    plgpu.barrier_arrive(refs.done)
    plgpu.barrier_wait(refs.done)
    for start in range(0, FEATURES, CHUNK):
        gate, up = (acc[:, first : first + CHUNK] for first in (start, FEATURES + start))
        refs.out_s[wg, :, pl.ds(start, CHUNK)] = (gate / (1 + jnp.exp(-gate)) * up).astype(sizes.dtype)
    plgpu.commit_smem()
    rows = pl.ds(place.tokens + wg * sizes.rows, sizes.rows)
    plgpu.copy_smem_to_gmem(refs.out_s.at[wg], refs.out.at[rows, pl.ds(place.inner, FEATURES)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
