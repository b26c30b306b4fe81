"""The streaming attention kernel: what the warpgroups of a CTA do. `hopper_stream` tells what it is for."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import DTypeLike

from pallas_kernels.attention.hopper import ACC, NEG, PAGE, WG_ROWS, WG_THREADS, softmax_step, spread

TILE_WORDS = 6  # first row, tokens, sequence, position of the first row, first page, pages
RUN_WORDS = 6  # first (tile, head) group, first page of it, its place, pages in all, groups touched, pages of the last
MERGE = 8  # partial results whose loads are in flight together
STRIP = PAGE // 4  # tokens: of a page that is not full, as many strips are read as hold some

whole_load = functools.partial(plgpu.load, optimized=False)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a wgmma tile


@dataclass(frozen=True)
class Sizes:
    """Everything about a call that is known when it is traced.

    Attributes:
        ctas, warpgroups, stages, queries, compact, whole: as in `StreamConfig`.
        tile_tokens: tokens of one sequence that share a tile.
        num_tiles, pages_per_seq: as in `StreamPlan`.
        num_tokens, heads, key_heads, width: of the queries and the cache.
        dtype: of the queries and the cache.
        scale, window, soft_cap: as the op has them.
        interpreted: whether the interpreter runs this; it takes operands from SMEM and fresh accumulators only.
    """

    ctas: int
    warpgroups: int
    stages: int
    queries: int
    compact: bool
    whole: bool
    tile_tokens: int
    num_tiles: int
    pages_per_seq: int
    num_tokens: int
    heads: int
    key_heads: int
    width: int
    dtype: DTypeLike
    scale: float
    window: int | None
    soft_cap: float | None
    interpreted: bool

    @property
    def totals(self) -> int:
        """Place of the totals in the words of the plan, behind those of the runs."""
        return self.ctas * (RUN_WORDS + TILE_WORDS)

    @property
    def tiles(self) -> int:
        """Place of the tiles."""
        return self.totals + 2

    @property
    def table(self) -> int:
        """Place of the page table."""
        return self.tiles + self.num_tiles * TILE_WORDS

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.key_heads

    @property
    def per(self) -> int:
        """Tokens of a warpgroup."""
        return self.tile_tokens // self.warpgroups

    @property
    def alone(self) -> bool:
        """One compute warpgroup, which serves one token."""
        return self.warpgroups == 1

    @property
    def room(self) -> int:
        """Tokens that the buffer of arriving queries holds: a warpgroup reads 64 rows, used or not."""
        return -(-((self.warpgroups - 1) * self.per * self.group + WG_ROWS) // self.group)

    @property
    def partial(self) -> tuple[int, ...]:
        """Shape of the accumulator of a partial result."""
        return (self.group * self.width,) if self.compact else (self.warpgroups * WG_ROWS, self.width)


class Refs(NamedTuple):
    """The kernel's references: inputs, outputs, SMEM (`_in`, `_s`) and barriers."""

    layer: Any
    words: Any
    q: Any
    kv: Any
    out: Any
    acc: Any
    stat: Any
    q_in: Any
    q_s: Any
    k_s: Any
    v_s: Any
    o_s: Any
    p_s: Any
    acc_s: Any
    stat_s: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    free: Any
    cleared: Any


