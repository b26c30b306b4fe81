"""The kernel of the second half of a layer: what comes before the one of the feed-forward layer, and after it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gated_mlp import mosaic_gpu_kernel as gated
from pallas_kernels.gated_mlp.mosaic_gpu_kernel import COUNTERS, Part, Sizes
from pallas_kernels.matmul.hopper import TILE, Ring, swizzled

MAX_CLUSTERS = TILE  # whose sums of squares are added up at once

# [tokens, 64 features] in registers: half a warp holds a row, four consecutive features a thread.
LINES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, TILE), (2, TILE), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


class Refs(NamedTuple):
    """References beside those of the feed-forward layer.

    Attributes:
        x, heads, projection, scale: inputs.
        squares: output, the sum over each cluster's features for each token.
        mine_s: my share of tokens and features, what went in and then what goes through.
        sums_s: squares of these, one sum a token.
        factors_s: of each token, by which the norm multiplies it.
        squares_s: `squares` of all clusters.
        came, squares_came: barriers, of `mine_s` and `squares_s`.
        mlp: the others; its `x` is an output here.
    """

    x: Any
    heads: Any
    projection: Any
    scale: Any
    squares: Any
    mine_s: Any
    sums_s: Any
    factors_s: Any
    squares_s: Any
    came: Any
    squares_came: Any
    mlp: gated.Refs


def kernel(sizes: Sizes, eps: float, *references: Any) -> None:
    """The body: a TMA warpgroup and one that computes."""
    x, heads, projection, scale, gate_up, down, squares, scaled, inner, out = references[:10]
    mine_s, sums_s, factors_s, came, squares_came, (both_s, halves_s, squares_s), *others = references[10:]
    inner_s, out_s, exchanged, *ring = others
    mlp = gated.Refs(scaled, gate_up, down, inner, out, both_s, halves_s, inner_s, out_s, exchanged, Ring(*ring))
    refs = Refs(x, heads, projection, scale, squares, mine_s, sums_s, factors_s, squares_s, came, squares_came, mlp)
    counters = pl.get_global(plgpu.SemaphoreType.REGULAR((COUNTERS,)))
    part, wg = Part.mine(sizes), lax.axis_index("wg")
    pl.when(wg == 1)(lambda: load(sizes, refs, part, counters))
    pl.when(wg == 0)(lambda: compute(sizes, eps, refs, part, counters))


def load(sizes: Sizes, refs: Refs, part: Part, counters: Any) -> None:
    """The TMA warpgroup: weights as soon as there is room, tokens when all CTAs have stored theirs."""
    weights, tokens = gated.halved(sizes, refs.mlp.ring, part, refs.projection, refs.heads, part.heads_steps)
    gated.fill(refs.mlp.ring, 0, part.heads_steps, weights, tokens, None)

    def wait() -> None:
        gated.await_all(sizes, counters.at[0])
        wanted = refs.squares.at[pl.ds(0, MAX_CLUSTERS)]  # zeros past the last one
        plgpu.copy_gmem_to_smem(wanted, refs.squares_s, refs.squares_came)

    gated.load_first(sizes, refs.mlp, part, wait)
    gated.load_second(sizes, refs.mlp, part, counters.at[1])


def compute(sizes: Sizes, eps: float, refs: Refs, part: Part, counters: Any) -> None:
    """The other warpgroup."""
    rows, columns = pl.ds(part.half * sizes.share, sizes.share), pl.ds(part.cluster * TILE, TILE)

    @pl.when(part.half * sizes.share < sizes.rows)
    def _():
        plgpu.copy_gmem_to_smem(refs.x.at[rows, columns], refs.mine_s, refs.came)
        plgpu.barrier_wait(refs.came)

    acc = refs.mlp.ring.multiply(0, part.heads_steps)
    gated.finish(sizes, refs.mlp, part, acc, lambda *_: go_on(refs, part, rows, columns))
    gated.publish(counters.at[0])
    factors(sizes, eps, refs)
    gated.activations(sizes, refs.mlp, part, refs.factors_s)
    gated.publish(counters.at[1])
    acc = refs.mlp.ring.multiply(part.border, part.second_steps)
    gated.finish(sizes, refs.mlp, part, acc, lambda *_: end(refs, rows, columns))


def line(ref: Any) -> Array:
    return plgpu.load(ref, layout=LINES, optimized=False).astype(jnp.float32)


def go_on(refs: Refs, part: Part, rows: Any, columns: Any) -> None:
    """Between both parts of the layer: my share of what goes through, its squares, and what is multiplied next."""
    out_s, dtype = refs.mlp.out_s, refs.mlp.out_s.dtype
    rounded = (line(refs.mine_s) + line(out_s)).astype(dtype)
    refs.mine_s[...] = rounded
    wide = rounded.astype(jnp.float32)
    refs.sums_s[...] = jnp.sum(wide * wide, axis=1)
    scale = plgpu.load(refs.scale.at[columns], layout=LINES.reduce(0), optimized=False).astype(jnp.float32)
    out_s[...] = (wide * plgpu.layout_cast(lax.broadcast_in_dim(scale, wide.shape, (1,)), LINES)).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, refs.mlp.x.at[rows, columns])
    plgpu.copy_smem_to_gmem(refs.sums_s, refs.squares.at[part.cluster, rows])


def factors(sizes: Sizes, eps: float, refs: Refs) -> None:
    """What each token is multiplied by, from the squares of all clusters."""
    plgpu.barrier_wait(refs.squares_came)
    total = jnp.sum(plgpu.load(refs.squares_s, layout=plgpu.Layout.WGMMA, optimized=False), axis=0)
    refs.factors_s[...] = lax.rsqrt(total / sizes.width + eps)
    plgpu.commit_smem()


def end(refs: Refs, rows: Any, columns: Any) -> None:
    """My share of the outputs."""
    out_s = refs.mlp.out_s
    out_s[...] = (line(refs.mine_s) + line(out_s)).astype(out_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, refs.mlp.out.at[rows, columns])


def scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order in which `kernel` takes them."""
    share = sizes.share
    squares = plgpu.SMEM((MAX_CLUSTERS, 2 * share), jnp.float32, transforms=swizzled(jnp.float32, 2 * share))
    return [
        plgpu.SMEM((share, TILE), sizes.dtype, transforms=swizzled(sizes.dtype)),
        plgpu.SMEM((share,), jnp.float32),
        plgpu.SMEM((2 * share,), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(),
        *gated.scratch(sizes, squares),
    ]
