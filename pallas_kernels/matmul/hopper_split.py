"""Products of some hundred rows with a weight matrix for Hopper in Pallas Mosaic GPU, with the sums split over CTAs.

Too few tiles of outputs for all SMs: the CTAs of a cluster share the features of a tile, each adds up a part of them,
and each finishes a share of the tile with the partial sums that the others put into its shared memory. What a cluster's
tiles have in common, tokens side by side and weights one above the other, TMA multicasts: an L2 cache gives 5.5 TB/s,
and without multicast the tiles of a [4096, 12288] matrix and 256 tokens would ask it for 300 MB.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.matmul.hopper import swizzled, turned

WG_ROWS = 64  # of a wgmma
REGISTERS = 504  # of one lane of each warpgroup together; the SM has room for 512
LOAD_REGISTERS = 40


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        tokens, outputs: of the tile of a CTA.
        split: CTAs that share the features of a tile.
        wide, tall: tiles of a cluster side by side, with the same tokens, and one above the other.
        step, stages: features of a stage of the ring, and stages.
        weights_left: whether weights are the left operand, whose rows the warpgroups share.
        in_flight: wgmmas that run on while the next one is issued.
        interleaved: whether the CTAs of a split take turns at the stages, or each has a run of features.
    """

    tokens: int
    outputs: int
    split: int = 1
    wide: int = 1
    tall: int = 1
    step: int = 64
    stages: int = 4
    weights_left: bool = False
    in_flight: int = 1
    interleaved: bool = True

    @property
    def rows(self) -> int:
        """Of the accumulators of a CTA."""
        return self.outputs if self.weights_left else self.tokens

    @property
    def columns(self) -> int:
        return self.tokens if self.weights_left else self.outputs

    @property
    def wgs(self) -> int:
        """Warpgroups that compute: two of 64 or 128 rows, or one or three of 64."""
        return 2 if self.rows == 4 * WG_ROWS else self.rows // WG_ROWS

    @property
    def wg_rows(self) -> int:
        return self.rows // self.wgs

    @property
    def share(self) -> int:
        """Columns that a CTA finishes."""
        return self.columns // self.split

    @property
    def registers(self) -> int:
        """Of a lane that computes."""
        return (REGISTERS - LOAD_REGISTERS) // self.wgs // 8 * 8


class Refs(NamedTuple):
    """The kernel's references: inputs, output, SMEM (`_s`) and barriers."""

    x: Any
    weights: Any
    out: Any
    out_s: Any
    tokens_s: Any
    weights_s: Any
    full: Any
    free: Any
    idle: Any
    exchanged: Any
    sums_s: Any = None  # in the place of the ring


class Place(NamedTuple):
    """A CTA's tile, by its first token and output, its part of the features, and how many stages these take."""

    token: Any
    output: Any
    part: Any
    steps: int


def check(tiling: Tiling, tokens: int, outputs: int, inputs: int) -> None:
    """Raise `NotImplementedError`, naming the values, for sizes that the tiles do not divide."""
    if outputs % (tiling.outputs * tiling.wide):
        raise NotImplementedError(f"{outputs} outputs are not a multiple of {tiling.wide} x {tiling.outputs}")
    if inputs % (tiling.step * tiling.split):
        raise NotImplementedError(f"{inputs} features are not a multiple of {tiling.split} x {tiling.step}")
    if tokens % 8:
        raise NotImplementedError(f"{tokens} tokens are not a multiple of 8")