@dataclass(frozen=True)
class Run:
    """One CTA's run, as one of its warpgroups sees it; `mine` are a compute warpgroup's rows of partial results."""

    sizes: Sizes
    refs: Refs
    sems: Any
    cta: Any
    wg: Any
    first_group: Any
    first_page: Any
    first_place: Any
    size: Any
    touched: Any
    last_pages: Any
    mine: Any = None

    def cut(self, c: Any) -> Any:
        """Where a CTA's run begins in the order of all pages; as in the plan."""
        total, ctas = self.refs.words[self.sizes.totals], self.sizes.ctas
        return lax.div(total, ctas) * c + jnp.minimum(lax.rem(total, ctas), c)

    def begun_by(self, place: Any) -> Any:
        """The CTA whose run holds a place in the order of all pages."""
        total, ctas = self.refs.words[self.sizes.totals], self.sizes.ctas
        size, extra = lax.div(total, ctas), lax.rem(total, ctas)
        longer = extra * (size + 1)  # pages in the runs that have one more
        late = extra + lax.div(place - longer, jnp.maximum(size, 1))
        return jnp.where(place < longer, lax.div(place, size + 1), late)

    def others(self, missing: Any) -> Any:
        """How many CTAs after this one hold a group's `missing` pages."""
        return self.begun_by(self.cut(self.cta + 1) + missing - 1) - self.cta

    def begin(self) -> tuple[Any, ...]:
        """What `describe` says of the first group, from the words of the run: there is nothing to hide a look-up."""
        base = self.cta * (RUN_WORDS + TILE_WORDS) + RUN_WORDS
        words = (self.refs.words[base + j] for j in range(TILE_WORDS))
        return lax.rem(self.first_group, self.sizes.key_heads), *words

    def describe(self, i: Any) -> tuple[Any, ...]:
        """Head and tile words of the i-th group that the CTA works on.

        After the first, of which others may wait for a part, comes the last, of which it may want parts: these are
        there by then, and pages keep arriving while it merges them.
        """
        last = jnp.maximum(self.touched - 1, 0)
        number = self.first_group + jnp.where(i <= 1, jnp.minimum(i * last, last), jnp.minimum(i - 1, last))
        key_heads = self.sizes.key_heads
        tile = self.sizes.tiles + lax.div(number, key_heads) * TILE_WORDS
        return (lax.rem(number, key_heads), *(self.refs.words[tile + j] for j in range(TILE_WORDS)))

    def page(self, seq: Any, number: Any) -> Any:
        """A page of a sequence, by its place among the sequence's pages."""
        return self.refs.words[self.sizes.table + seq * self.sizes.pages_per_seq + number]

    def part(self, i: Any, pages: Any) -> tuple[Any, Any]:
        """First page of the i-th group that is in the run, and how many are."""
        start = jnp.where(i == 0, self.first_page, 0)
        first = jnp.minimum(pages - start, self.size)
        return start, jnp.where(i == 0, first, jnp.where(i == 1, self.last_pages, pages))


def kernel(sizes: Sizes, *references: Any) -> None:
    """The body: one TMA warpgroup behind the compute warpgroups."""
    refs = Refs(*references)
    semaphores = plgpu.SemaphoreType.REGULAR((sizes.ctas * sizes.warpgroups,))
    sems = None if sizes.whole else pl.get_global(semaphores)
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    run = Run(sizes, refs, sems, cta, wg, *(refs.words[cta * (RUN_WORDS + TILE_WORDS) + j] for j in range(RUN_WORDS)))
    pl.when(wg == sizes.warpgroups)(functools.partial(load, run))
    pl.when(wg < sizes.warpgroups)(functools.partial(compute, run))


def load(run: Run) -> None:
    """The TMA warpgroup: keep queries and pages coming."""
    sizes, refs = run.sizes, run.refs
    if not sizes.alone:
        plgpu.set_max_registers(40, action="decrease")
    segment = functools.partial(load_segment, run, refs.layer[0])
    start = jnp.int32(0), run.begin(), run.first_place
    done = lax.fori_loop(0, run.touched, segment, start)[0]

    # Drain, so that every barrier ends in a completed phase (the interpreter checks it).
    @pl.loop(jnp.maximum(done - sizes.stages, 0), done)
    def _(j):
        plgpu.barrier_wait(refs.free.at[lax.rem(j, sizes.stages)])

    @pl.loop(jnp.maximum(run.touched - sizes.queries, 0), run.touched)
    def _(i):
        plgpu.barrier_wait(refs.q_free.at[lax.rem(i, sizes.queries)])


def load_segment(run: Run, layer: Any, i: Any, carry: tuple[Any, tuple[Any, ...], Any]) -> tuple[Any, ...]:
    """Queries and pages of the run's i-th group; the next group's words and first page are read ahead of their use."""
    sizes, refs = run.sizes, run.refs
    group, tile_tokens, stages = sizes.group, sizes.tile_tokens, sizes.stages
    done, (head, row, tokens, seq, position, low, pages), first = carry
    following = run.describe(i + 1)
    following_first = run.page(following[3], following[5])
    start, count = run.part(i, pages)
    slot = lax.rem(i, sizes.queries)

    @pl.when(i >= sizes.queries)
    def _():
        plgpu.barrier_wait(refs.q_free.at[slot])

    if sizes.alone:
        source, box = refs.q.at[pl.ds((row * sizes.key_heads + head) * group, group)], pl.ds(0, group)
    else:
        source, box = refs.q.at[pl.ds(row, tile_tokens), head], pl.ds(0, tile_tokens)
    plgpu.copy_gmem_to_smem(source, refs.q_in.at[slot, box], refs.q_full.at[slot])
    base = low + start
    left = position + tokens - base * PAGE  # from the segment's first page on

    def fetch(j, page):
        stage = lax.rem(done + j, stages)
        upcoming = run.page(seq, base + jnp.minimum(j + 1, count - 1))

        @pl.when(done + j >= stages)
        def _():
            plgpu.barrier_wait(refs.free.at[stage])

        here = left - j * PAGE
        copy_page(refs.kv.at[layer, page, 0, head], refs.k_s.at[stage], refs.k_full.at[stage], here)
        pl.when(done + j == 0)(lambda: plgpu.barrier_wait(refs.cleared.at[0]))
        copy_page(refs.kv.at[layer, page, 1, head], refs.v_s.at[stage], refs.v_full.at[stage], here)
        return upcoming

    lax.fori_loop(0, count, fetch, first)
    return done + count, following, following_first


