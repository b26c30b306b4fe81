"""Gate, up and activation of some hundred tokens in one Hopper kernel in Pallas Mosaic GPU: bound by tensor cores.

A CTA multiplies all tokens (or a tile of 256) with the weights of 96 inner features, so that Qwen 3 8B's 12288 are 128
CTAs: one wave on the 132 multiprocessors of an H100. Tokens are the left operand of the wgmmas and the right one is the
96 gates' weights with the 96 ups' under them, so a thread has the gates and ups of the same features in registers.

Every CTA needs the same tokens: clusters of CTAs read them from the L2 cache once and share them by multicast.
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

Shaped = jax.Array | jax.ShapeDtypeStruct

FEATURES = 96  # inner features of a CTA
STEP = 64  # features of a stage: 128 bytes, the widest swizzle
TILE_TOKENS = 256
GROUPS = 2  # warpgroups that multiply
AHEAD = 256  # features of a prefetch into the L2 cache: memory is read best in long pieces of each row
CHUNK = 32  # inner features that are activated and stored together


@dataclass(frozen=True)
class Sizes:
    """Everything about a call that is known when it is traced.

    Attributes:
        tokens: of a CTA.
        width: features of a token.
        cluster: CTAs that share tokens.
        stages: of the ring.
        delay: wgmma groups in flight while the next one is issued.
        prefetch: stages by which weights are read into the L2 cache ahead of their copies; 0 for not.
        dtype: of the arrays.
    """

    tokens: int
    width: int
    cluster: int
    stages: int
    delay: int
    prefetch: int
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
    """The tokens and inner features of a CTA."""

    tokens: Any
    inner: Any


def check(x: Shaped, gate_up: Shaped, cluster: int) -> None:
    """Raise `NotImplementedError`, naming the values, for what cannot be cut into tiles."""
    (tokens, width), inner = x.shape, len(gate_up)
    if x.dtype != jnp.bfloat16 or gate_up.dtype != jnp.bfloat16:
        raise NotImplementedError(f"dtypes of x and gate_up are {x.dtype} and {gate_up.dtype}, not bfloat16")
    if tokens != TILE_TOKENS // 2 and tokens % TILE_TOKENS:
        raise NotImplementedError(f"{tokens} tokens are neither 128 nor a multiple of 256")
    if width % STEP or inner % (FEATURES * cluster):
        raise NotImplementedError(f"{width} -> {inner} features in tiles of {STEP} and {FEATURES} for {cluster} CTAs")


@functools.partial(jax.jit, static_argnames=("cluster", "stages", "delay", "prefetch", "interpret"))
def call(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "F 2 D"],
    cluster: int = 2,
    stages: int = 4,
    delay: int = 1,
    prefetch: int = 0,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T F"]:
    """`silu(gate(x)) * up(x)` of bfloat16 arrays, of which only the result is rounded; `Sizes` has the parameters.

    Raises:
        NotImplementedError: the shapes cannot be cut into tiles.
    """
    check(x, gate_up, cluster)
    (tokens, width), inner = x.shape, len(gate_up)
    sizes = Sizes(min(tokens, TILE_TOKENS), width, cluster, stages, delay, prefetch, x.dtype)

    def gate_up_tiled(*refs: Any) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    return plgpu.kernel(
        gate_up_tiled,
        out_type=jax.ShapeDtypeStruct((tokens, inner), x.dtype),
        grid=(inner // (FEATURES * cluster), tokens // sizes.tokens),
        grid_names=("tile", "part"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch(sizes),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"cluster": (cluster,), "cluster_names": ("cta",)} if cluster > 1 else {}),
    )(x, gate_up)


def scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    stages, dtype = sizes.stages, sizes.dtype
    tokens = plgpu.SMEM((stages, sizes.tokens, STEP), dtype, transforms=swizzled(dtype))
    out = plgpu.SMEM((GROUPS, sizes.rows, FEATURES), dtype, transforms=swizzled(dtype, CHUNK))
    free = plgpu.Barrier(num_barriers=stages, num_arrivals=GROUPS)
    if sizes.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("cta",), num_barriers=stages, num_arrivals=GROUPS)
    return [
        plgpu.RefUnion(tokens, out),
        plgpu.SMEM((stages, 2 * FEATURES, STEP), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=3),  # copies: tokens, gates and ups
        free,
        plgpu.Barrier(num_arrivals=GROUPS),
    ]


def kernel(sizes: Sizes, x: Any, gate_up: Any, out: Any, union: Any, *others: Any) -> None:
    """The body: two warpgroups that multiply and one for TMA."""
    refs = Refs(x, gate_up, out, *union, *others)
    wg, tile = lax.axis_index("wg"), lax.axis_index("tile")
    if sizes.cluster > 1:
        tile = tile * sizes.cluster + lax.axis_index("cta")
    place = Place(lax.axis_index("part") * sizes.tokens, tile * FEATURES)
    pl.when(wg < GROUPS)(lambda: compute(sizes, refs, place, wg))
    pl.when(wg == GROUPS)(lambda: load(sizes, refs, place))


def load(sizes: Sizes, refs: Refs, place: Place) -> None:
    """The TMA warpgroup."""
    plgpu.set_max_registers(24, action="decrease")
    inner, every = pl.ds(place.inner, FEATURES), AHEAD // STEP

    def prefetch(features: Any) -> None:
        for which in range(2):
            plgpu.async_prefetch(refs.gate_up.at[inner, which, pl.ds(features, AHEAD)])

    def copy(k: Any) -> None:
        stage, features = lax.rem(k, sizes.stages), pl.ds(k * STEP, STEP)
        full = refs.full.at[stage]
        for which in range(2):
            target = refs.weights_s.at[stage, pl.ds(which * FEATURES, FEATURES)]
            plgpu.copy_gmem_to_smem(refs.gate_up.at[inner, which, features], target, full)
        wanted, axes = refs.x.at[pl.ds(place.tokens, sizes.tokens), features], "cta" if sizes.cluster > 1 else None
        plgpu.copy_gmem_to_smem(wanted, refs.tokens_s.at[stage], full, collective_axes=axes)

    def refill(k: Any) -> None:
        if sizes.prefetch:
            ahead = k + sizes.prefetch
            pl.when((lax.rem(ahead, every) == 0) & (ahead < sizes.steps))(lambda: prefetch(ahead * STEP))
        plgpu.barrier_wait(refs.free.at[lax.rem(k, sizes.stages)])
        copy(k)

    early = min(sizes.stages, sizes.steps)
    pl.loop(0, early)(copy)
    if sizes.prefetch:  # what no stage will ask for
        pl.loop(early // every, (early + sizes.prefetch - 1) // every + 1)(lambda i: prefetch(i * AHEAD))
    pl.loop(early, sizes.steps)(refill)

    # A CTA may not end while others signal its barriers.
    @pl.loop(sizes.steps - early, sizes.steps)
    def _(k: Any):
        plgpu.barrier_wait(refs.free.at[lax.rem(k, sizes.stages)])


def compute(sizes: Sizes, refs: Refs, place: Place, wg: Any) -> None:
    """A warpgroup's half of the tokens."""
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds(wg * sizes.rows, sizes.rows)

    def product(acc: Any) -> Any:
        def multiply(k: Any) -> None:
            stage = lax.rem(k, sizes.stages)
            plgpu.barrier_wait(refs.full.at[stage])
            plgpu.wgmma(acc, refs.tokens_s.at[stage, mine], refs.weights_s.at[stage].T)
            plgpu.wgmma_wait(sizes.delay)

        def release(k: Any) -> None:
            plgpu.barrier_arrive(refs.free.at[lax.rem(k, sizes.stages)])

        def step(k: Any) -> None:
            multiply(k)
            release(k - sizes.delay)

        for k in range(sizes.delay):
            multiply(jnp.int32(k))
        pl.loop(sizes.delay, sizes.steps)(step)
        result = acc[...]
        pl.loop(sizes.steps - sizes.delay, sizes.steps)(release)
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
