"""The prefill attention kernel: what the warpgroups of a CTA do. `hopper_prefill` tells what it is for."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import DTypeLike

from pallas_kernels.attention.hopper import ACC, NEG, PAGE, WG_ROWS, softmax_step, spread

TILE_WORDS = 5  # first row, its position, rows, sequence, keys up to the last row's own


@dataclass(frozen=True)
class Sizes:
    """Everything about a call that is known when it is traced.

    Attributes:
        ctas, block, stages, shared: as in `PrefillConfig`.
        heads, group, width: query heads, of these per key head, and their width.
        dtype: of the queries and the cache.
        scale, window, soft_cap: as the op has them.
        interpreted: whether the interpreter runs this; it takes operands from SMEM and fresh accumulators only.
    """

    ctas: int
    block: int
    stages: int
    shared: bool
    heads: int
    group: int
    width: int
    dtype: DTypeLike
    scale: float
    window: int | None
    soft_cap: float | None
    interpreted: bool


class Refs(NamedTuple):
    """The kernel's references: inputs, output, SMEM (`_in`, `_s`) and barriers."""

    layer: Any
    table: Any
    tiles: Any
    q: Any
    kv: Any
    out: Any
    q_s: Any
    q_in: Any
    o_own: Any
    k_s: Any
    v_s: Any
    p_s: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any

    def take_turn(self) -> None:
        """Let the other compute warpgroup go on, and wait until it lets me."""
        plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(self.turn)


@dataclass(frozen=True)
class Worker:
    """One CTA's share, as one of its warpgroups sees it."""

    sizes: Sizes
    refs: Refs
    cta: Any
    wg: Any
    items: Any

    def describe(self, k: Any) -> tuple[Any, ...]:
        """Head and tile words of the CTA's k-th item."""
        item = jnp.maximum(place(self.sizes, self.cta, jnp.minimum(k, self.items - 1)), 0)
        tile = lax.div(item, self.sizes.heads) * TILE_WORDS
        return (lax.rem(item, self.sizes.heads), *(self.refs.tiles[tile + j] for j in range(TILE_WORDS)))

    def blocks(self, position: Any, keys: Any) -> tuple[Any, Any]:
        """First block of keys that a tile sees, and one past the last."""
        window, block = self.sizes.window, self.sizes.block
        first = 0 if window is None else lax.div(jnp.maximum(position - window + 1, 0), block)
        return first, pl.cdiv(keys, block)


def place(sizes: Sizes, cta: Any, k: Any) -> Any:
    """Number of a CTA's k-th item: back and forth over the items, longest first, which evens out the load."""
    return k * sizes.ctas + jnp.where(lax.rem(k, 2) == 0, cta, sizes.ctas - 1 - cta)


def kernel(sizes: Sizes, *references: Any) -> None:
    """The body: two compute warpgroups and one for TMA."""
    refs = Refs(*references)
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    num_items = refs.tiles[refs.tiles.shape[0] - 1] * sizes.heads
    rounds = lax.div(num_items + sizes.ctas - 1, sizes.ctas)
    items = jnp.where(place(sizes, cta, rounds - 1) < num_items, rounds, rounds - 1)
    worker = Worker(sizes, refs, cta, wg, items)
    pl.when(wg < 2)(functools.partial(compute, worker))
    pl.when(wg == 2)(functools.partial(load, worker))


def compute(worker: Worker) -> None:
    """A compute warpgroup: item by item, the first one a turn ahead of the second."""
    plgpu.set_max_registers(232, action="increase")
    pl.when(worker.wg == 1)(worker.refs.take_turn)
    lax.fori_loop(0, worker.items, functools.partial(compute_item, worker), jnp.int32(0))
    pl.when(worker.wg == 0)(worker.refs.take_turn)
    plgpu.wait_smem_to_gmem(0)