def copy_page(source: Any, target: Any, full: Any, tokens: Any) -> None:
    """Keys or values of the strips of a page that hold some of its tokens, the first in any case."""
    tokens = jnp.clip(tokens, 1, PAGE)
    for end in range(STRIP, PAGE + STRIP, STRIP):
        rows = pl.ds(0, end)
        copy = functools.partial(plgpu.copy_gmem_to_smem, source.at[rows], target.at[rows], full)
        pl.when((tokens > end - STRIP) & (tokens <= end))(copy)


def compute(run: Run) -> None:
    """A compute warpgroup: clear values and a share of the padding, then attend group by group."""
    if not run.sizes.alone:
        plgpu.set_max_registers(232, action="increase")
    run = replace(run, mine=pl.ds(run.wg * WG_ROWS, WG_ROWS))

    @pl.when(run.wg == 0)
    def _():
        pl.when(run.touched > 0)(lambda: clear_values(run))
        clear_padding(run)

    lax.fori_loop(0, run.touched, functools.partial(compute_segment, run), jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def compute_segment(run: Run, i: Any, done: Any) -> Any:
    """My rows of the run's i-th group."""
    sizes, refs, wg, per = run.sizes, run.refs, run.wg, run.sizes.per
    head, row, tokens, _, position, low, pages = run.describe(i)
    start, count = run.part(i, pages)
    slot = lax.rem(i, sizes.queries)
    tokens = jnp.minimum(tokens - wg * per, per)  # mine
    plgpu.barrier_wait(refs.q_full.at[slot])

    @pl.when(tokens > 0)
    def _():
        refs.q_s[wg] = my_queries(run, refs.q_in.at[slot])
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.q_free.at[slot])
        state = attend(run, done, count, position + wg * per, (low + start) * PAGE)
        missing = pages - start - count
        place = ((row + wg * per) * sizes.key_heads + head) * sizes.group, tokens
        finish(run, state, start, missing, place)

    @pl.when(tokens <= 0)
    def _():
        plgpu.barrier_arrive(refs.q_free.at[slot])

        @pl.loop(0, count)
        def _(j):
            stage = lax.rem(done + j, sizes.stages)
            plgpu.barrier_wait(refs.k_full.at[stage])
            plgpu.barrier_wait(refs.v_full.at[stage])
            plgpu.barrier_arrive(refs.free.at[stage])

    return done + count


def my_queries(run: Run, tile: Any) -> Any:
    """My 64 rows of the arrived queries, in registers; rows past my tokens are never stored."""
    sizes, group, width = run.sizes, run.sizes.group, run.sizes.width
    if sizes.alone:
        return whole_load(tile, layout=plgpu.Layout.WGMMA)
    if sizes.interpreted:  # it knows no reshaped references
        values = tile[pl.ds(run.wg * sizes.per, sizes.per)].reshape(sizes.per * group, width)
        return jnp.pad(values, ((0, WG_ROWS - sizes.per * group), (0, 0)))
    rows = tile.reshape(sizes.room * group, width).at[pl.ds(run.wg * (sizes.per * group), WG_ROWS)]
    return whole_load(rows, layout=plgpu.Layout.WGMMA)


def attend(run: Run, done: Any, count: Any, position: Any, column: Any) -> Any:
    """Running softmax of my rows over the segment's pages: accumulator, row maxima and row sums."""
    width = run.sizes.width
    start = (
        plgpu.layout_cast(jnp.zeros((WG_ROWS, width), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WG_ROWS,), NEG, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), ROWS),
    )
    return lax.fori_loop(0, count, functools.partial(attend_page, run, done, position, column), start)


