"""The kernel of the gated feed-forward layer: what the warpgroups of a CTA do. `mosaic_gpu` tells what it is for."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import DTypeLike

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
from pallas_kernels.tuning import tuned

HALF = TILE // 2  # inner features of a tile: gates and ups are a half of its rows each
TOKENS = 32  # whose gates and ups are brought together at a time
# Of which one counts: XLA clears several in one kernel for all layers, a lone one by a copy for each. Not a likely
# number of sequences: their zeros would be taken for these, and copied for each layer.
COUNTERS = 37

# [tokens, 32 features] in registers: a warp holds whole rows.
ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclass(frozen=True)
class Sizes:
    """Everything about a call that is known when it is traced.

    Attributes:
        tokens, width, inner, outputs: of the arrays.
        step: features of a stage.
        stages: of the ring.
        dtype: of the arrays.
    """

    tokens: int
    width: int
    inner: int
    outputs: int
    step: int
    stages: int
    dtype: DTypeLike

    @classmethod
    def fit(cls, tokens: int, width: int, inner: int, outputs: int, dtype: DTypeLike) -> "Sizes":
        """The sizes for 16-bit arrays.

        Raises:
            NotImplementedError: the kernel cannot serve these shapes; the message names the values.
        """
        if outputs % TILE or inner % TILE:
            raise NotImplementedError(f"{inner} inner features and {outputs} outputs are not multiples of {TILE}")
        longest = 256 if tokens <= tuned("hopper", "gated_mlp")["long_stage_tokens"] else 128  # or too few stages fit
        step = min(stage_features(width, longest), stage_features(inner // 2, longest))
        sizes = cls(tokens, width, inner, outputs, step, 0, dtype)
        together, half = TILE * min(sizes.rows, TOKENS) * 4, TILE * sizes.share
        other_bytes = together + sizes.rows * HALF * 2 + half * 2 + 2 * half * 4
        return replace(sizes, stages=fit_stages(sizes.rows, step, other_bytes))

    @property
    def rows(self) -> int:
        """Tokens with padding."""
        return whole_groups(self.tokens)

    @property
    def clusters(self) -> int:
        return self.outputs // TILE

    @property
    def share(self) -> int:
        """Tokens whose outputs a CTA of a cluster finishes."""
        return whole_groups(self.rows // 2)

    @property
    def tiles(self) -> int:
        return self.inner // HALF


class Refs(NamedTuple):
    """The kernel's references: inputs, outputs, SMEM (`_s`) and barriers."""

    x: Any
    gate_up: Any
    down: Any
    inner: Any
    out: Any
    both_s: Any
    inner_s: Any
    out_s: Any
    halves_s: Any
    exchanged: Any
    ring: Ring


@dataclass(frozen=True)
class Part:
    """A CTA's part of the work: its place, how many tiles it has, and how many stages each product takes."""

    cluster: Any
    half: Any
    cta: Any
    tiles: Any
    first_steps: int  # of each tile
    second_steps: int

    @property
    def border(self) -> Any:
        """Stages of the first product."""
        return self.tiles * self.first_steps


@plgpu.inline_mgpu()
def proxy_fence(_: Any) -> None:
    """Order this CTA's ordinary accesses to global memory and its TMA copies."""
    mgpu_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)


