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

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper import PAGE, WG_ROWS, WG_THREADS, below, running_sum, swizzled
from pallas_kernels.attention.hopper_stream_kernel import Sizes, kernel
from pallas_kernels.tuning import tuned

MAX_COMPACT = 16  # heads of a group that partial results are merged by; the code grows with them
PAGE_BITS = PAGE.bit_length() - 1
SMEM_BYTES = 230_600  # of the 232,448 that a CTA may have


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of the kernel.

    Attributes:
        ctas: persistent CTAs; at most the number of SMs.
        warpgroups: compute warpgroups (1 or 2) of 64 rows each.
        stages: pages (key and value) in flight per CTA.
        queries: tiles of queries in flight per CTA.
        compact: a partial result holds the rows of its only token, not the whole tile.
        sharing: pages that a CTA reads in the time that it costs at most to share groups.
        whole: no group is shared between CTAs; slower, but the interpreter (which knows no semaphores) can run it.
    """

    ctas: int
    warpgroups: int
    stages: int
    queries: int
    compact: bool
    sharing: int
    whole: bool = False

    @classmethod
    def fit(cls, ctas: int, group: int, width: int, *, mixed: bool) -> "StreamConfig":
        """The sizes for 16-bit heads in groups; `mixed` prepares for several tokens per sequence."""
        warpgroups = 2 if mixed and width <= 128 else 1
        lone = warpgroups == 1 and width <= 128
        queries, compact = 2 if lone else 1, lone and group <= MAX_COMPACT and group * width % WG_THREADS == 0
        rows = warpgroups * WG_ROWS
        room = rows if warpgroups == 1 else rows + group  # of the arriving queries
        spare = SMEM_BYTES - (queries * room + 2 * rows) * width * 2 - (WG_ROWS * width * 4 if compact else 0)
        known = tuned("hopper", "paged_attention")
        stages = min(spare // (2 * PAGE * width * 2), known["stages"])
        return cls(ctas, warpgroups, stages, queries, compact, known["sharing_pages"])

    def tile_tokens(self, group: int) -> int:
        """Tokens of one sequence that share a tile: a lone warpgroup serves one, two hold all heads of some each."""
        return 1 if self.warpgroups == 1 else 2 * (WG_ROWS // group)


@dataclass(frozen=True)
class StreamPlan:
    """Who reads what; the same for all layers of a step.

    Attributes:
        words: of each run and of its first tile; pages of all groups, and rows of the batch that hold tokens; of each
            tile; and the page table. One array, since making one takes a GPU as long as a step of the plan.
        num_tiles: in `words`.
        pages_per_seq: of the page table.
    """

    words: Int[Array, "words"]
    num_tiles: int
    pages_per_seq: int


def plan_stream(
    cu_q_lens: Int[Array, "bounds"],
    kv_lens: Int[Array, "S"],
    page_table: Int[Array, "S P"],
    num_tiles: int,
    tile_tokens: int,
    max_q_len: int,
    key_heads: int,
    window: int | None,
    config: StreamConfig,
) -> StreamPlan:
    """Cut the rows of all sequences with at most `max_q_len` rows into tiles, and the work into runs.

    Runs end where groups do if that makes the longest little longer: to share groups takes 3 to 12 us of a call. Also
    twice as long a run may be the better one, since a CTA reads faster the fewer others do. The entries of `page_table`
    must be in bounds. For decodes XLA makes six to eight kernels of it, each of which waits for the one before.
    """
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    if tile_tokens == 1 and max_q_len >= num_tiles:  # every row is a tile
        counts, upto = q_lens, cu_q_lens[1:]
    else:
        counts = jnp.where(q_lens <= max_q_len, (q_lens + tile_tokens - 1) // tile_tokens, 0)
        upto = running_sum(counts)
    seqs, index = jnp.arange(len(counts), dtype=jnp.int32), jnp.arange(num_tiles, dtype=jnp.int32)
    columns, most = [seqs, cu_q_lens[:-1], upto - counts, q_lens, kv_lens], page_table.shape[1]

    def describe(columns: list[Int[Array, "..."]], tile: Int[Array, "..."]) -> list[Int[Array, "..."]]:
        """The words of tiles of these sequences."""
        seq, row, begun, q_len, kv_len = columns
        skipped = (tile - begun) * tile_tokens
        tokens = jnp.clip(q_len - skipped, 0, tile_tokens)
        position = kv_len - q_len + skipped
        low = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0) >> PAGE_BITS
        pages = jnp.clip(position + tokens + PAGE - 1 >> PAGE_BITS, 1, most)  # a row past its end may have more
        return [row + skipped, tokens, seq, position, low, pages - low]

    owns, bits = (upto - counts <= index[:, None]) & (index[:, None] < upto), most.bit_length()
    every = (seqs << bits) + describe(columns, index[:, None])[-1]
    both = jnp.sum(jnp.where(owns, every, 0), axis=1, dtype=jnp.int32)
    owner, pages = both >> bits, both & ((1 << bits) - 1)  # of each tile, in one sum
    ends = running_sum(pages) * key_heads
    total = ends[-1]
    cta = jnp.arange(config.ctas + 1, dtype=jnp.int32)
    mean = total // config.ctas
    cuts = mean * cta + jnp.minimum(total % config.ctas, cta)  # empty runs come last
    tile = jnp.minimum(below(ends, cuts), num_tiles - 1)
    size = pages[tile]
    place, divisor = cuts - ends[tile] + size * key_heads, jnp.maximum(size, 1)
    group = jnp.where(cuts < total, tile * key_heads + place // divisor, upto[-1] * key_heads)
    page = jnp.where(cuts < total, place % divisor, 0)
    later = 2 * page > size
    borders = cuts - page + jnp.where(later, size, 0)  # the nearest ones
    apart = config.whole | (jnp.max(borders[1:] - borders[:-1]) <= mean + jnp.minimum(mean + 2, config.sharing))
    cuts = jnp.where(apart, borders, cuts)
    group, page = jnp.where(apart & later, group + 1, group), jnp.where(apart, 0, page)
    sizes = cuts[1:] - cuts[:-1]
    last_group = jnp.where(page > 0, group, group - 1)[1:]
    last_size = pages[jnp.clip(last_group // key_heads, 0, num_tiles - 1)]
    last = jnp.where(page[1:] > 0, page[1:], last_size)
    group, page = group[:-1], page[:-1]
    touched = jnp.where(sizes > 0, last_group - group + 1, 0)
    first = jnp.minimum(group // key_heads, num_tiles - 1)
    first_words = describe([column[owner[first]] for column in columns], first)
    at = page_table.at[owner[first], first_words[4] + page].get(mode="clip")
    runs = jnp.stack([group, page, at, sizes, touched, last, *first_words], axis=1)
    tiles = jnp.stack(describe([column[owner] for column in columns], index), axis=1)
    totals = jnp.stack([total, cu_q_lens[-1]])
    words = jnp.concatenate([part.reshape(-1) for part in (runs, totals, tiles, page_table)])
    return StreamPlan(words, num_tiles, most)


def stream_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
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
    sizes = Sizes(
        config.ctas, config.warpgroups, config.stages, config.queries, config.compact, config.whole,
        config.tile_tokens(heads // key_heads), plan.num_tiles, plan.pages_per_seq, num_tokens, heads, key_heads,
        width, q.dtype, scale, window, soft_cap, interpret is not None,
    )  # fmt: skip
    rows, group = config.warpgroups * WG_ROWS, sizes.group
    partial = (
        jax.ShapeDtypeStruct((sizes.ctas, *sizes.partial), jnp.float32),
        jax.ShapeDtypeStruct((sizes.ctas, 2, rows), jnp.float32),
    )
    result = jax.ShapeDtypeStruct((num_tokens * heads, width), q.dtype)
    packed = q.reshape((num_tokens * heads, width) if sizes.alone else (num_tokens, key_heads, group, width))
    if sizes.interpreted:  # the interpreter clamps boxes past the end, TMA fills them with zeros
        packed = jnp.pad(packed, ((0, sizes.tile_tokens * group), *[(0, 0)] * (packed.ndim - 1)))

    def paged_attention_stream(*refs: Any) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    outputs = plgpu.kernel(
        paged_attention_stream,
        out_type=partial if out is not None else (result, *partial),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types=_scratch(sizes),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )(
        jnp.reshape(jnp.asarray(layer, jnp.int32), 1), plan.words, packed, kv,
        *(() if out is None else (out,)),
    )  # fmt: skip
    return outputs[0] if out is None else jax.freeze(out)


def _scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    warpgroups, width, stages = sizes.warpgroups, sizes.width, sizes.stages
    tiles = swizzled(width * 2)

    def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    weights = plgpu.SMEM((warpgroups, WG_ROWS, PAGE), sizes.dtype, transforms=swizzled(2 * PAGE))
    arriving = (WG_ROWS, width) if sizes.alone else (sizes.room, sizes.group, width)
    return [
        plgpu.SMEM((sizes.queries, *arriving), sizes.dtype),
        plgpu.SMEM((warpgroups, WG_ROWS, width), sizes.dtype, transforms=tiles),
        plgpu.SMEM((stages, PAGE, width), sizes.dtype, transforms=tiles),
        plgpu.SMEM((stages, PAGE, width), sizes.dtype, transforms=tiles),
        plgpu.SMEM((warpgroups, WG_ROWS, width), sizes.dtype),
        weights if sizes.interpreted else None,
        plgpu.SMEM((WG_ROWS, width), jnp.float32) if sizes.compact else None,
        plgpu.SMEM((2, WG_ROWS), jnp.float32) if sizes.compact else None,
        barriers(sizes.queries),
        barriers(sizes.queries, warpgroups),
        barriers(stages),
        barriers(stages),
        barriers(stages, warpgroups),
        barriers(1),
    ]