def attend_page(run: Run, done: Any, position: Any, column: Any, j: Any, carry: Any) -> Any:
    """Add the segment's j-th page."""
    sizes, refs, wg = run.sizes, run.refs, run.wg
    acc, top, total = carry
    stage = lax.rem(done + j, sizes.stages)
    plgpu.barrier_wait(refs.k_full.at[stage])

    def product(scores):
        plgpu.wgmma(scores, refs.q_s.at[wg], refs.k_s.at[stage].T)
        return scores[...]

    scores = pl.run_scoped(product, ACC((WG_ROWS, PAGE), jnp.float32))
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    distance = lax.div(iota(0), jnp.int32(sizes.group)) - iota(1) + (position - column - j * PAGE)
    visible = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)
    weights, decay, top, total = softmax_step(scores, top, total, sizes.scale, sizes.soft_cap, visible)
    acc = acc * spread(decay, acc)
    weights = weights.astype(sizes.dtype)
    plgpu.barrier_wait(refs.v_full.at[stage])
    if sizes.interpreted:
        refs.p_s[wg] = weights
        plgpu.commit_smem()

        def mix(a):
            plgpu.wgmma(a, refs.p_s.at[wg], refs.v_s.at[stage])
            return a[...]

        acc += pl.run_scoped(mix, ACC((WG_ROWS, sizes.width), jnp.float32))
    else:
        acc = pl.run_state(lambda a: plgpu.wgmma(a, weights, refs.v_s.at[stage]))(ACC.init(acc))
    plgpu.barrier_arrive(refs.free.at[stage])
    return acc, top, total


def finish(run: Run, state: Any, start: Any, missing: Any, place: tuple[Any, Any]) -> None:
    """Write a whole group, leave a part of one that another CTA began, or merge what others hold of mine."""
    if run.sizes.whole:
        write(run, state, *place)
        return

    @pl.when(start > 0)
    def _():
        store_partial(run, run.begun_by(run.cut(run.cta) - run.first_page), *state)

    @pl.when((start == 0) & (missing == 0))
    def _():
        write(run, state, *place)

    @pl.when((start == 0) & (missing > 0))
    def _():
        count = run.others(missing)
        if run.sizes.compact:
            merge_rows(run, state, count, place[0])
        else:
            merge_tile(run, state, count, *place)


def write(run: Run, state: Any, target: Any, tokens: Any) -> None:
    """My rows to the output, token by token: the sequence's rows end anywhere."""
    refs, wg, group = run.refs, run.wg, run.sizes.group
    acc, _, total = state
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the staging buffer of an earlier segment
    refs.o_s[wg] = (acc / spread(total, acc)).astype(run.sizes.dtype)
    plgpu.commit_smem()

    @pl.loop(0, tokens)
    def _(t):
        source = refs.o_s.at[wg, pl.ds(t * group, group)]
        plgpu.copy_smem_to_gmem(source, refs.out.at[pl.ds(target + t * run.sizes.heads, group)])


def store_partial(run: Run, owner: Any, acc: Any, top: Any, total: Any) -> None:
    """Leave a partial result and tell the CTA that began the group."""
    refs, slot = run.refs, run.cta
    if run.sizes.compact:
        refs.acc.at[slot][...] = compacted(run, acc)
    else:
        refs.acc[slot, run.mine] = acc
    refs.stat[slot, 0, run.mine] = top
    refs.stat[slot, 1, run.mine] = total
    plgpu.semaphore_signal(run.sems.at[owner * run.sizes.warpgroups + run.wg], memory_scope="gpu")


def compacted(run: Run, acc: Any) -> Any:
    """The rows of the tile's only token, spread over all threads: a lone warp holds them in `acc`."""
    sizes, refs = run.sizes, run.refs
    refs.acc_s[...] = acc
    plgpu.commit_smem()
    rows = refs.acc_s.reshape(WG_ROWS * sizes.width).at[pl.ds(0, *sizes.partial)]
    return whole_load(rows, layout=flat_layout(sizes))


def flat_layout(sizes: Sizes) -> Any:
    """Of a compact accumulator."""
    vector = next(n for n in (4, 2, 1) if sizes.partial[0] % (WG_THREADS * n) == 0)
    return plgpu.Layout.WG_STRIDED(sizes.partial, vec_size=vector)


def wait_partials(run: Run, count: Any) -> None:
    """Wait for as many partial results of my group."""
    own = run.sems.at[run.cta * run.sizes.warpgroups + run.wg]
    plgpu.semaphore_wait(own, count, decrement=False, memory_scope="gpu")