def kernel(sizes: Sizes, *references: Any) -> None:
    """The body: a TMA warpgroup and one that computes; a counter tells how many CTAs have stored their tiles."""
    refs = Refs(*references[:10], ring=Ring(*references[10:]))
    counter = pl.get_global(plgpu.SemaphoreType.REGULAR((COUNTERS,))).at[0]
    cluster, half, wg = lax.axis_index("cluster"), lax.axis_index("half"), lax.axis_index("wg")
    cta, ctas = cluster * 2 + half, sizes.clusters * 2
    tiles = lax.div(sizes.tiles - cta + ctas - 1, ctas)
    part = Part(cluster, half, cta, tiles, sizes.width // sizes.step, sizes.inner // sizes.step // 2)
    pl.when(wg == 1)(lambda: load(sizes, refs, part, counter))
    pl.when(wg == 0)(lambda: compute(sizes, refs, part, counter))


def load(sizes: Sizes, refs: Refs, part: Part, counter: Any) -> None:
    """The TMA warpgroup: weights as soon as there is room, activations when all CTAs have stored theirs."""
    ring, ctas = refs.ring, sizes.clusters * 2
    halves = [pl.ds(0, HALF), pl.ds(HALF, HALF)]

    def features(k: Any) -> Any:
        return pl.ds(k * sizes.step, sizes.step)

    def first(i: Any, place: tuple[Any, Any]) -> tuple[Any, Any]:
        tile, k = place
        stage = ring.wait_free(i)
        for which, rows in enumerate(halves):
            wanted = refs.gate_up.at[pl.ds(tile * HALF, HALF), which, features(k)]
            plgpu.copy_gmem_to_smem(wanted, ring.weights.at[stage, rows], ring.full.at[stage])
        tokens = refs.x.at[pl.ds(0, sizes.rows), features(k)]
        plgpu.copy_gmem_to_smem(tokens, ring.tokens.at[stage], ring.full.at[stage])
        last = k + 1 == part.first_steps
        return jnp.where(last, tile + ctas, tile), jnp.where(last, 0, k + 1)

    def weights(i: Any) -> None:
        stage = ring.wait_free(part.border + i)
        for which, rows in enumerate(halves):  # the barriers expect three copies
            outputs = pl.ds(part.cluster * TILE + which * HALF, HALF)
            wanted = refs.down.at[outputs, features(part.half * part.second_steps + i)]
            plgpu.copy_gmem_to_smem(wanted, ring.weights.at[stage, rows], ring.full.at[stage])

    def activations(i: Any) -> None:
        stage = lax.rem(part.border + i, ring.stages)
        wanted = refs.inner.at[pl.ds(0, sizes.rows), features(part.half * part.second_steps + i)]
        plgpu.copy_gmem_to_smem(wanted, ring.tokens.at[stage], ring.full.at[stage])

    def second(i: Any) -> None:
        weights(i)
        activations(i)

    lax.fori_loop(0, part.border, first, (part.cta, jnp.int32(0)))
    early = min(sizes.stages, part.second_steps)
    pl.loop(0, early)(weights)
    plgpu.semaphore_wait(counter, ctas, decrement=False, memory_scope="gpu")
    proxy_fence()  # pyright: ignore[reportCallIssue]
    pl.loop(0, early)(activations)
    pl.loop(early, part.second_steps)(second)
    ring.drain(part.border + part.second_steps)


def compute(sizes: Sizes, refs: Refs, part: Part, counter: Any) -> None:
    """The other warpgroup: my tiles of activations, then my half of the cluster's outputs."""

    @pl.loop(0, part.tiles)
    def _(r: Any):
        acc = refs.ring.multiply(r * part.first_steps, part.first_steps)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
        for start in range(0, sizes.rows, TOKENS):
            activate(sizes, refs, acc, start)
        columns = pl.ds((part.cta + r * sizes.clusters * 2) * HALF, HALF)
        plgpu.copy_smem_to_gmem(refs.inner_s, refs.inner.at[pl.ds(0, sizes.rows), columns])

    plgpu.wait_smem_to_gmem(0)
    proxy_fence()  # pyright: ignore[reportCallIssue]
    plgpu.semaphore_signal(counter, memory_scope="gpu")
    acc = refs.ring.multiply(part.border, part.second_steps)
    finish(sizes, refs, part, acc)


def activate(sizes: Sizes, refs: Refs, acc: Any, start: int) -> None:
    """Activations of some tokens of a tile, whose gates and ups are in different warps."""
    size = min(TOKENS, sizes.rows - start)
    refs.both_s.at[pl.ds(0, size)].T[...] = turned(acc[:, start : start + size])
    plgpu.commit_smem()
    gate, up = (
        plgpu.load(refs.both_s.at[pl.ds(0, size), pl.ds(first, HALF)], layout=ROWS, optimized=False)
        for first in (0, HALF)
    )
    refs.inner_s[pl.ds(start, size)] = (gate / (1 + jnp.exp(-gate)) * up).astype(sizes.dtype)
    plgpu.commit_smem()


def finish(sizes: Sizes, refs: Refs, part: Part, acc: Any) -> None:
    """Send each CTA of the cluster my sums for its share of the tokens, and add up and store mine."""
    starts = range(0, sizes.rows, sizes.share)
    for peer, start in enumerate(starts):
        size = min(sizes.share, sizes.rows - start)
        plgpu.async_store_smem(
            acc[:, start : start + size], refs.halves_s.at[part.half, :, pl.ds(0, size)], refs.exchanged,
            cluster_idx=jnp.int32(peer), cluster_dim="half", optimized=False,
        )  # fmt: skip

    @pl.when(part.half < len(starts))
    def _():
        plgpu.barrier_wait(refs.exchanged)
        one, other = (
            plgpu.load(refs.halves_s.at[half], layout=plgpu.Layout.WGMMA, optimized=False) for half in range(2)
        )
        refs.out_s.T[...] = turned((one + other).astype(sizes.dtype))
        plgpu.commit_smem()
        rows, columns = pl.ds(part.half * sizes.share, sizes.share), pl.ds(part.cluster * TILE, TILE)
        plgpu.copy_smem_to_gmem(refs.out_s, refs.out.at[rows, columns])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    rows, share, dtype = sizes.rows, sizes.share, sizes.dtype
    even = share if rows == 2 * share else 8  # tokens that divide the shares of both CTAs
    return [
        plgpu.SMEM((min(rows, TOKENS), TILE), jnp.float32, transforms=swizzled(jnp.float32)),
        plgpu.SMEM((rows, HALF), dtype),
        plgpu.SMEM((share, TILE), dtype, transforms=swizzled(dtype)),
        plgpu.SMEM((2, TILE, share), jnp.float32, transforms=swizzled(jnp.float32, even)),
        plgpu.Barrier(num_arrivals=2),
        *ring_scratch(rows, sizes.step, sizes.stages, 3, dtype),
    ]
