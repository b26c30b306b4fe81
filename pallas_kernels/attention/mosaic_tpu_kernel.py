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
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a key that a row does not see; its sums stay finite

Ref = Any
Bool = Any
Index = int | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of tiles (`short_rows` or `long_rows` query rows), of blocks (`pages` pages of `page` tokens) and of heads.

    Tiles with up to `unrolled_rows` rows of queries for each key head have a copy of the code for each key head.
    """

    short_rows: int
    long_rows: int
    pages: int
    page: int
    kinds: int
    key_heads: int
    group: int
    width: int
    unrolled_rows: int

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


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The table of tiles, in scalar memory."""

    ref: Ref  # int32 [tiles x COLUMNS]
    sizes: Sizes

    def column(self, tile: Index, name: str) -> Int[Array, ""]:
        return self.ref[tile * len(COLUMNS) + COLUMNS.index(name)]

    def pages_seen(self, tile: Index, block: Index) -> Int[Array, ""]:
        """How many of a block's pages hold what the rows of the tile may see."""
        newest, sizes = self.column(tile, "position") + self.column(tile, "count"), self.sizes
        return jnp.clip((newest + sizes.page - 1) // sizes.page - block * sizes.pages, 0, sizes.pages)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of the cache in two slots, and their copies."""

    tiles: _Tiles
    table: Ref  # int32 [S x P] pages, or half as many words with the second half in the upper bits
    pages_per_seq: int
    paired: bool
    layer: Index
    kv: Ref  # [L pages kinds K p H], in HBM
    slots: Ref
    sems: Ref

    def _each_page(self, tile: Index, block: Index, slot: Index, then: Callable[[Any], None]) -> None:
        sizes, first = self.tiles.sizes, self.tiles.column(tile, "seq") * self.pages_per_seq

        def one(index: Int[Array, ""], _: None) -> None:
            page = self._page(first + block * sizes.pages + index)
            then(pltpu.make_async_copy(self.kv.at[self.layer, page], self.slots.at[slot, index], self.sems.at[slot]))

        lax.fori_loop(0, self.tiles.pages_seen(tile, block), one, None)

    def _page(self, place: Index) -> Index:
        if not self.paired:
            return self.table[place]
        half = self.table.shape[0]
        upper = jnp.where(place >= half, 1, 0)
        return (self.table[place - upper * half] >> (16 * upper)) & 0xFFFF

    def start(self, tile: Index, block: Index, slot: Index) -> None:
        self._each_page(tile, block, slot, lambda copy: copy.start())

    def wait(self, tile: Index, block: Index, slot: Index) -> None:
        self._each_page(tile, block, slot, lambda copy: copy.wait())

    def clear_rest(self, tile: Index, block: Index, slot: Index) -> None:
        """What no copy has ever filled is multiplied by weights of 0, and must be finite."""
        sizes = self.tiles.sizes

        def one(index: Int[Array, ""], _: None) -> None:
            values = self.slots.at[slot, index, sizes.kinds - 1]
            values[...] = jnp.zeros(values.shape, values.dtype)

        lax.fori_loop(self.tiles.pages_seen(tile, block), sizes.pages, one, None)

    def read(self, slot: Index, head: Index) -> tuple[Float[Array, "c H"], Float[Array, "c H"]]:
        """Keys and values of a head."""
        sizes = self.tiles.sizes
        shape = sizes.block_tokens, sizes.width
        return self.slots[slot, :, 0, head].reshape(shape), self.slots[slot, :, sizes.kinds - 1, head].reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """The running softmax of the key heads of a tile (Milakov and Gimelshein 2018)."""

    sizes: Sizes
    scale: float
    window: int | None
    soft_cap: float | None
    queries: Ref  # [K rows H], queries by key head
    top: Ref
    total: Ref
    mixed: Ref

    def begin(self, head: Index, queries: Float[Array, "R G H"]) -> None:
        rows, group, width = queries.shape
        own = pl.ds(0, rows * group)
        flat = queries.astype(jnp.float32).reshape(rows * group, width)
        self.queries[head, own] = flat.astype(queries.dtype)
        self.top[head, own] = jnp.full((rows * group, LANES), HIDDEN, jnp.float32)
        self.total[head, own] = jnp.zeros((rows * group, LANES), jnp.float32)
        self.mixed[head, own] = jnp.zeros((rows * group, width), jnp.float32)

    def add(self, head: Index, rows: int, ahead: Index, keys: Float[Array, "c H"], values: Float[Array, "c H"]) -> None:
        """Take a block in; the tile's first row stands `ahead` of its first key."""
        count = rows * self.sizes.group
        own = pl.ds(0, count)
        scores = _dot(self.queries[head, own], keys, 1) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        row = lax.broadcasted_iota(jnp.int32, (count, 1), 0) // self.sizes.group
        distance = row + ahead - lax.broadcasted_iota(jnp.int32, (1, keys.shape[0]), 1)
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        scores = jnp.where(seen, scores, HIDDEN)
        old = self.top[head, own]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        weights, decay = jnp.exp(scores - new[:, :1]), jnp.exp(old - new)
        self.top[head, own] = new
        self.total[head, own] = self.total[head, own] * decay + jnp.sum(weights, axis=1, keepdims=True)
        self.mixed[head, own] = self.mixed[head, own] * decay[:, :1] + _dot(weights.astype(values.dtype), values, 0)

    def result(self, head: Index, rows: int) -> Float[Array, "R G H"]:
        own = pl.ds(0, rows * self.sizes.group)
        saw = self.top[head, own][:, :1] > HIDDEN
        found = jnp.where(saw, self.mixed[head, own] / self.total[head, own][:, :1], 0)
        return found.reshape(rows, self.sizes.group, found.shape[1])


def kernel(
    tiles_ref: Ref,  # int32 [tiles x COLUMNS]
    table_ref: Ref,  # as `_Blocks.table`
    counts_ref: Ref,  # int32 [3]: tiles, rows of all sequences, layer
    q_ref: Ref,  # [T K G H], in HBM
    kv_ref: Ref,  # [L pages kinds K p H], in HBM
    out_ref: Ref,  # [T K G H], in HBM
    slots: Ref,
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
    paired: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Serve every `cores`-th tile; the copies of the next block, or of the next tile's first, run beside a block."""
    core, cores = pl.program_id(0), pl.num_programs(0)
    num_tiles = counts_ref[0]
    tiles = _Tiles(tiles_ref, sizes)
    blocks = _Blocks(tiles, table_ref, pages_per_seq, paired, counts_ref[2], kv_ref, slots, block_sems)
    softmax = _Softmax(sizes, scale, window, soft_cap, flat, top, total, mixed)

    def query_copy(tile: Index, slot: Index) -> Any:
        first, count = tiles.column(tile, "first"), tiles.column(tile, "count")
        source, target = q_ref.at[pl.ds(first, count)], queries.at[slot, pl.ds(0, count)]
        return pltpu.make_async_copy(source, target, query_sems.at[slot])

    def out_copy(first: Index, count: Index) -> Any:
        return pltpu.make_async_copy(results.at[pl.ds(0, count)], out_ref.at[pl.ds(first, count)], out_sem.at[0])

    def each_head(rows: int, then: Callable[[Index], None]) -> None:
        if rows * sizes.group <= sizes.unrolled_rows:
            for head in range(sizes.key_heads):
                then(head)
        else:
            lax.fori_loop(0, sizes.key_heads, lambda head, _: then(head), None)

    def visit(tile: Int[Array, ""], turn: Int[Array, ""], step: Int[Array, ""], rows: int) -> Int[Array, ""]:
        """One tile with room for `rows` rows; returns the number of blocks taken so far."""
        low, high, following = tiles.column(tile, "low"), tiles.column(tile, "high"), tile + cores
        query_copy(tile, turn % 2).wait()
        each_head(rows, lambda head: softmax.begin(head, queries[turn % 2, pl.ds(0, rows), head]))

        @pl.when(following < num_tiles)
        def _next_queries() -> None:
            query_copy(following, (turn + 1) % 2).start()

        def take(block: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
            last, slot = block + 1 == high, step % 2
            pl.when(~last)(lambda: blocks.start(tile, block + 1, 1 - slot))
            next_tile = last & (following < num_tiles)
            pl.when(next_tile)(lambda: blocks.start(following, tiles.column(following, "low"), 1 - slot))
            pl.when(step < 2)(lambda: blocks.clear_rest(tile, block, slot))
            blocks.wait(tile, block, slot)
            ahead = tiles.column(tile, "position") - block * sizes.block_tokens
            each_head(rows, lambda head: softmax.add(head, rows, ahead, *blocks.read(slot, head)))
            return step + 1

        def store(head: Index) -> None:
            results[pl.ds(0, rows), head] = softmax.result(head, rows).astype(results.dtype)

        step = lax.fori_loop(low, high, take, step)
        pl.when(turn > 0)(lambda: out_copy(0, tiles.column(tile - cores, "count")).wait())
        each_head(rows, store)
        out_copy(tiles.column(tile, "first"), tiles.column(tile, "count")).start()
        return step

    @pl.when(core < num_tiles)
    def _first() -> None:
        query_copy(core, 0).start()
        blocks.start(core, tiles.column(core, "low"), 0)

    def turn(number: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
        tile = core + number * cores
        if sizes.short_rows == sizes.long_rows:
            return visit(tile, number, step, sizes.long_rows)
        kinds = (lambda rows=rows: visit(tile, number, step, rows) for rows in (sizes.short_rows, sizes.long_rows))
        return lax.cond(tiles.column(tile, "count") <= sizes.short_rows, *kinds)

    turns = (num_tiles - core + cores - 1) // cores
    lax.fori_loop(0, turns, turn, 0)
    pl.when(turns > 0)(lambda: out_copy(0, tiles.column(core + (turns - 1) * cores, "count")).wait())
    pl.when(core == 0)(lambda: _clear(results, out_ref, counts_ref[1], out_copy))


def _clear(zeros: Ref, out_ref: Ref, first: Index, copy: Callable[[Index, Index], Any]) -> None:
    """Make the rows from `first` on 0."""
    zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
    size, end = zeros.shape[0], out_ref.shape[0]

    def part(number: Int[Array, ""], _: None) -> None:
        start = first + number * size
        rows = copy(start, jnp.minimum(size, end - start))
        rows.start()
        rows.wait()

    lax.fori_loop(0, (end - first + size - 1) // size, part, None)


def _dot(left: Float[Array, "a b"], right: Float[Array, "c d"], axis: int) -> Float[Array, "a e"]:
    """Product over the last axis of `left` and an axis of `right`, with float32 sums."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
