"""Paged attention for long chunks on Hopper: bound by the tensor cores.

A work item is 128 query rows of one head. Two compute warpgroups of 64 rows each take turns on the tensor cores: one
multiplies while the other does its softmax (FlashAttention-3, Shah et al. 2024, https://arxiv.org/abs/2407.08608). A
third warpgroup fills a ring of key and value blocks, page by page, through TMA. CTAs are persistent, so that the next
item's queries, keys and values arrive while the current one finishes; items are dealt longest first, back and forth.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper import ACC, NEG, PAGE, WG_ROWS, below, running_sum, softmax_step, spread, swizzled

TILE_ROWS = 2 * WG_ROWS
TILE_WORDS = 5  # first row, its position, rows, sequence, keys up to the last row's own


@dataclass(frozen=True)
class PrefillConfig:
    """Sizes of the kernel.

    Attributes:
        ctas: persistent CTAs.
        block: keys per block, a multiple of `PAGE`.
        stages: blocks (key and value) in flight per CTA.
        shared: arriving queries and leaving results share a buffer; no queries are fetched ahead then.
    """

    ctas: int
    block: int
    stages: int
    shared: bool

    @classmethod
    def fit(cls, ctas: int, width: int) -> "PrefillConfig":
        """The sizes for 16-bit heads of this width."""
        return cls(ctas, 128, 2, shared=False) if width <= 128 else cls(ctas, 64, 1, shared=True)


def plan_prefill(
    cu_q_lens: Int[Array, "bounds"], kv_lens: Int[Array, "S"], num_tokens: int, min_q_len: int
) -> Int[Array, "words"]:
    """Query tiles of the sequences with at least `min_q_len` rows, longest first, and their number at the end."""
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    upto = running_sum(jnp.where(q_lens >= min_q_len, (q_lens + TILE_ROWS - 1) // TILE_ROWS, 0))
    tile = jnp.arange(num_tokens // TILE_ROWS + min(len(kv_lens), num_tokens // min_q_len), dtype=jnp.int32)
    seq = jnp.minimum(below(upto, tile), len(kv_lens) - 1)
    before = jnp.where(seq > 0, upto[seq - 1], 0)
    skipped = (tile - before) * TILE_ROWS
    rows = jnp.where(tile < upto[-1], jnp.clip(q_lens[seq] - skipped, 0, TILE_ROWS), 0)
    position = kv_lens[seq] - q_lens[seq] + skipped
    keys = jnp.where(rows > 0, position + rows, 0)
    words = jnp.stack([cu_q_lens[seq] + skipped, position, rows, seq, keys], axis=1)
    # Ranks from one fused comparison: a sort costs more than the kernel's smallest launches.
    longer = (keys[None] > keys[:, None]) | ((keys[None] == keys[:, None]) & (tile[None] < tile[:, None]))
    words = jnp.zeros_like(words).at[jnp.sum(longer, axis=1)].set(words)
    return jnp.append(words.reshape(-1), upto[-1]).astype(jnp.int32)


def prefill_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    plan: Int[Array, "words"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: PrefillConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T N H"]:
    """Attention of the rows in the plan; the other rows of the result are undefined."""
    num_tokens, heads, width = q.shape
    group = heads // kv.shape[3]
    ctas, stages, block = config.ctas, config.stages, config.block
    block_pages = block // PAGE
    last_word = plan.shape[0] - 1

    def paged_attention_prefill(layer_ref, table_ref, tile_ref, q_ref, kv_ref, out_ref, *scratch):
        q_s, q_in, o_own, k_s, v_s, p_s, q_full, q_free, k_full, v_full, k_free, v_free, turn = scratch
        o_s = q_in if config.shared else o_own
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        num_items = tile_ref[last_word] * heads
        rounds = lax.div(num_items + ctas - 1, ctas)

        def work(k):
            """Back and forth over the items, longest first: evens out the load."""
            return k * ctas + jnp.where(lax.rem(k, 2) == 0, cta, ctas - 1 - cta)

        items = jnp.where(work(rounds - 1) < num_items, rounds, rounds - 1)

        def describe(k):
            """Head and tile words of the CTA's k-th item."""
            item = jnp.maximum(work(jnp.minimum(k, items - 1)), 0)
            tile = lax.div(item, heads) * TILE_WORDS
            return (lax.rem(item, heads), *(tile_ref[tile + j] for j in range(TILE_WORDS)))

        def blocks(position, keys):
            """First block of keys that a tile sees, and one past the last."""
            first = 0 if window is None else lax.div(jnp.maximum(position - window + 1, 0), block)
            return first, pl.cdiv(keys, block)

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")

            @pl.when(wg == 1)
            def _():
                take_turn()

            def item(n, done):
                head, row, position, rows, _, keys = describe(n)
                first, end = blocks(position, keys)
                row, position = row + wg * WG_ROWS, position + wg * WG_ROWS
                mine = pl.cdiv(jnp.minimum(keys, position + WG_ROWS), block)  # one past the last block my half needs
                clear = jnp.clip(lax.div(position + 1, block), first, mine)  # up to here without a mask
                plgpu.barrier_wait(q_full.at[wg])
                q_s[wg] = plgpu.load(q_in.at[wg], layout=plgpu.Layout.WGMMA, optimized=False)
                plgpu.commit_smem()
                if not config.shared:
                    plgpu.barrier_arrive(q_free.at[wg])
                plgpu.barrier_wait(k_full.at[lax.rem(done, stages)])

                def step(i, carry, *, masked):
                    acc, top, total = carry
                    slot = lax.rem(done + i - first, stages)

                    def product(scores):
                        plgpu.wgmma(scores, q_s.at[wg], k_s.at[slot].T)
                        take_turn()
                        return scores[...]

                    scores = pl.run_scoped(product, ACC((WG_ROWS, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    visible = None
                    if masked:
                        iota = functools.partial(
                            plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA
                        )
                        distance = iota(0) - iota(1) + (position - i * block)
                        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                    weights, decay, top, total = softmax_step(scores, top, total, scale, soft_cap, visible)
                    acc *= spread(decay, acc)
                    acc, total, top, weights = lax.optimization_barrier((acc, total, top, weights.astype(kv.dtype)))
                    plgpu.barrier_arrive(turn)  # softmax done: the other half may do its own
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)

                    def wait_next_keys():
                        @pl.when(i + 1 < mine)
                        def _():
                            plgpu.barrier_wait(k_full.at[lax.rem(done + i + 1 - first, stages)])

                    def mix(a):
                        plgpu.wgmma(a, weights if interpret is None else p_s.at[wg], v_s.at[slot])
                        wait_next_keys()

                    if interpret is None:
                        acc = pl.run_state(mix)(ACC.init(acc))
                    else:  # the interpreter takes operands from SMEM and fresh accumulators only
                        p_s[wg] = weights
                        plgpu.commit_smem()
                        acc += pl.run_scoped(lambda a: (mix(a), a[...])[1], ACC((WG_ROWS, width), jnp.float32))
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, top, total

                row_layout = plgpu.Layout.WGMMA.reduce(1)
                carry = (
                    plgpu.layout_cast(jnp.zeros((WG_ROWS, width), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((WG_ROWS,), NEG, jnp.float32), row_layout),
                    plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), row_layout),
                )
                if window is None:
                    carry = lax.fori_loop(first, clear, functools.partial(step, masked=False), carry)
                    acc, _, total = lax.fori_loop(clear, mine, functools.partial(step, masked=True), carry)
                else:
                    acc, _, total = lax.fori_loop(first, mine, functools.partial(step, masked=True), carry)
                skip_rest(done, mine - first, end - first)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_s[wg] = (acc / spread(total, acc)).astype(q.dtype)
                plgpu.commit_smem()
                store(head, row, rows - wg * WG_ROWS)
                if config.shared:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[wg])
                return done + end - first

            def skip_rest(done, seen, steps):
                """The other half has one block more: keep barriers, phases and turns in step."""

                @pl.loop(seen, steps)
                def _(i):
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_arrive(k_free.at[slot])
                    take_turn()
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    take_turn()

            def store(head, row, left):
                @pl.when(left >= WG_ROWS)
                def _():
                    plgpu.copy_smem_to_gmem(o_s.at[wg], out_ref.at[pl.ds(row, WG_ROWS), head])

                @pl.when(left < WG_ROWS)
                def _():  # ragged end: a whole-tile store would overwrite the next sequence
                    @pl.loop(0, jnp.maximum(left, 0))
                    def _(r):
                        plgpu.copy_smem_to_gmem(o_s.at[wg, pl.ds(r, 1)], out_ref.at[pl.ds(row + r, 1), head])

            lax.fori_loop(0, items, item, jnp.int32(0))

            @pl.when(wg == 0)
            def _():
                take_turn()

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def load():
            plgpu.set_max_registers(40, action="decrease")
            number = layer_ref[0]

            def item(n, carry):
                done, (head, row, position, _, seq, keys) = carry
                first, end = blocks(position, keys)
                following = describe(n + 1)
                key_head, last = lax.div(head, group), pl.cdiv(keys, PAGE) - 1

                def pages(i):  # past the last page repeat it: its columns are masked
                    return tuple(table_ref[seq, jnp.minimum(block_pages * i + j, last)] for j in range(block_pages))

                def load_queries(half):
                    # Rows start anywhere, but a tiled buffer takes boxes at multiples of 8 rows only: use a plain one
                    # that the compute warpgroups copy.
                    @pl.when(n > 0)
                    def _():
                        plgpu.barrier_wait(q_free.at[half])

                    source = q_ref.at[pl.ds(row + half * WG_ROWS, WG_ROWS), head]
                    plgpu.copy_gmem_to_smem(source, q_in.at[half], q_full.at[half])

                def step(i, ids):
                    t = done + i - first
                    slot = lax.rem(t, stages)
                    upcoming = pages(i + 1)
                    for kind, buffer, full, free in ((0, k_s, k_full, k_free), (1, v_s, v_full, v_free)):

                        @pl.when(t >= stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        for j in range(block_pages):
                            target = buffer.at[slot, pl.ds(j * PAGE, PAGE)]
                            plgpu.copy_gmem_to_smem(kv_ref.at[number, ids[j], kind, key_head], target, full.at[slot])
                        if kind == 0:
                            # The second half can only end its last item once the first has keys for its next one.
                            pl.when(i == first)(functools.partial(load_queries, 1))
                    return upcoming

                load_queries(0)
                lax.fori_loop(first, end, step, pages(first))
                return done + end - first, following

            done, _ = lax.fori_loop(0, items, item, (jnp.int32(0), describe(0)))

            # Drain, so that every barrier ends in a completed phase (the interpreter checks it).
            @pl.when(items > 0)
            def _():
                for half in range(2):
                    plgpu.barrier_wait(q_free.at[half])

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                plgpu.barrier_wait(k_free.at[lax.rem(i, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(i, stages)])

    def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    def tiled(*shape: int) -> pl.MemoryRef:
        return plgpu.SMEM(shape, q.dtype, transforms=swizzled(2 * shape[-1]))

    if interpret is not None:  # the interpreter clamps boxes past the end, TMA fills them with zeros
        q = jnp.pad(q, ((0, TILE_ROWS), (0, 0), (0, 0)))
    return plgpu.kernel(
        paged_attention_prefill,
        out_type=jax.ShapeDtypeStruct((num_tokens, heads, width), q.dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[
            tiled(2, WG_ROWS, width),
            plgpu.SMEM((2, WG_ROWS, width), q.dtype),
            None if config.shared else plgpu.SMEM((2, WG_ROWS, width), q.dtype),
            tiled(stages, block, width),
            tiled(stages, block, width),
            None if interpret is None else tiled(2, WG_ROWS, block),
            barriers(2),
            barriers(2),
            barriers(stages, block_pages),
            barriers(stages, block_pages),
            barriers(stages, 2),
            barriers(stages, 2),
            barriers(1, 2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )(jnp.reshape(jnp.asarray(layer, jnp.int32), 1), page_table, plan, q, kv)