def compute_item(worker: Worker, n: Any, done: Any) -> Any:
    """My 64 rows of the CTA's n-th item."""
    sizes, refs, wg, block = worker.sizes, worker.refs, worker.wg, worker.sizes.block
    o_s = refs.q_in if sizes.shared else refs.o_own
    head, row, position, rows, _, keys = worker.describe(n)
    first, end = worker.blocks(position, keys)
    row, position = row + wg * WG_ROWS, position + wg * WG_ROWS
    mine = pl.cdiv(jnp.minimum(keys, position + WG_ROWS), block)  # one past the last block my half needs
    clear = jnp.clip(lax.div(position + 1, block), first, mine)  # up to here without a mask
    plgpu.barrier_wait(refs.q_full.at[wg])
    refs.q_s[wg] = plgpu.load(refs.q_in.at[wg], layout=plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()
    if not sizes.shared:
        plgpu.barrier_arrive(refs.q_free.at[wg])
    plgpu.barrier_wait(refs.k_full.at[lax.rem(done, sizes.stages)])
    step = functools.partial(attend_block, worker, done, first, position, mine)
    state = empty_state(sizes)
    if sizes.window is None:
        state = lax.fori_loop(first, clear, functools.partial(step, masked=False), state)
        acc, _, total = lax.fori_loop(clear, mine, functools.partial(step, masked=True), state)
    else:
        acc, _, total = lax.fori_loop(first, mine, functools.partial(step, masked=True), state)
    skip_rest(worker, done, mine - first, end - first)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    o_s[wg] = (acc / spread(total, acc)).astype(sizes.dtype)
    plgpu.commit_smem()
    store(refs.out, o_s, wg, head, row, rows - wg * WG_ROWS)
    if sizes.shared:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.q_free.at[wg])
    return done + end - first