def merge_tile(run: Run, state: Any, count: Any, target: Any, tokens: Any) -> None:
    """Fold whole partial tiles into mine, one after the other."""
    refs, mine = run.refs, run.mine
    wait_partials(run, count)

    def fold(u, carry):
        acc, top, total = carry
        slot = run.cta + 1 + u
        new_acc = whole_load(refs.acc.at[slot, mine], layout=plgpu.Layout.WGMMA)
        new_top = whole_load(refs.stat.at[slot, 0, mine], layout=ROWS)
        new_total = whole_load(refs.stat.at[slot, 1, mine], layout=ROWS)
        both = jnp.maximum(top, new_top)
        old, new = jnp.exp2(top - both), jnp.exp2(new_top - both)
        acc = acc * spread(old, acc) + new_acc * spread(new, acc)
        return acc, both, total * old + new_total * new

    write(run, lax.fori_loop(0, count, fold, state), target, tokens)


def merge_rows(run: Run, state: Any, count: Any, target: Any) -> None:
    """Fold the rows of the tile's only token, with the loads of several partial results in flight."""
    sizes, refs = run.sizes, run.refs
    group, width, [chunk] = sizes.group, sizes.width, sizes.partial
    refs.stat_s[0], refs.stat_s[1] = state[1:]
    mine = compacted(run, state[0])
    wait_partials(run, count)
    layout = flat_layout(sizes)
    owner = lax.div(plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout), jnp.int32(width))
    out_flat = refs.out.reshape(sizes.num_tokens * sizes.heads * width)

    def by_row(values):
        """One number per head to all elements of the head."""
        result = plgpu.layout_cast(jnp.broadcast_to(values[0], (chunk,)), layout)
        for g, value in enumerate(values[1:], 1):
            filled = plgpu.layout_cast(jnp.broadcast_to(value, (chunk,)), layout)
            result = jnp.where(owner == g, filled, result)
        return result

    def fold(k, carry):
        out, stats = carry
        index = [k * MERGE + u for u in range(MERGE)]
        exists = [u < count for u in index]
        where = [run.cta + 1 + jnp.minimum(u, count - 1) for u in index]
        pieces = [whole_load(refs.acc.at[slot], layout=layout) for slot in where]
        folded = [fold_statistics(refs.stat, g, where, exists, *old) for g, old in enumerate(stats)]
        factors = [by_row([each[u] for _, _, each in folded]) for u in range(MERGE + 1)]
        out = sum((x * y for x, y in zip(pieces, factors[1:], strict=True)), out * factors[0])
        return out, [(top, total) for top, total, _ in folded]

    start = mine, [(refs.stat_s[0, g], refs.stat_s[1, g]) for g in range(group)]
    out, stats = lax.fori_loop(0, lax.div(count + MERGE - 1, MERGE), fold, start)
    out_flat[pl.ds(target * width, chunk)] = (out / by_row([total for _, total in stats])).astype(sizes.dtype)


def fold_statistics(stat: Any, g: int, where: list[Any], exists: list[Any], top: Any, total: Any) -> tuple[Any, ...]:
    """Row `g`'s maximum and sum with some partial results, and the factors of the old and of each new accumulator."""
    tops = [jnp.where(e, stat[s, 0, g], NEG) for s, e in zip(where, exists, strict=True)]
    sums = [stat[s, 1, g] for s in where]
    new = functools.reduce(jnp.maximum, tops, top)
    each = [jnp.exp2(top - new)]
    each += [jnp.where(e, jnp.exp2(t - new), 0.0) for t, e in zip(tops, exists, strict=True)]
    return new, sum((x * y for x, y in zip(sums, each[1:], strict=True)), total * each[0]), each


def clear_values(run: Run) -> None:
    """Zeros where values will be: those of strips that are left out count nothing, but must not be NaN."""
    sizes, refs = run.sizes, run.refs
    for stage in range(sizes.stages):
        refs.v_s[stage] = plgpu.layout_cast(jnp.zeros((PAGE, sizes.width), sizes.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.cleared.at[0])


def clear_padding(run: Run) -> None:
    """Zeros to my share of the rows past the batch's last token."""
    sizes, refs, group = run.sizes, run.refs, run.sizes.group
    refs.o_s[0] = plgpu.layout_cast(jnp.zeros((WG_ROWS, sizes.width), sizes.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    end = refs.words[sizes.totals + 1]  # of the tokens
    padding = jnp.maximum(sizes.num_tokens - end - run.cta, 0)

    @pl.loop(0, lax.div(padding + sizes.ctas - 1, sizes.ctas) * sizes.key_heads)
    def _(i):
        row = end + run.cta + lax.div(i, sizes.key_heads) * sizes.ctas
        target = (row * sizes.key_heads + lax.rem(i, sizes.key_heads)) * group
        plgpu.copy_smem_to_gmem(refs.o_s.at[0, pl.ds(0, group)], refs.out.at[pl.ds(target, group)])
