"""Paged attention for decodes and short chunks on Hopper: bound by reading the cache, cut evenly over the SMs.

Each sequence's rows are packed by (token, query head of the group) into tiles of 64 or 128 rows, so that a tile reads
every page of its key head once, whatever the number of its tokens. The (tile, key head, page) triples are laid end to
end and cut into one equal run per CTA ("stream-K", Osama et al. 2023, https://arxiv.org/abs/2301.03598). A run is
walked by one TMA warpgroup, which keeps a ring of pages filled, and one or two compute warpgroups of 64 rows each. A
run crosses (tile, head) borders. What a CTA finds begun by an earlier one it leaves as a partial result (float32
accumulator, row maximum and sum); the CTA that began it waits for these, merges them and writes the output. All CTAs
are resident at once, and a partial result is always the first thing that a CTA makes, so nobody waits in a circle.

Padding the rows of a lone decode to the 64 of a wgmma costs about a fifth of the tensor cores at 3 TB/s: it hides.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper import ACC, NEG, PAGE, WG_ROWS, below, running_sum, softmax_step, spread, swizzled

TILE_WORDS = 6  # first row, tokens, sequence, position of the first row, first page, pages
RUN_WORDS = 4  # first (tile, head) group, first page of it, pages in all, groups touched
MERGE = 8  # partial results whose loads are in flight together
FEW = 2  # partial results up to which whole tiles are merged: no detour for the CTA's own
MAX_STAGES = 4  # 3, 4 and 5 measure the same
SMEM_BYTES = 230_600  # of the 232,448 that a CTA may have


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of the kernel.

    Attributes:
        ctas: persistent CTAs; at most the number of SMs.
        warpgroups: compute warpgroups (1 or 2) of 64 rows each.
        stages: pages (key and value) in flight per CTA.
        queries: tiles of queries in flight per CTA.
        whole: no group is shared between CTAs; slower, but the interpreter (which knows no semaphores) can run it.
    """

    ctas: int
    warpgroups: int
    stages: int
    queries: int
    whole: bool = False

    @classmethod
    def fit(cls, ctas: int, group: int, width: int, *, mixed: bool) -> "StreamConfig":
        """The sizes for 16-bit heads in groups; `mixed` prepares for several tokens per sequence."""
        warpgroups = 2 if mixed and width <= 128 else 1
        queries = 2 if warpgroups == 1 and width <= 128 else 1
        rows = warpgroups * WG_ROWS
        room = rows if warpgroups == 1 else rows + group  # of the arriving queries
        spare = SMEM_BYTES - (queries * room + 2 * rows) * width * 2
        return cls(ctas, warpgroups, min(spare // (2 * PAGE * width * 2), MAX_STAGES), queries)

    def tile_tokens(self, group: int) -> int:
        """Tokens of one sequence that share a tile: a lone warpgroup serves one, two hold all heads of some each."""
        return 1 if self.warpgroups == 1 else 2 * (WG_ROWS // group)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamPlan:
    """Who reads what; the same for all layers of a step."""

    tiles: Int[Array, "tile_words"]
    runs: Int[Array, "run_words"]
    totals: Int[Array, "2"]  # pages of all groups; rows of the batch that hold tokens


def plan_stream(
    cu_q_lens: Int[Array, "bounds"],
    kv_lens: Int[Array, "S"],
    num_tiles: int,
    tile_tokens: int,
    max_q_len: int,
    key_heads: int,
    window: int | None,
    config: StreamConfig,
) -> StreamPlan:
    """Cut the rows of all sequences with at most `max_q_len` rows into tiles, and the work into runs."""
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    counts = jnp.where(q_lens <= max_q_len, (q_lens + tile_tokens - 1) // tile_tokens, 0)
    upto = running_sum(counts)
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(below(upto, index), len(counts) - 1)
    skipped = (index - upto[seq] + counts[seq]) * tile_tokens
    tokens = jnp.clip(q_lens[seq] - skipped, 0, tile_tokens)
    position = kv_lens[seq] - q_lens[seq] + skipped
    low = jnp.zeros_like(index) if window is None else jnp.maximum(position - window + 1, 0) // PAGE
    pages = jnp.where(index < upto[-1], (position + tokens + PAGE - 1) // PAGE - low, 0)
    ends = running_sum(pages)
    total = ends[-1] * key_heads
    cta = jnp.arange(config.ctas + 1, dtype=jnp.int32)
    cuts = total // config.ctas * cta + jnp.minimum(total % config.ctas, cta)  # empty runs come last

    def locate(place: Int[Array, "n"]) -> tuple[Array, Array]:
        """Group that holds a place in the order of all pages, and the page within it."""
        tile = jnp.minimum(below(ends * key_heads, place), num_tiles - 1)
        rest = place - (ends - pages)[tile] * key_heads
        size = jnp.maximum(pages[tile], 1)
        return tile * key_heads + rest // size, rest % size

    group, page = locate(cuts)
    if config.whole:
        cuts, page = jnp.where(cuts < total, cuts - page, total), jnp.zeros_like(page)
    sizes = cuts[1:] - cuts[:-1]
    touched = jnp.where(sizes > 0, locate(cuts[1:] - 1)[0] - group[:-1] + 1, 0)
    tiles = jnp.stack([cu_q_lens[seq] + skipped, tokens, seq, position, low, pages], axis=1)
    runs = jnp.stack([group[:-1], page[:-1], sizes, touched], axis=1)
    return StreamPlan(tiles.reshape(-1), runs.reshape(-1), jnp.stack([total, cu_q_lens[-1]]))


def stream_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    plan: StreamPlan,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: StreamConfig,
    out: jax.Ref | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T*N H"]:
    """Attention of the rows in the plan; rows past the batch's last token become 0.

    With `out`, a mutable `[T * N, H]` array, the result goes there, and its other rows keep their contents. Without it
    the rows of sequences outside the plan are undefined.
    """
    num_tokens, heads, width = q.shape
    key_heads = kv.shape[3]
    group = heads // key_heads
    ctas, stages, queries, warpgroups = config.ctas, config.stages, config.queries, config.warpgroups
    tile_tokens = config.tile_tokens(group)
    per = tile_tokens // warpgroups  # tokens of a warpgroup
    alone = warpgroups == 1
    chunk = group * width
    by_rows = alone and chunk % 128 == 0  # few rows of a tile count: merge those only
    room = -(-((warpgroups - 1) * per * group + WG_ROWS) // group)  # tokens: a warpgroup reads 64 rows, used or not
    slots = 2 * ctas if by_rows else ctas  # of partial results; the second half is for the CTAs' own

    def paged_attention_stream(layer_ref, table_ref, tile_ref, run_ref, total_ref, q_ref, kv_ref, *refs):
        out_ref, acc_ref, stat_ref, q_in, q_s, k_s, v_s, o_s, p_s, q_full, q_free, k_full, v_full, free = refs
        sems: Any = None if config.whole else pl.get_global(plgpu.SemaphoreType.REGULAR((ctas * warpgroups,)))
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        first_group, first_page, size, touched = (run_ref[cta * RUN_WORDS + j] for j in range(RUN_WORDS))

        def cut(c):
            """Where a CTA's run begins in the order of all pages; as in the plan."""
            return lax.div(total_ref[0], ctas) * c + jnp.minimum(lax.rem(total_ref[0], ctas), c)

        def describe(i):
            """Head and tile words of the run's i-th group."""
            number = first_group + jnp.minimum(i, jnp.maximum(touched - 1, 0))
            tile = lax.div(number, key_heads) * TILE_WORDS
            return (lax.rem(number, key_heads), *(tile_ref[tile + j] for j in range(TILE_WORDS)))

        def part(i, done, pages):
            """First page of the i-th group that is in the run, and how many are."""
            start = jnp.where(i == 0, first_page, 0)
            return start, jnp.minimum(pages - start, size - done)

        @pl.when(wg == warpgroups)
        def load():
            if not alone:
                plgpu.set_max_registers(40, action="decrease")
            number = layer_ref[0]

            def segment(i, carry):
                done, (head, row, _, seq, _, low, pages) = carry
                following = describe(i + 1)  # ahead of its use
                start, count = part(i, done, pages)
                slot = lax.rem(i, queries)

                @pl.when(i >= queries)
                def _():
                    plgpu.barrier_wait(q_free.at[slot])

                if alone:
                    source, box = q_ref.at[pl.ds((row * key_heads + head) * group, group)], pl.ds(0, group)
                else:
                    source, box = q_ref.at[pl.ds(row, tile_tokens), head], pl.ds(0, tile_tokens)
                plgpu.copy_gmem_to_smem(source, q_in.at[slot, box], q_full.at[slot])
                base = low + start

                def fetch(j, page):
                    stage = lax.rem(done + j, stages)
                    upcoming = table_ref[seq, base + jnp.minimum(j + 1, count - 1)]

                    @pl.when(done + j >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[stage])

                    plgpu.copy_gmem_to_smem(kv_ref.at[number, page, 0, head], k_s.at[stage], k_full.at[stage])
                    plgpu.copy_gmem_to_smem(kv_ref.at[number, page, 1, head], v_s.at[stage], v_full.at[stage])
                    return upcoming

                lax.fori_loop(0, count, fetch, table_ref[seq, base])
                return done + count, following

            done, _ = lax.fori_loop(0, touched, segment, (jnp.int32(0), describe(0)))

            # Drain, so that every barrier ends in a completed phase (the interpreter checks it).
            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(j):
                plgpu.barrier_wait(free.at[lax.rem(j, stages)])

            @pl.loop(jnp.maximum(touched - queries, 0), touched)
            def _(i):
                plgpu.barrier_wait(q_free.at[lax.rem(i, queries)])

        @pl.when(wg < warpgroups)
        def compute():
            if not alone:
                plgpu.set_max_registers(232, action="increase")
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            whole_load = functools.partial(plgpu.load, optimized=False)
            mine = pl.ds(wg * WG_ROWS, WG_ROWS)  # my rows of partial results

            def segment(i, done):
                head, row, tokens, _, position, low, pages = describe(i)
                start, count = part(i, done, pages)
                slot = lax.rem(i, queries)
                tokens = jnp.minimum(tokens - wg * per, per)  # mine
                plgpu.barrier_wait(q_full.at[slot])

                @pl.when(tokens > 0)
                def _():
                    q_s[wg] = my_queries(q_in.at[slot])
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(q_free.at[slot])
                    state = attend(done, count, position + wg * per, (low + start) * PAGE)
                    missing = pages - start - count
                    place = ((row + wg * per) * key_heads + head) * group, tokens

                    @pl.when(start > 0)
                    def _():
                        store_partial(cta, begun_by(cut(cta) - first_page), *state)

                    @pl.when((start == 0) & (missing == 0))
                    def _():
                        write(state, *place)

                    if not config.whole:

                        @pl.when((start == 0) & (missing > 0))
                        def _():
                            count = others(missing)
                            few = count <= FEW if by_rows else True
                            pl.when(few)(functools.partial(merge_tile, state, count, *place))
                            if by_rows:
                                pl.when(jnp.logical_not(few))(functools.partial(merge_rows, state, count, *place))

                @pl.when(tokens <= 0)
                def _():
                    plgpu.barrier_arrive(q_free.at[slot])

                    @pl.loop(0, count)
                    def _(j):
                        stage = lax.rem(done + j, stages)
                        plgpu.barrier_wait(k_full.at[stage])
                        plgpu.barrier_wait(v_full.at[stage])
                        plgpu.barrier_arrive(free.at[stage])

                return done + count

            def my_queries(tile):
                if alone:
                    return whole_load(tile, layout=plgpu.Layout.WGMMA)
                if interpret is None:
                    rows = tile.reshape(room * group, width).at[pl.ds(wg * (per * group), WG_ROWS)]
                    return whole_load(rows, layout=plgpu.Layout.WGMMA)
                values = tile[pl.ds(wg * per, per)].reshape(per * group, width)  # it knows no reshaped references
                return jnp.pad(values, ((0, WG_ROWS - per * group), (0, 0)))

            def attend(done, count, position, column):
                """Running softmax (Milakov and Gimelshein 2018) of my rows over the segment's pages."""

                def step(j, carry):
                    acc, top, total = carry
                    stage = lax.rem(done + j, stages)
                    plgpu.barrier_wait(k_full.at[stage])

                    def product(scores):
                        plgpu.wgmma(scores, q_s.at[wg], k_s.at[stage].T)
                        return scores[...]

                    scores = pl.run_scoped(product, ACC((WG_ROWS, PAGE), jnp.float32))
                    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
                    distance = lax.div(iota(0), jnp.int32(group)) - iota(1) + (position - column - j * PAGE)
                    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                    weights, decay, top, total = softmax_step(scores, top, total, scale, soft_cap, visible)
                    acc = acc * spread(decay, acc)
                    weights = weights.astype(kv.dtype)
                    plgpu.barrier_wait(v_full.at[stage])
                    if interpret is None:
                        acc = pl.run_state(lambda a: plgpu.wgmma(a, weights, v_s.at[stage]))(ACC.init(acc))
                    else:  # the interpreter takes operands from SMEM and fresh accumulators only
                        p_s[wg] = weights
                        plgpu.commit_smem()

                        def mix(a):
                            plgpu.wgmma(a, p_s.at[wg], v_s.at[stage])
                            return a[...]

                        acc += pl.run_scoped(mix, ACC((WG_ROWS, width), jnp.float32))
                    plgpu.barrier_arrive(free.at[stage])
                    return acc, top, total

                start = (
                    plgpu.layout_cast(jnp.zeros((WG_ROWS, width), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((WG_ROWS,), NEG, jnp.float32), row_layout),
                    plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), row_layout),
                )
                return lax.fori_loop(0, count, step, start)

            def write(state, target, tokens):
                acc, _, total = state
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the staging buffer of an earlier segment
                o_s[wg] = (acc / spread(total, acc)).astype(q.dtype)
                send(target, tokens)

            def send(target, tokens):
                """My staged rows to the output, token by token: the sequence's rows end anywhere."""
                plgpu.commit_smem()

                @pl.loop(0, tokens)
                def _(t):
                    source = o_s.at[wg, pl.ds(t * group, group)]
                    plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(target + t * heads, group)])

            def begun_by(place):
                """The CTA whose run holds a place in the order of all pages."""
                size, extra = lax.div(total_ref[0], ctas), lax.rem(total_ref[0], ctas)
                longer = extra * (size + 1)  # pages in the runs that have one more
                late = extra + lax.div(place - longer, jnp.maximum(size, 1))
                return jnp.where(place < longer, lax.div(place, size + 1), late)

            def others(missing):
                """How many CTAs after this one hold the group's `missing` pages."""
                return begun_by(cut(cta + 1) + missing - 1) - cta

            def store_partial(slot, owner, acc, top, total):
                acc_ref[slot, mine] = acc
                stat_ref[slot, 0, mine] = top
                stat_ref[slot, 1, mine] = total
                if not config.whole:
                    plgpu.semaphore_signal(sems.at[owner * warpgroups + wg], memory_scope="gpu")

            def wait_partials(count):
                own = sems.at[cta * warpgroups + wg]
                plgpu.semaphore_wait(own, count, decrement=False, memory_scope="gpu")

            def merge_tile(state, count, target, tokens):
                """Fold whole partial tiles into mine, one after the other."""
                wait_partials(count)

                def fold(u, carry):
                    acc, top, total = carry
                    slot = cta + 1 + u
                    new_acc = whole_load(acc_ref.at[slot, mine], layout=plgpu.Layout.WGMMA)
                    new_top = whole_load(stat_ref.at[slot, 0, mine], layout=row_layout)
                    new_total = whole_load(stat_ref.at[slot, 1, mine], layout=row_layout)
                    both = jnp.maximum(top, new_top)
                    old, new = jnp.exp2(top - both), jnp.exp2(new_top - both)
                    acc = acc * spread(old, acc) + new_acc * spread(new, acc)
                    return acc, both, total * old + new_total * new

                write(lax.fori_loop(0, count, fold, state), target, tokens)

            def merge_rows(state, count, target, _):
                """Fold the rows of the tile's only token, with the loads of several partial results in flight."""
                store_partial(ctas + cta, cta, *state)
                wait_partials(count + 1)
                vector = next(n for n in (4, 2, 1) if chunk % (128 * n) == 0)
                layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=vector)
                owner = lax.div(plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout), jnp.int32(width))
                acc_flat = acc_ref.reshape(slots * WG_ROWS * width)
                out_flat = out_ref.reshape(num_tokens * heads * width)

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
                    exists = [u <= count for u in index]
                    where = [jnp.where(u == 0, ctas + cta, cta + jnp.minimum(u, count)) for u in index]
                    place = [pl.ds(s * (WG_ROWS * width), chunk) for s in where]
                    pieces = [whole_load(acc_flat.at[p], layout=layout) for p in place]
                    weights, new_stats = [], []
                    for g, (high, total) in enumerate(stats):
                        tops = [jnp.where(e, stat_ref[s, 0, g], NEG) for s, e in zip(where, exists, strict=True)]
                        sums = [stat_ref[s, 1, g] for s in where]
                        new = functools.reduce(jnp.maximum, tops, high)
                        each = [jnp.exp2(high - new)]
                        each += [jnp.where(e, jnp.exp2(t - new), 0.0) for t, e in zip(tops, exists, strict=True)]
                        new_stats.append(
                            (new, sum((x * y for x, y in zip(sums, each[1:], strict=True)), total * each[0]))
                        )
                        weights.append(each)
                    factors = [by_row([w[u] for w in weights]) for u in range(MERGE + 1)]
                    return sum((x * y for x, y in zip(pieces, factors[1:], strict=True)), out * factors[0]), new_stats

                nothing = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), layout)
                start = nothing, [(jnp.float32(NEG), jnp.float32(0))] * group
                out, stats = lax.fori_loop(0, lax.div(count, MERGE) + 1, fold, start)
                out_flat[pl.ds(target * width, chunk)] = (out / by_row([total for _, total in stats])).astype(q.dtype)

            @pl.when(wg == 0)
            def clear_padding():
                o_s[0] = plgpu.layout_cast(jnp.zeros((WG_ROWS, width), q.dtype), plgpu.Layout.WGMMA)
                plgpu.commit_smem()
                padding = jnp.maximum(num_tokens - total_ref[1] - cta, 0)

                @pl.loop(0, lax.div(padding + ctas - 1, ctas) * key_heads)
                def _(i):
                    row = total_ref[1] + cta + lax.div(i, key_heads) * ctas
                    target = (row * key_heads + lax.rem(i, key_heads)) * group
                    plgpu.copy_smem_to_gmem(o_s.at[0, pl.ds(0, group)], out_ref.at[pl.ds(target, group)])

            lax.fori_loop(0, touched, segment, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    tiles = swizzled(width * 2)
    result = jax.ShapeDtypeStruct((num_tokens * heads, width), q.dtype)
    partial = (
        jax.ShapeDtypeStruct((slots, warpgroups * WG_ROWS, width), jnp.float32),
        jax.ShapeDtypeStruct((slots, 2, warpgroups * WG_ROWS), jnp.float32),
    )
    packed = q.reshape((num_tokens * heads, width) if alone else (num_tokens, key_heads, group, width))
    if interpret is not None:  # the interpreter clamps boxes past the end, TMA fills them with zeros
        packed = jnp.pad(packed, ((0, tile_tokens * group), *[(0, 0)] * (packed.ndim - 1)))
    outputs = plgpu.kernel(
        paged_attention_stream,
        out_type=partial if out is not None else (result, *partial),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[
            plgpu.SMEM((queries, WG_ROWS, width) if alone else (queries, room, group, width), q.dtype),
            plgpu.SMEM((warpgroups, WG_ROWS, width), q.dtype, transforms=tiles),
            plgpu.SMEM((stages, PAGE, width), kv.dtype, transforms=tiles),
            plgpu.SMEM((stages, PAGE, width), kv.dtype, transforms=tiles),
            plgpu.SMEM((warpgroups, WG_ROWS, width), q.dtype),
            None
            if interpret is None
            else plgpu.SMEM((warpgroups, WG_ROWS, PAGE), kv.dtype, transforms=swizzled(2 * PAGE)),
            barriers(queries),
            barriers(queries, warpgroups),
            barriers(stages),
            barriers(stages),
            barriers(stages, warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )(
        jnp.reshape(jnp.asarray(layer, jnp.int32), 1), page_table, plan.tiles, plan.runs, plan.totals, packed, kv,
        *(() if out is None else (out,)),
    )  # fmt: skip
    return outputs[0] if out is None else jax.freeze(out)
