"""Ragged paged attention in plain jax: the specification, and the implementation for CPUs.

Every sequence's rows are cut into tiles of at most `R` rows, and a loop visits exactly the tiles that exist. A tile
walks the blocks of pages that its rows can see with a running softmax (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018), so the cost follows the real lengths, not the widths of the arrays.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

TILE_ROWS = 64  # query rows per tile: enough for the matrix products, few enough that a lone decode row wastes little
BLOCK_TOKENS = 128  # keys per block: a block of one head stays in the first-level cache
BLOCK_PAGES = 8  # at most; each page is one slice in the program


class _Tiles(NamedTuple):
    """Runs of query rows, each of one sequence; only the first `count` exist."""

    seq: Int[Array, "tiles"]
    first: Int[Array, "tiles"]  # first query row
    end: Int[Array, "tiles"]  # one past the sequence's last query row
    count: Int[Array, ""]


def paged_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    kv_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "T N H"]:
    """See `pallas_kernels.attention.paged_attention`."""
    num_tokens, heads, width = q.shape
    key_heads, page = kv.shape[3:5]
    rows = 1 if num_tokens == kv_lens.shape[0] else min(TILE_ROWS, num_tokens)
    tiles = _cut(cu_q_lens, num_tokens, rows)
    block_pages = min(max(BLOCK_TOKENS // page, 1), BLOCK_PAGES, page_table.shape[1])
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    grouped = q.reshape(num_tokens, key_heads, heads // key_heads, width)

    def visit(item: Int[Array, ""], out: Float[Array, "T K G H"]) -> Float[Array, "T K G H"]:
        tile, head = item // key_heads, item % key_heads
        seq, first, end = tiles.seq[tile], tiles.first[tile], tiles.end[tile]
        # Rows before `first` or from `end` on belong to other tiles: computed, but not stored.
        start = jnp.minimum(first, num_tokens - rows)
        row = start + jnp.arange(rows, dtype=jnp.int32)
        shift = kv_lens[seq] - end  # position = row + shift
        place, shape = (start, head, 0, 0), (rows, 1, *grouped.shape[2:])
        queries = lax.dynamic_slice(grouped, place, shape)[:, 0].astype(jnp.float32) * scale

        def block(index: Int[Array, ""]) -> tuple[Float[Array, "c H"], Float[Array, "c H"]]:
            pages = lax.dynamic_slice(table, (seq, index * block_pages), (1, block_pages))[0]
            return _read_block(kv, layer, pages, head)

        oldest = 0 if window is None else jnp.maximum(first + shift - window + 1, 0)
        newest = jnp.minimum(end, start + rows) + shift  # one past
        tokens = block_pages * page
        bounds = (oldest // tokens, (newest + tokens - 1) // tokens)
        result = _attend(queries, row + shift, block, bounds, tokens, window, soft_cap)
        mine = (row >= first) & (row < end)
        kept = jnp.where(mine[:, None, None], result.astype(out.dtype), lax.dynamic_slice(out, place, shape)[:, 0])
        return lax.dynamic_update_slice(out, kept[:, None], place)

    out = lax.fori_loop(0, tiles.count * key_heads, visit, jnp.zeros_like(grouped))
    return out.reshape(q.shape)


def _cut(cu_q_lens: Int[Array, "bounds"], num_tokens: int, rows: int) -> _Tiles:
    """Cut every sequence's rows into tiles of at most `rows`; there are at most `T / rows + S` of them."""
    starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
    counts = (ends - starts + rows - 1) // rows
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(num_tokens // rows + len(counts), dtype=jnp.int32)
    seq = jnp.sum(upto[None] <= tile[:, None], axis=1, dtype=jnp.int32)
    seq = jnp.minimum(seq, len(counts) - 1)  # past the last tile
    first = starts[seq] + (tile - upto[seq] + counts[seq]) * rows
    return _Tiles(seq, first, ends[seq], upto[-1])


def _read_block(
    kv: Float[Array, "L pages 2 K p H"], layer: int | Int[Array, ""], pages: Int[Array, "n"], head: Int[Array, ""]
) -> tuple[Float[Array, "c H"], Float[Array, "c H"]]:
    """Keys and values of one head in these pages. One slice per page, because XLA's CPU gather copies by element."""
    page, width = kv.shape[4:]

    def read(kind: int) -> Float[Array, "c H"]:
        slices = [
            lax.dynamic_slice(kv, (layer, pages[i], kind, head, 0, 0), (1, 1, 1, 1, page, width))
            for i in range(pages.shape[0])
        ]
        return jnp.concatenate([piece.reshape(page, width) for piece in slices]).astype(jnp.float32)

    return read(0), read(1)


def _attend(queries, positions, block, bounds, tokens, window, soft_cap) -> Float[Array, "R G H"]:
    """Attention of one tile and key head over the blocks `bounds[0]:bounds[1]`, `tokens` columns each; float32."""
    rows, group, width = queries.shape
    flat = queries.reshape(rows * group, width)

    def add(index: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        keys, values = block(index)
        scores = lax.dot_general(flat, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = _visible(positions, index * tokens + jnp.arange(tokens, dtype=jnp.int32), window)
        scores = jnp.where(jnp.repeat(visible, group, axis=0), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # a row may see nothing of this block
        weights = jnp.exp(scores - base[:, None])
        decay = jnp.exp(top - base)
        mixed = mixed * decay[:, None] + jnp.dot(weights, values, preferred_element_type=jnp.float32)
        return new_top, total * decay + jnp.sum(weights, axis=1), mixed

    start = (
        jnp.full(rows * group, -jnp.inf, jnp.float32),
        jnp.zeros(rows * group, jnp.float32),
        jnp.zeros((rows * group, width), jnp.float32),
    )
    _, total, mixed = lax.fori_loop(*bounds, add, start)
    return jnp.where(total[:, None] > 0, mixed / jnp.maximum(total, 1e-37)[:, None], 0.0).reshape(queries.shape)


def _visible(positions: Int[Array, "R"], columns: Int[Array, "c"], window: int | None) -> Bool[Array, "R c"]:
    distance = positions[:, None] - columns[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
