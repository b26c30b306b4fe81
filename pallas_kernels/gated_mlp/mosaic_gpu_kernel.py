"""The kernel of the gated feed-forward layer: what the warpgroups of a CTA do. `mosaic_gpu` tells what it is for."""

from collections.abc import Callable
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
REDUCTION_BYTES = 2048  # of shared memory, for sums over warps
ALIGNMENT = 1024  # bytes that a buffer takes at least

# [tokens, 32 features] in registers: a warp holds whole rows.
ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

Load = Callable[[Any, Any], None]  # of a step into a stage of the ring


@dataclass(frozen=True)
class Sizes:
    """Everything about a call that is known when it is traced.

    Attributes:
        tokens, width, inner, outputs: of the arrays.
        heads: features of a product before these, see `pallas_kernels.block_tail`; 0 without one.
        step: features of a stage.
        stages: of the ring.
        dtype: of the arrays.
    """

    tokens: int
    width: int
    inner: int
    outputs: int
    heads: int
    step: int
    stages: int
    dtype: DTypeLike

    @classmethod
    def fit(cls, tokens: int, width: int, inner: int, outputs: int, dtype: DTypeLike, heads: int = 0) -> "Sizes":
        """The sizes for 16-bit arrays.

        Raises:
            NotImplementedError: the kernel cannot serve these shapes; the message names the values.
        """
        if outputs % TILE or inner % TILE:
            raise NotImplementedError(f"{inner} inner features and {outputs} outputs are not multiples of {TILE}")
        longest = 256 if tokens <= tuned("hopper", "gated_mlp")["long_stage_tokens"] else 128  # or too few stages fit
        inputs = (width, inner // 2, heads // 2) if heads else (width, inner // 2)
        step = min(stage_features(features, longest) for features in inputs)
        sizes = cls(tokens, width, inner, outputs, heads, step, 0, dtype)
        half = TILE * sizes.share
        exchange = max(TILE * min(sizes.rows, TOKENS), 2 * half) * 4
        other_bytes = exchange + sizes.rows * HALF * 2 + half * 2
        if heads:
            other_bytes += half * 2 + 2 * ALIGNMENT + REDUCTION_BYTES
        return replace(sizes, stages=fit_stages(sizes.rows, step, other_bytes))

    @property
    def rows(self) -> int:
        """Tokens with padding."""
        return whole_groups(self.tokens)

    @property
    def clusters(self) -> int:
        return self.outputs // TILE

    @property
    def ctas(self) -> int:
        return self.clusters * 2

    @property
    def share(self) -> int:
        """Tokens whose outputs a CTA of a cluster finishes."""
        return whole_groups(self.rows // 2)

    @property
    def tiles(self) -> int:
        return self.inner // HALF


class Refs(NamedTuple):
    """The kernel's references: inputs, outputs, SMEM (`_s`) and barriers. `both_s` and `halves_s` are one buffer."""

    x: Any
    gate_up: Any
    down: Any
    inner: Any
    out: Any
    both_s: Any
    halves_s: Any
    inner_s: Any
    out_s: Any
    exchanged: Any
    ring: Ring


@dataclass(frozen=True)
class Part:
    """A CTA's part of the work: its place, how many tiles it has, and how many stages each product takes."""

    cluster: Any
    half: Any
    cta: Any
    tiles: Any
    heads_steps: int
    first_steps: int  # of each tile
    second_steps: int

    @classmethod
    def mine(cls, sizes: Sizes) -> "Part":
        """That of the CTA that asks."""
        cluster, half = lax.axis_index("cluster"), lax.axis_index("half")
        cta, ctas = cluster * 2 + half, sizes.ctas
        tiles = lax.div(sizes.tiles - cta + ctas - 1, ctas)
        halves = (sizes.heads // sizes.step // 2, sizes.inner // sizes.step // 2)
        return cls(cluster, half, cta, tiles, halves[0], sizes.width // sizes.step, halves[1])

    @property
    def border(self) -> Any:
        """Stages before the second product."""
        return self.heads_steps + self.tiles * self.first_steps


@plgpu.inline_mgpu()
def proxy_fence(_: Any) -> None:
    """Order this CTA's ordinary accesses to global memory and its TMA copies."""
    mgpu_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)


def kernel(sizes: Sizes, *references: Any) -> None:
    """The body: a TMA warpgroup and one that computes; a counter tells how many CTAs have stored their tiles."""
    x, gate_up, down, inner, out, union, *others = references
    refs = Refs(x, gate_up, down, inner, out, *union, *others[:3], ring=Ring(*others[3:]))
    part, wg = Part.mine(sizes), lax.axis_index("wg")
    stored = pl.get_global(plgpu.SemaphoreType.REGULAR((COUNTERS,))).at[0]

    @pl.when(wg == 1)
    def _():
        load_first(sizes, refs, part, None)
        load_second(sizes, refs, part, stored)

    @pl.when(wg == 0)
    def _():
        activations(sizes, refs, part, None)
        publish(stored)
        finish(sizes, refs, part, refs.ring.multiply(part.border, part.second_steps), store)


def publish(stored: Any) -> None:
    """Let all CTAs know that what this one copies to global memory is there."""
    plgpu.wait_smem_to_gmem(0)
    proxy_fence()  # pyright: ignore[reportCallIssue]
    plgpu.semaphore_signal(stored, memory_scope="gpu")


def await_all(sizes: Sizes, stored: Any) -> None:
    """Until every CTA has published."""
    plgpu.semaphore_wait(stored, sizes.ctas, decrement=False, memory_scope="gpu")
    proxy_fence()  # pyright: ignore[reportCallIssue]


def fill(ring: Ring, first: Any, count: Any, weights: Load, tokens: Load, wait: Callable[[], None] | None) -> None:
    """Loads of a product from the `first` on: weights as soon as there is room, tokens when `wait` returns."""
    early = jnp.int32(0) if wait is None else jnp.minimum(ring.stages, count)
    pl.loop(0, early)(lambda i: weights(i, ring.wait_free(first + i)))
    if wait is not None:
        wait()
    pl.loop(0, early)(lambda i: tokens(i, lax.rem(first + i, ring.stages)))

    @pl.loop(early, count)
    def _(i: Any):
        stage = ring.wait_free(first + i)
        weights(i, stage)
        tokens(i, stage)


def load_first(sizes: Sizes, refs: Refs, part: Part, wait: Callable[[], None] | None) -> None:
    """The TMA warpgroup: gates and ups of all tiles."""
    ring = refs.ring

    def weights(i: Any, stage: Any) -> None:
        tile, k = part.cta + lax.div(i, part.first_steps) * sizes.ctas, lax.rem(i, part.first_steps)
        for which in range(2):
            wanted = refs.gate_up.at[pl.ds(tile * HALF, HALF), which, features(sizes, k)]
            plgpu.copy_gmem_to_smem(wanted, ring.weights.at[stage, pl.ds(which * HALF, HALF)], ring.full.at[stage])

    def tokens(i: Any, stage: Any) -> None:
        load_tokens(sizes, ring, refs.x, lax.rem(i, part.first_steps), stage)

    fill(ring, part.heads_steps, part.tiles * part.first_steps, weights, tokens, wait)


def load_second(sizes: Sizes, refs: Refs, part: Part, stored: Any) -> None:
    """The TMA warpgroup: this half of the cluster's outputs, when all CTAs have stored their activations."""
    weights, tokens = halved(sizes, refs.ring, part, refs.down, refs.inner, part.second_steps)
    fill(refs.ring, part.border, part.second_steps, weights, tokens, lambda: await_all(sizes, stored))
    refs.ring.drain(part.border + part.second_steps)


def halved(sizes: Sizes, ring: Ring, part: Part, matrix: Any, x: Any, steps: int) -> tuple[Load, Load]:
    """Loads of a product of whose sums a CTA computes one half: of the weights, and of the tokens."""

    def weights(i: Any, stage: Any) -> None:
        for which in range(2):  # the barriers expect three copies
            outputs = pl.ds(part.cluster * TILE + which * HALF, HALF)
            wanted = matrix.at[outputs, features(sizes, part.half * steps + i)]
            plgpu.copy_gmem_to_smem(wanted, ring.weights.at[stage, pl.ds(which * HALF, HALF)], ring.full.at[stage])

    return weights, lambda i, stage: load_tokens(sizes, ring, x, part.half * steps + i, stage)


def load_tokens(sizes: Sizes, ring: Ring, x: Any, k: Any, stage: Any) -> None:
    """The k-th features of all tokens."""
    wanted = x.at[pl.ds(0, sizes.rows), features(sizes, k)]
    plgpu.copy_gmem_to_smem(wanted, ring.tokens.at[stage], ring.full.at[stage])


def features(sizes: Sizes, k: Any) -> Any:
    """Those of the k-th stage."""
    return pl.ds(k * sizes.step, sizes.step)


def activations(sizes: Sizes, refs: Refs, part: Part, factors_s: Any) -> None:
    """The other warpgroup: my tiles of activations, of gates and ups times a factor of each token, if any."""

    @pl.loop(0, part.tiles)
    def _(r: Any):
        acc = refs.ring.multiply(part.heads_steps + r * part.first_steps, part.first_steps)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
        for start in range(0, sizes.rows, TOKENS):
            activate(sizes, refs, acc, start, factors_s)
        columns = pl.ds((part.cta + r * sizes.ctas) * HALF, HALF)
        plgpu.copy_smem_to_gmem(refs.inner_s, refs.inner.at[pl.ds(0, sizes.rows), columns])


def activate(sizes: Sizes, refs: Refs, acc: Any, start: int, factors_s: Any) -> None:
    """Activations of some tokens of a tile, whose gates and ups are in different warps."""
    size = min(TOKENS, sizes.rows - start)
    refs.both_s.at[pl.ds(0, size)].T[...] = turned(acc[:, start : start + size])
    plgpu.commit_smem()
    gate, up = (
        plgpu.load(refs.both_s.at[pl.ds(0, size), pl.ds(first, HALF)], layout=ROWS, optimized=False)
        for first in (0, HALF)
    )
    if factors_s is not None:
        some = plgpu.load(factors_s.at[pl.ds(start, size)], layout=ROWS.reduce(1), optimized=False)
        factors = plgpu.layout_cast(lax.broadcast_in_dim(some, gate.shape, (0,)), ROWS)
        gate, up = gate * factors, up * factors
    refs.inner_s[pl.ds(start, size)] = (gate / (1 + jnp.exp(-gate)) * up).astype(sizes.dtype)
    plgpu.commit_smem()


def finish(sizes: Sizes, refs: Refs, part: Part, acc: Any, then: Callable[[Refs, Part, Any], None]) -> None:
    """Send each CTA of the cluster my sums for its share of the tokens, and add up mine: `out_s`, for `then`."""
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
        then(refs, part, pl.ds(part.half * sizes.share, sizes.share))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store(refs: Refs, part: Part, rows: Any) -> None:
    """My share of the outputs."""
    plgpu.copy_smem_to_gmem(refs.out_s, refs.out.at[rows, pl.ds(part.cluster * TILE, TILE)])


def scratch(sizes: Sizes, *others: Any) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`; `others` lie where a buffer is."""
    rows, share, dtype = sizes.rows, sizes.share, sizes.dtype
    even = share if rows == 2 * share else 8  # tokens that divide the shares of both CTAs
    both = plgpu.SMEM((min(rows, TOKENS), TILE), jnp.float32, transforms=swizzled(jnp.float32))
    halves = plgpu.SMEM((2, TILE, share), jnp.float32, transforms=swizzled(jnp.float32, even))
    return [
        plgpu.RefUnion(both, halves, *others),
        plgpu.SMEM((rows, HALF), dtype),
        plgpu.SMEM((share, TILE), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_arrivals=2),
        *ring_scratch(rows, sizes.step, sizes.stages, 3, dtype),
    ]