@functools.partial(jax.jit, static_argnames=("out_dtype", "tiling"))
def call(
    x: Float[Array, "T I"], weights: Float[Array, "O I"], out_dtype: jnp.dtype, tiling: Tiling
) -> Float[Array, "T O"]:
    """`out[t, o] = sum over i of x[t, i] * weights[o, i]`, with float32 sums; x and weights are of one 16-bit type.

    Raises:
        NotImplementedError: the tiles do not divide the arrays.
    """
    (tokens, inputs), outputs = x.shape, len(weights)
    check(tiling, tokens, outputs, inputs)
    above = pl.cdiv(tokens, tiling.tokens * tiling.tall)
    steps = inputs // tiling.step // tiling.split

    def matmul_split(x_ref: Any, weights_ref: Any, out_ref: Any, out_s: Any, buffers: Any, *barriers: Any) -> None:
        ring, *sums_s = buffers
        refs = Refs(x_ref, weights_ref, out_ref, out_s, *ring, *barriers, *sums_s)
        cluster, wg = lax.axis_index("cluster"), lax.axis_index("wg")
        tall = lax.rem(cluster, above) * tiling.tall + lax.axis_index("tall")
        wide = lax.div(cluster, above) * tiling.wide + lax.axis_index("wide")
        place = Place(tall * tiling.tokens, wide * tiling.outputs, lax.axis_index("split"), steps)
        pl.when(wg == tiling.wgs)(lambda: load(tiling, refs, place))
        pl.when(wg < tiling.wgs)(lambda: compute(tiling, refs, place, wg))

    return plgpu.kernel(
        matmul_split,
        out_type=jax.ShapeDtypeStruct((tokens, outputs), out_dtype),
        grid=(above * (outputs // (tiling.outputs * tiling.wide)),),
        grid_names=("cluster",),
        cluster=(tiling.wide, tiling.tall, tiling.split),
        cluster_names=("wide", "tall", "split"),
        num_threads=tiling.wgs + 1,
        thread_name="wg",
        scratch_types=scratch(tiling, x.dtype, out_dtype),
    )(x, weights)


def load(tiling: Tiling, refs: Refs, place: Place) -> None:
    """The TMA warpgroup. A CTA loads its part of what it has in common with others, into the memory of all of them."""
    if tiling.wgs > 1:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    tokens, outputs = pl.ds(place.token, tiling.tokens), pl.ds(place.output, tiling.outputs)

    @pl.loop(0, place.steps)
    def _(i: Any):
        stage = lax.rem(i, tiling.stages)
        turn = i * tiling.split + place.part if tiling.interleaved else place.part * place.steps + i
        features = pl.ds(turn * tiling.step, tiling.step)

        @pl.when(i >= tiling.stages)
        def _():
            plgpu.barrier_wait(refs.free.at[stage])

        for wanted, target, axis in (
            (refs.weights.at[outputs, features], refs.weights_s.at[stage], "tall" if tiling.tall > 1 else None),
            (refs.x.at[tokens, features], refs.tokens_s.at[stage], "wide" if tiling.wide > 1 else None),
        ):
            plgpu.copy_gmem_to_smem(wanted, target, refs.full.at[stage], collective_axes=axis)

    @pl.loop(max(place.steps - tiling.stages, 0), place.steps)
    def _(i: Any):  # no CTA may be gone while others still signal that they have read
        plgpu.barrier_wait(refs.free.at[lax.rem(i, tiling.stages)])


def compute(tiling: Tiling, refs: Refs, place: Place, wg: Any) -> None:
    """One of the other warpgroups: its rows of the tile."""
    if tiling.wgs > 1:
        plgpu.set_max_registers(tiling.registers, action="increase")
    sums = multiply(tiling, refs, place.steps, wg)
    if tiling.split > 1:
        sums = exchange(tiling, refs, place.part, wg, sums)
    token, output = place.token, place.output
    if tiling.weights_left:
        refs.out_s.at[wg].T[...] = turned(sums.astype(refs.out.dtype))
        token, output = token + place.part * tiling.share, output + wg * tiling.wg_rows
    else:
        refs.out_s[wg] = sums.astype(refs.out.dtype)
        token, output = token + wg * tiling.wg_rows, output + place.part * tiling.share
    plgpu.commit_smem()
    rows, columns = refs.out_s.shape[1:]
    plgpu.copy_smem_to_gmem(refs.out_s.at[wg], refs.out.at[pl.ds(token, rows), pl.ds(output, columns)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def multiply(tiling: Tiling, refs: Refs, steps: int, wg: Any) -> Any:
    """Float32 `[wg_rows, columns]`: the sums over the CTA's features."""
    left, right = (refs.tokens_s, refs.weights_s)[:: -1 if tiling.weights_left else 1]
    mine, late = pl.ds(wg * tiling.wg_rows, tiling.wg_rows), tiling.in_flight

    def product(acc: Any) -> Any:
        @pl.loop(0, steps)
        def _(i: Any):
            stage = lax.rem(i, tiling.stages)
            plgpu.barrier_wait(refs.full.at[stage])
            plgpu.wgmma(acc, left.at[stage, mine], right.at[stage].T)
            plgpu.wgmma_wait(late)
            before = lax.rem(i + (tiling.stages - late), tiling.stages)
            plgpu.barrier_arrive(refs.free.at[before], predicate=i >= late)  # a branch might make the wgmmas wait

        return acc[...]

    sums = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tiling.wg_rows, tiling.columns), jnp.float32))
    for i in range(max(steps - late, 0), steps):
        plgpu.barrier_arrive(refs.free.at[i % tiling.stages])
    return sums


def exchange(tiling: Tiling, refs: Refs, part: Any, wg: Any, sums: Array) -> Array:
    """Send each CTA of the split my sums of its share of the columns, and add up those of mine: `[wg_rows, share]`."""
    plgpu.commit_smem()  # all warps have their sums
    plgpu.barrier_arrive(refs.idle)
    plgpu.barrier_wait(refs.idle)  # the rings, whose memory takes the sums, are read by nobody any more
    for peer in range(tiling.split):
        theirs = sums[:, peer * tiling.share : (peer + 1) * tiling.share]
        target, barrier = refs.sums_s.at[wg, part], refs.exchanged.at[wg]
        plgpu.async_store_smem(theirs, target, barrier, cluster_idx=jnp.int32(peer), cluster_dim="split")
    plgpu.barrier_wait(refs.exchanged.at[wg])
    parts = (plgpu.load(refs.sums_s.at[wg, peer], layout=plgpu.Layout.WGMMA) for peer in range(tiling.split))
    return functools.reduce(jnp.add, parts)


def scratch(tiling: Tiling, dtype: DTypeLike, out_dtype: DTypeLike) -> list[Any]:
    """Shared memory and barriers: the result, the ring and the sums in one place, and what `Refs` names after them."""
    out = (tiling.share, tiling.wg_rows) if tiling.weights_left else (tiling.wg_rows, tiling.share)
    sizes = [(tiling.stages, rows, tiling.step) for rows in (tiling.tokens, tiling.outputs)]
    ring = [plgpu.SMEM(size, dtype, transforms=swizzled(dtype)) for size in sizes]
    parts = (tiling.wgs, tiling.split, tiling.wg_rows, tiling.share)
    sums = [plgpu.SMEM(parts, jnp.float32, transforms=swizzled(jnp.float32, tiling.share))]
    shared = {"collective_axes": ("wide", "tall"), "num_arrivals": tiling.wgs, "num_barriers": tiling.stages}
    return [
        plgpu.SMEM((tiling.wgs, *out), out_dtype, transforms=swizzled(out_dtype, out[1])),
        plgpu.RefUnion(ring, *sums[: tiling.split - 1]),
        plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        plgpu.ClusterBarrier(**shared),
        plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=tiling.wgs),
        plgpu.Barrier(num_arrivals=tiling.split, num_barriers=tiling.wgs),
    ]
