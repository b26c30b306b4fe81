"""Gate, up and activation of a hundred tokens or more in one Hopper kernel in Pallas Mosaic GPU.

A CTA multiplies up to 256 tokens with the weights of some inner features, 96 for Qwen3-8B: 128 CTAs, one wave on the
132 multiprocessors of an H100. Tokens are the left operand of the wgmmas and the right one is the gates' weights with
the ups' under them, so a thread has the gates and ups of the same features in registers.

Up to 128 tokens are bound by memory, which is read best in long pieces of each row: a ring of their own for the tokens
leaves room for three stages of 128 features of weights (128 tokens: 77.9 us; in stages of 64 features 81.5, with both
in one ring 84.2). More tokens are bound by the tensor cores and by the L2 cache, which each CTA reads them from.
Prefills gain that gates and ups, 0.8 GB for 16,384 tokens, are never written: with the product after it 6.89 ms, and
7.30 as separate products.

Tried and not faster (85.0 us at 256 tokens): tokens shared by clusters of two CTAs (85.6) or four (141), three stages
instead of four (85 to 90), waiting for every wgmma (86.6), weights read into the L2 cache ahead of their copies (117).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.matmul.hopper import swizzled

WG_ROWS = 64  # of a wgmma
STEP = 64  # features of a stage of tokens: 128 bytes, the widest swizzle
GROUPS = {64: 1, 128: 2, 192: 3, 256: 2}  # warpgroups that multiply, by tokens of a CTA
REGISTERS = {2: 240, 3: 160}  # of a thread that multiplies, by these warpgroups
INNER = (128, 112, 96, 80, 64, 48, 32)  # inner features that a CTA may have
MOST_INNER = {64: 128, 128: 128, 192: 112, 256: 96}  # for whose sums there are registers, by tokens of a CTA
MULTIPROCESSORS = 132
SMEM_BYTES = 229_376  # of the 232,448 that a CTA may have; barriers and alignment need some
MAX_TOKEN_STAGES = 6
# CTAs in a row that multiply other tokens with the same weights: a wave of them reads 34 MB of tokens and 13 of weights
# of Qwen3-8B, which the L2 cache holds. Tokens first or weights first, prefills would be bound by memory.
NEIGHBOURS = 16


class Tiling(NamedTuple):
    """Inner features of a CTA; features and stages of its ring of weights; stages of its ring of tokens."""

    inner: int
    step: int
    stages: int
    token_stages: int

    @classmethod
    def fit(cls, tokens: int, inner: int) -> "Tiling":
        """For so many tokens of a CTA: what a multiprocessor has to read is least, and as many stages as fit.

        Raises:
            NotImplementedError: no number of features divides all.
        """
        sizes = [size for size in INNER if size <= MOST_INNER[tokens]]
        fitting = [size for size in sizes if inner % size == 0]
        if not fitting:
            raise NotImplementedError(f"{inner} inner features are a multiple of none of {sizes}")
        size = min(fitting, key=lambda size: pl.cdiv(inner // size, MULTIPROCESSORS) * (2 * size + tokens))
        weights, token_bytes = 4 * size, 2 * tokens * STEP  # bytes for one feature, and of a stage
        if tokens <= 128:
            step, stages = 2 * STEP, 3
            rest = (SMEM_BYTES - stages * step * weights) // token_bytes
            return cls(size, step, stages, min(rest, MAX_TOKEN_STAGES))
        stages = SMEM_BYTES // (STEP * weights + token_bytes)
        return cls(size, STEP, stages, stages)


@dataclass(frozen=True)
class Sizes:
    """What is known when a call is traced: tokens of a CTA, features of each, the tiling, dtype of the arrays."""

    tokens: int
    width: int
    tiling: Tiling
    dtype: DTypeLike

    @classmethod
    def fit(cls, tokens: int, width: int, inner: int, tiling: Tiling | None, dtype: DTypeLike) -> "Sizes":
        """The sizes for 16-bit arrays.

        Raises:
            NotImplementedError: the kernel cannot serve these shapes; the message names the values.
        """
        padded = -(-tokens // WG_ROWS) * WG_ROWS
        tile = next((size for size in sorted(GROUPS, reverse=True) if tokens % size == 0), padded)
        if tile not in GROUPS:
            raise NotImplementedError(f"{tokens} tokens are more than {max(GROUPS)} and not a multiple of {WG_ROWS}")
        tiling = tiling or Tiling.fit(tile, inner)
        if width % tiling.step or inner % tiling.inner:
            raise NotImplementedError(f"{tokens} tokens, {width} -> {inner} features by {tiling}")
        if min(tiling.stages, tiling.token_stages) < 2:  # a stage is free when the one after it is multiplied
            raise NotImplementedError(f"fewer than two stages: {tiling}")
        if width < max(tiling.stages * tiling.step, tiling.token_stages * STEP):
            raise NotImplementedError(f"{width=} is less than the stages of {tiling}")
        return cls(tile, width, tiling, dtype)

    @property
    def steps(self) -> int:
        """Stages' worth of weights."""
        return self.width // self.tiling.step

    @property
    def parts(self) -> int:
        """Stages of tokens for one of weights."""
        return self.tiling.step // STEP

    @property
    def groups(self) -> int:
        return GROUPS[self.tokens]

    @property
    def rows(self) -> int:
        """Tokens of a warpgroup."""
        return self.tokens // self.groups

    @property
    def chunk(self) -> int:
        """Inner features that are activated and stored together."""
        return math.gcd(self.tiling.inner, 32)