def empty_state(sizes: Sizes) -> tuple[Any, Any, Any]:
    """Accumulator, row maxima and row sums of nothing."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.zeros((WG_ROWS, sizes.width), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WG_ROWS,), NEG, jnp.float32), rows),
        plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), rows),
    )


def attend_block(
    worker: Worker, done: Any, first: Any, position: Any, mine: Any, i: Any, carry: Any, *, masked: bool
) -> Any:
    """Add the i-th block of keys and values; `done` blocks of other items came before the tile's `first` one."""
    sizes, refs, wg = worker.sizes, worker.refs, worker.wg
    acc, top, total = carry
    slot = lax.rem(done + i - first, sizes.stages)

    def product(scores):
        plgpu.wgmma(scores, refs.q_s.at[wg], refs.k_s.at[slot].T)
        refs.take_turn()
        return scores[...]

    scores = pl.run_scoped(product, ACC((WG_ROWS, sizes.block), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[slot])
    visible = causal(scores.shape, position - i * sizes.block, sizes.window) if masked else None
    weights, decay, top, total = softmax_step(scores, top, total, sizes.scale, sizes.soft_cap, visible)
    acc *= spread(decay, acc)
    acc, total, top, weights = lax.optimization_barrier((acc, total, top, weights.astype(sizes.dtype)))
    plgpu.barrier_arrive(refs.turn)  # softmax done: the other half may do its own
    plgpu.barrier_wait(refs.v_full.at[slot])
    plgpu.barrier_wait(refs.turn)

    def mix(a):
        plgpu.wgmma(a, refs.p_s.at[wg] if sizes.interpreted else weights, refs.v_s.at[slot])

        @pl.when(i + 1 < mine)
        def wait_next_keys():
            plgpu.barrier_wait(refs.k_full.at[lax.rem(done + i + 1 - first, sizes.stages)])

    if sizes.interpreted:
        refs.p_s[wg] = weights
        plgpu.commit_smem()
        acc += pl.run_scoped(lambda a: (mix(a), a[...])[1], ACC((WG_ROWS, sizes.width), jnp.float32))
    else:
        acc = pl.run_state(mix)(ACC.init(acc))
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return acc, top, total


def causal(shape: tuple[int, ...], offset: Any, window: int | None) -> Any:
    """Which columns rows see, where row `r` stands at column `r + offset`."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    distance = iota(0) - iota(1) + offset
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def skip_rest(worker: Worker, done: Any, seen: Any, steps: Any) -> None:
    """The other half has one block more: keep barriers, phases and turns in step."""
    refs = worker.refs

    @pl.loop(seen, steps)
    def _(i):
        slot = lax.rem(done + i, worker.sizes.stages)
        plgpu.barrier_wait(refs.k_full.at[slot])
        plgpu.barrier_arrive(refs.k_free.at[slot])
        refs.take_turn()
        plgpu.barrier_wait(refs.v_full.at[slot])
        plgpu.barrier_arrive(refs.v_free.at[slot])
        refs.take_turn()


def store(out: Any, o_s: Any, wg: Any, head: Any, row: Any, left: Any) -> None:
    """My staged rows to the output, `left` of them."""

    @pl.when(left >= WG_ROWS)
    def _():
        plgpu.copy_smem_to_gmem(o_s.at[wg], out.at[pl.ds(row, WG_ROWS), head])

    @pl.when(left < WG_ROWS)
    def _():  # ragged end: a whole-tile store would overwrite the next sequence
        @pl.loop(0, jnp.maximum(left, 0))
        def _(r):
            plgpu.copy_smem_to_gmem(o_s.at[wg, pl.ds(r, 1)], out.at[pl.ds(row + r, 1), head])


def load(worker: Worker) -> None:
    """The TMA warpgroup: keep queries, keys and values coming."""
    sizes, refs = worker.sizes, worker.refs
    plgpu.set_max_registers(40, action="decrease")
    item = functools.partial(load_item, worker, refs.layer[0])
    done, _ = lax.fori_loop(0, worker.items, item, (jnp.int32(0), worker.describe(0)))

    # Drain, so that every barrier ends in a completed phase (the interpreter checks it).
    @pl.when(worker.items > 0)
    def _():
        for half in range(2):
            plgpu.barrier_wait(refs.q_free.at[half])

    @pl.loop(jnp.maximum(done - sizes.stages, 0), done)
    def _(i):
        plgpu.barrier_wait(refs.k_free.at[lax.rem(i, sizes.stages)])
        plgpu.barrier_wait(refs.v_free.at[lax.rem(i, sizes.stages)])


def load_item(worker: Worker, layer: Any, n: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
    """Queries, keys and values of the CTA's n-th item; the next item's words are read ahead of their use."""
    sizes, refs, stages = worker.sizes, worker.refs, worker.sizes.stages
    block_pages = sizes.block // PAGE
    done, (head, row, position, _, seq, keys) = carry
    first, end = worker.blocks(position, keys)
    following = worker.describe(n + 1)
    key_head, last = lax.div(head, sizes.group), pl.cdiv(keys, PAGE) - 1

    def pages(i):  # past the last page repeat it: its columns are masked
        return tuple(refs.table[seq, jnp.minimum(block_pages * i + j, last)] for j in range(block_pages))

    def load_queries(half):
        # Rows start anywhere, but a tiled buffer takes boxes at multiples of 8 rows only: use a plain one that the
        # compute warpgroups copy.
        @pl.when(n > 0)
        def _():
            plgpu.barrier_wait(refs.q_free.at[half])

        source = refs.q.at[pl.ds(row + half * WG_ROWS, WG_ROWS), head]
        plgpu.copy_gmem_to_smem(source, refs.q_in.at[half], refs.q_full.at[half])

    def load_block(t, slot, ids, kind, buffer, full, free):
        @pl.when(t >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        for j in range(block_pages):
            target = buffer.at[slot, pl.ds(j * PAGE, PAGE)]
            plgpu.copy_gmem_to_smem(refs.kv.at[layer, ids[j], kind, key_head], target, full.at[slot])

    def step(i, ids):
        t = done + i - first
        slot = lax.rem(t, stages)
        upcoming = pages(i + 1)
        load_block(t, slot, ids, 0, refs.k_s, refs.k_full, refs.k_free)
        # The second half can only end its last item once the first has keys for its next one.
        pl.when(i == first)(functools.partial(load_queries, 1))
        load_block(t, slot, ids, 1, refs.v_s, refs.v_full, refs.v_free)
        return upcoming

    load_queries(0)
    lax.fori_loop(first, end, step, pages(first))
    return done + end - first, following
