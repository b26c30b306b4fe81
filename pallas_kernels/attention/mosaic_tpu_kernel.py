"""The kernel of `pallas_kernels.attention.mosaic_tpu`: what one TPU core does with its tiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

COLUMNS = ("seq", "first", "count", "position", "low", "high")  # of the table of tiles; position is the first row's
LANES, SUBLANES = 128, 8
UNROLLED_ROWS = 64  # of a tile and key head, up to which the heads are unrolled
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a key that a row does not see; its sums stay finite

Ref = Any
Bool = Any
Index = int | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of tiles (`short_rows` or `long_rows` query rows), of blocks (`pages` pages of `page` tokens) and of heads."""

    short_rows: int
    long_rows: int
    pages: int
    page: int
    kinds: int
    key_heads: int
    group: int
    width: int

    @property
    def block_tokens(self) -> int:
        return self.pages * self.page

    def scratch(self, q_dtype: Any, kv_dtype: Any) -> list[Any]:
        """Arrays that live as long as the kernel, in the order of its arguments."""
        rows, heads = self.long_rows, (self.key_heads, self.group, self.width)
        flat = (self.key_heads, rows * self.group)
        return [
            pltpu.VMEM(
                (2, self.pages, self.kinds, self.key_heads, self.page, self.width), kv_dtype
            ),  # two blocks in turns
            pltpu.VMEM((2, rows, *heads), q_dtype),  # queries of this tile and of the next
            pltpu.VMEM((rows, *heads), q_dtype),  # results
            pltpu.VMEM((*flat, self.width), q_dtype),  # queries by key head
            pltpu.VMEM((*flat, LANES), jnp.float32),  # running maximum, the same in all lanes
            pltpu.VMEM((*flat, LANES), jnp.float32),  # running sum
            pltpu.VMEM((*flat, self.width), jnp.float32),  # running mix of values
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((1,)),
        ]

    def vmem_bytes(self, itemsize: int) -> int:
        """Of the scratch arrays, padded to whole tiles, and of the scores of one head that exist between them."""
        flat = -(-self.long_rows * self.group // SUBLANES) * SUBLANES
        width, packed = -(-self.width // LANES) * LANES, SUBLANES * 4 // itemsize
        blocks = 2 * self.pages * self.kinds * self.key_heads * -(-self.page // packed) * packed * width * itemsize
        group = max(1 << (self.group - 1).bit_length(), 4 // itemsize)
        queries = 3 * self.long_rows * self.key_heads * (group if group < packed else -(-group // packed) * packed)
        sums = self.key_heads * flat * (width * itemsize + (2 * LANES + width) * 4)
        scores = 4 * flat * self.block_tokens * 4
        return blocks + queries * width * itemsize + sums + scores


def kernel(
    tiles_ref: Ref,  # int32 [tiles x COLUMNS]
    table_ref: Ref,  # int32 [S x P] pages
    counts_ref: Ref,  # int32 [3]: tiles, rows of all sequences, layer
    q_ref: Ref,  # [T K G H], in HBM
    kv_ref: Ref,  # [L pages kinds K p H], in HBM
    out_ref: Ref,  # [T K G H], in HBM
    blocks: Ref,
    queries: Ref,
    results: Ref,
    flat: Ref,
    top: Ref,
    total: Ref,
    mixed: Ref,
    block_sems: Ref,
    query_sems: Ref,
    out_sem: Ref,
    *,
    sizes: Sizes,
    pages_per_seq: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    core, cores = pl.program_id(0), pl.num_programs(0)
    num_tiles, num_rows, layer = counts_ref[0], counts_ref[1], counts_ref[2]

    def column(tile: Index, name: str) -> Int[Array, ""]:
        return tiles_ref[tile * len(COLUMNS) + COLUMNS.index(name)]

    def page_copy(tile: Index, block: Index, index: Index, slot: Index) -> Any:
        page = table_ref[column(tile, "seq") * pages_per_seq + block * sizes.pages + index]
        return pltpu.make_async_copy(kv_ref.at[layer, page], blocks.at[slot, index], block_sems.at[slot])

    def each_page(tile: Index, block: Index, slot: Index, *, wait: bool) -> None:
        """Start or await the copies of a block's pages, as far as the tile sees them."""

        def one(index: Int[Array, ""], _: None) -> None:
            copy = page_copy(tile, block, index, slot)
            copy.wait() if wait else copy.start()

        lax.fori_loop(0, pages_seen(tile, block), one, None)

    def pages_seen(tile: Index, block: Index) -> Int[Array, ""]:
        newest = column(tile, "position") + column(tile, "count")
        return jnp.clip((newest + sizes.page - 1) // sizes.page - block * sizes.pages, 0, sizes.pages)

    def clear_unseen(tile: Index, block: Index, slot: Index) -> None:
        """What no copy has ever filled is multiplied by weights of 0, and must be finite."""

        def one(index: Int[Array, ""], _: None) -> None:
            values = blocks.at[slot, index, sizes.kinds - 1]
            values[...] = jnp.zeros(values.shape, values.dtype)

        lax.fori_loop(pages_seen(tile, block), sizes.pages, one, None)

    def query_copy(tile: Index, slot: Index) -> Any:
        rows = pl.ds(column(tile, "first"), column(tile, "count"))
        return pltpu.make_async_copy(
            q_ref.at[rows], queries.at[slot, pl.ds(0, column(tile, "count"))], query_sems.at[slot]
        )

    def out_copy(first: Index, count: Index) -> Any:
        return pltpu.make_async_copy(results.at[pl.ds(0, count)], out_ref.at[pl.ds(first, count)], out_sem.at[0])

    def each_head(rows: int, visit_head: Callable[[Index], None]) -> None:
        """Small tiles leave the units idle unless heads overlap; a large one fills them, and is slow to compile."""
        if rows * sizes.group <= UNROLLED_ROWS:
            for head in range(sizes.key_heads):
                visit_head(head)
        else:
            lax.fori_loop(0, sizes.key_heads, lambda head, _: visit_head(head), None)

    def attend(tile: Index, block: Index, slot: Index, head: Index, rows: int) -> None:
        """Take a block into the running softmax of one key head (Milakov and Gimelshein 2018)."""
        own = pl.ds(0, rows * sizes.group)
        keys, values = (
            blocks[slot, :, kind, head].reshape(sizes.block_tokens, sizes.width) for kind in (0, sizes.kinds - 1)
        )
        scores = _dot(flat[head, own], keys, 1) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        row = lax.broadcasted_iota(jnp.int32, (rows * sizes.group, 1), 0) // sizes.group
        key = lax.broadcasted_iota(jnp.int32, (1, sizes.block_tokens), 1)
        distance = row + (column(tile, "position") - block * sizes.block_tokens) - key
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(seen, scores, HIDDEN)
        old = top[head, own]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        weights, decay = jnp.exp(scores - new[:, :1]), jnp.exp(old - new)
        top[head, own] = new
        total[head, own] = total[head, own] * decay + jnp.sum(weights, axis=1, keepdims=True)
        mixed[head, own] = mixed[head, own] * decay[:, :1] + _dot(weights.astype(values.dtype), values, 0)

    def visit(tile: Int[Array, ""], turn: Int[Array, ""], step: Int[Array, ""], rows: int) -> Int[Array, ""]:
        """One tile with room for `rows` rows; returns the number of blocks taken so far."""
        low, high, following = column(tile, "low"), column(tile, "high"), tile + cores
        query_copy(tile, turn % 2).wait()
        own = pl.ds(0, rows * sizes.group)

        def begin(head: Index) -> None:
            flat[head, own] = _merged(queries[turn % 2, pl.ds(0, rows), head])
            top[head, own] = jnp.full((rows * sizes.group, LANES), HIDDEN, jnp.float32)
            total[head, own] = jnp.zeros((rows * sizes.group, LANES), jnp.float32)
            mixed[head, own] = jnp.zeros((rows * sizes.group, sizes.width), jnp.float32)

        each_head(rows, begin)

        @pl.when(following < num_tiles)
        def _next_queries() -> None:
            query_copy(following, (turn + 1) % 2).start()

        def take(block: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
            last = block + 1 == high

            @pl.when(~last)
            def _next_block() -> None:
                each_page(tile, block + 1, (step + 1) % 2, wait=False)

            @pl.when(last & (following < num_tiles))
            def _next_tile() -> None:
                each_page(following, column(following, "low"), (step + 1) % 2, wait=False)

            @pl.when(step < 2)
            def _new_slot() -> None:
                clear_unseen(tile, block, step % 2)

            each_page(tile, block, step % 2, wait=True)
            each_head(rows, lambda head: attend(tile, block, step % 2, head, rows))
            return step + 1

        step = lax.fori_loop(low, high, take, step)

        @pl.when(turn > 0)
        def _results_are_free() -> None:
            out_copy(0, column(tile - cores, "count")).wait()

        def end(head: Index) -> None:
            found = jnp.where(top[head, own][:, :1] > HIDDEN, mixed[head, own] / total[head, own][:, :1], 0)
            results[pl.ds(0, rows), head] = _split(found, rows).astype(results.dtype)

        each_head(rows, end)
        out_copy(column(tile, "first"), column(tile, "count")).start()
        return step

    @pl.when(core < num_tiles)
    def _first() -> None:
        query_copy(core, 0).start()
        each_page(core, column(core, "low"), 0, wait=False)

    def turn(number: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
        tile = core + number * cores
        if sizes.short_rows == sizes.long_rows:
            return visit(tile, number, step, sizes.long_rows)
        short, long = (
            lambda rows=rows: visit(tile, number, step, rows) for rows in (sizes.short_rows, sizes.long_rows)
        )
        return lax.cond(column(tile, "count") <= sizes.short_rows, short, long)

    turns = (num_tiles - core + cores - 1) // cores
    lax.fori_loop(0, turns, turn, 0)

    @pl.when(turns > 0)
    def _last_results() -> None:
        out_copy(0, column(core + (turns - 1) * cores, "count")).wait()

    @pl.when(core == 0)
    def _padding_rows() -> None:
        results[...] = jnp.zeros(results.shape, results.dtype)
        missing = out_ref.shape[0] - num_rows

        def clear(number: Int[Array, ""], _: None) -> None:
            first = num_rows + number * sizes.long_rows
            copy = out_copy(first, jnp.minimum(sizes.long_rows, out_ref.shape[0] - first))
            copy.start()
            copy.wait()

        lax.fori_loop(0, (missing + sizes.long_rows - 1) // sizes.long_rows, clear, None)


def _dot(left: Float[Array, "a b"], right: Float[Array, "c d"], axis: int) -> Float[Array, "a e"]:
    """Product over the last axis of `left` and an axis of `right`, with float32 sums."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _merged(queries: Float[Array, "R G H"]) -> Float[Array, "R*G H"]:
    rows, group, width = queries.shape
    return queries.astype(jnp.float32).reshape(rows * group, width).astype(queries.dtype)


def _split(found: Float[Array, "rows H"], rows: int) -> Float[Array, "R G H"]:
    return found.reshape(rows, found.shape[0] // rows, found.shape[1])