class Refs(NamedTuple):
    """The kernel's references: inputs, output, SMEM (`_s`) and the barriers of each stage of both rings.

    The output's buffer is where the tokens were, and `done` tells when they are not read any more.
    """

    x: Any
    gate_up: Any
    out: Any
    tokens_s: Any
    out_s: Any
    weights_s: Any
    tokens_full: Any
    tokens_free: Any
    full: Any
    free: Any
    done: Any


@dataclass(frozen=True)
class Place:
    """Where the tokens and inner features of a CTA begin."""

    tokens: Any
    inner: Any


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def call(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "F 2 D"],
    tiling: Tiling | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T F"]:
    """`silu(gate(x)) * up(x)` of bfloat16 arrays, of which only the result is rounded.

    Raises:
        NotImplementedError: `T` is more than 256 and not a multiple of 64, or `D` or `F` are none of the tiling's.
    """
    (tokens, width), inner = x.shape, len(gate_up)
    sizes = Sizes.fit(tokens, width, inner, tiling, x.dtype)
    parts = pl.cdiv(tokens, sizes.tokens)
    neighbours = math.gcd(parts, NEIGHBOURS)

    def gate_up_tiled(*refs: Any) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    return plgpu.kernel(
        gate_up_tiled,
        out_type=jax.ShapeDtypeStruct((tokens, inner), x.dtype),
        grid=(parts // neighbours, inner // sizes.tiling.inner, neighbours),
        grid_names=("parts", "tile", "part"),
        num_threads=sizes.groups + 1,
        thread_name="wg",
        scratch_types=scratch(sizes),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, gate_up)


def scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    dtype, (inner, step, stages, token_stages), groups = sizes.dtype, sizes.tiling, sizes.groups
    tokens = plgpu.SMEM((token_stages, sizes.tokens, STEP), dtype, transforms=swizzled(dtype))
    out = plgpu.SMEM((groups, sizes.rows, inner), dtype, transforms=swizzled(dtype, sizes.chunk))
    return [
        plgpu.RefUnion(tokens, out),
        plgpu.SMEM((stages, 2 * inner, step), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_barriers=token_stages),
        plgpu.Barrier(num_barriers=token_stages, num_arrivals=groups),
        plgpu.Barrier(num_barriers=stages, num_arrivals=2),  # copies: gates and ups
        plgpu.Barrier(num_barriers=stages, num_arrivals=groups),
        plgpu.Barrier(num_arrivals=groups),
    ]


def kernel(sizes: Sizes, x: Any, gate_up: Any, out: Any, union: Any, *others: Any) -> None:
    """The body: warpgroups that multiply and one for TMA."""
    refs, wg = Refs(x, gate_up, out, *union, *others), lax.axis_index("wg")
    part = lax.axis_index("parts") * lax.axis_size("part") + lax.axis_index("part")
    place = Place(part * sizes.tokens, lax.axis_index("tile") * sizes.tiling.inner)
    pl.when(wg < sizes.groups)(lambda: compute(sizes, refs, place, wg))
    pl.when(wg == sizes.groups)(lambda: load(sizes, refs, place))


def load(sizes: Sizes, refs: Refs, place: Place) -> None:
    """The TMA warpgroup."""
    if sizes.groups in REGISTERS:
        plgpu.set_max_registers(24, action="decrease")
    inner, step, stages, token_stages = sizes.tiling
    rows, mine = pl.ds(place.tokens, sizes.tokens), pl.ds(place.inner, inner)

    def copy_weights(k: Any) -> None:
        stage = lax.rem(k, stages)
        pl.when(k >= stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
        for which in range(2):
            target = refs.weights_s.at[stage, pl.ds(which * inner, inner)]
            wanted = refs.gate_up.at[mine, which, pl.ds(k * step, step)]
            plgpu.copy_gmem_to_smem(wanted, target, refs.full.at[stage])

    def copy_tokens(t: Any) -> None:
        stage = lax.rem(t, token_stages)
        pl.when(t >= token_stages)(lambda: plgpu.barrier_wait(refs.tokens_free.at[stage]))
        wanted = refs.x.at[rows, pl.ds(t * STEP, STEP)]
        plgpu.copy_gmem_to_smem(wanted, refs.tokens_s.at[stage], refs.tokens_full.at[stage])

    @pl.loop(0, sizes.steps)
    def _(k: Any) -> None:
        copy_weights(k)
        for part in range(sizes.parts):
            copy_tokens(k * sizes.parts + part)

    # Every barrier ends in a completed phase.
    last = sizes.steps * sizes.parts
    pl.loop(sizes.steps - stages, sizes.steps)(lambda k: plgpu.barrier_wait(refs.free.at[lax.rem(k, stages)]))
    pl.loop(last - token_stages, last)(lambda t: plgpu.barrier_wait(refs.tokens_free.at[lax.rem(t, token_stages)]))


def compute(sizes: Sizes, refs: Refs, place: Place, wg: Any) -> None:
    """A warpgroup's share of the tokens."""
    if sizes.groups in REGISTERS:
        plgpu.set_max_registers(REGISTERS[sizes.groups], action="increase")
    inner, _, stages, token_stages = sizes.tiling
    mine = pl.ds(wg * sizes.rows, sizes.rows)

    def free(t: Any, k: Any = None) -> None:
        """Give back a stage of tokens, and one of weights."""
        plgpu.barrier_arrive(refs.tokens_free.at[lax.rem(t, token_stages)])
        if k is not None:
            plgpu.barrier_arrive(refs.free.at[lax.rem(k, stages)])

    def product(acc: Any) -> Any:
        @pl.loop(0, sizes.steps)
        def _(k: Any) -> None:
            stage = lax.rem(k, stages)
            plgpu.barrier_wait(refs.full.at[stage])
            for part in range(sizes.parts):
                t = k * sizes.parts + part
                tokens = lax.rem(t, token_stages)
                plgpu.barrier_wait(refs.tokens_full.at[tokens])
                weights = refs.weights_s.at[stage, :, pl.ds(part * STEP, STEP)]
                plgpu.wgmma(acc, refs.tokens_s.at[tokens, mine], weights.T)
                plgpu.wgmma_wait(1)  # the one before is done with its stages
                pl.when(k > 0)(functools.partial(free, t - 1, k - 1)) if part == 0 else free(t - 1)

        result = acc[...]
        free(jnp.int32(sizes.steps * sizes.parts - 1), jnp.int32(sizes.steps - 1))
        return result

    acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((sizes.rows, 2 * inner), jnp.float32))
    plgpu.barrier_arrive(refs.done)
    plgpu.barrier_wait(refs.done)
    for start in range(0, inner, sizes.chunk):
        gate, up = (acc[:, first : first + sizes.chunk] for first in (start, inner + start))
        refs.out_s[wg, :, pl.ds(start, sizes.chunk)] = (gate / (1 + jnp.exp(-gate)) * up).astype(sizes.dtype)
    plgpu.commit_smem()
    rows = pl.ds(place.tokens + wg * sizes.rows, sizes.rows)
    plgpu.copy_smem_to_gmem(refs.out_s.at[wg], refs.out.at[rows, pl.ds(place.inner, inner)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
