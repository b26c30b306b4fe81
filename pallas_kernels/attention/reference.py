"""Ragged paged attention in plain jax: the specification, and the implementation for CPUs.

Every sequence's rows are cut into tiles of at most `R` rows, and a loop visits exactly the (tile, key head) pairs that
exist. Each walks the blocks of pages that its rows can see with a running softmax (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018), so the cost follows the real lengths, not the widths of the arrays.

What XLA makes of it on a CPU decided the form: batched products and gathers cost two to four times the plain products
and page slices used here, and each further operation inside the loops is compiled once per layer.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

TILE_ROWS = 64  # query rows per tile: enough for the products, few enough that a lone decode row wastes little
BLOCK_TOKENS = 128  # keys per block: a block of one head stays in the cache next to the core
BLOCK_PAGES = 4  # pages per block at most: each is a slice in the program, and slow to compile

Block = Callable[[Int[Array, ""]], tuple[Float[Array, "c H"], Float[Array, "c H"]]]


def paged_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages kinds K p H"],
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
    block_pages = min(max(BLOCK_TOKENS // page, 1), BLOCK_PAGES, page_table.shape[1])
    items, count = _plan(cu_q_lens, kv_lens, num_tokens, rows, block_pages * page, window)
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    grouped = q.reshape(num_tokens, key_heads, heads // key_heads, width)
    tile_shape = (rows, 1, *grouped.shape[2:])

    def visit(index: Int[Array, ""], out: Float[Array, "T K G H"]) -> Float[Array, "T K G H"]:
        head = index % key_heads
        seq, start, first, end, shift, *bounds = _slice(items, (index // key_heads, 0), (1, items.shape[1]))[0]
        place = (start, head, 0, 0)

        def block(number: Int[Array, ""]) -> tuple[Float[Array, "c H"], Float[Array, "c H"]]:
            pages = _slice(table, (seq, number * block_pages), (1, block_pages))[0]
            return _read(kv, layer, pages, 0, head), _read(kv, layer, pages, kv.shape[2] - 1, head)

        queries = _slice(grouped, place, tile_shape)[:, 0].astype(jnp.float32) * scale
        row = start + jnp.arange(rows, dtype=jnp.int32)
        result = _attend(queries, row + shift, block, bounds, block_pages * page, window, soft_cap)
        mine = (row >= first) & (row < end)  # the other rows belong to other tiles: computed, but not stored
        kept = jnp.where(mine[:, None, None], result.astype(out.dtype), _slice(out, place, tile_shape)[:, 0])
        return lax.dynamic_update_slice(out, kept[:, None], place, allow_negative_indices=False)

    return lax.fori_loop(0, count * key_heads, visit, jnp.zeros_like(grouped)).reshape(q.shape)


def _plan(
    cu_q_lens: Int[Array, "bounds"],
    kv_lens: Int[Array, "S"],
    num_tokens: int,
    rows: int,
    block_tokens: int,
    window: int | None,
) -> tuple[Int[Array, "tiles 7"], Int[Array, ""]]:
    """Cut every sequence's rows into tiles; there are at most `T / rows + S` of them.

    Returns the tiles as int32 columns (sequence; row where its slice starts; first row and one past the last row that
    belong to it; what to add to a row to get its position; first block and one past the last block that its rows see)
    and how many exist.
    """
    starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
    counts = (ends - starts + rows - 1) // rows
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(num_tokens // rows + len(counts), dtype=jnp.int32)
    seq = jnp.sum(upto[None] <= tile[:, None], axis=1, dtype=jnp.int32)
    seq = jnp.minimum(seq, len(counts) - 1)  # the tiles that do not exist
    first = starts[seq] + (tile - upto[seq] + counts[seq]) * rows
    end = jnp.minimum(first + rows, ends[seq])
    shift = kv_lens[seq] - ends[seq]
    low = jnp.zeros_like(first) if window is None else jnp.maximum(first + shift - window + 1, 0) // block_tokens
    high = (end + shift + block_tokens - 1) // block_tokens
    return jnp.stack((seq, jnp.minimum(first, num_tokens - rows), first, end, shift, low, high), axis=1), upto[-1]


def _slice(array: Array, start: tuple[int | Int[Array, ""], ...], shape: tuple[int, ...]) -> Array:
    """`lax.dynamic_slice` without the code for indices that count from the end."""
    return lax.dynamic_slice(array, start, shape, allow_negative_indices=False)


def _read(
    kv: Float[Array, "L pages kinds K p H"],
    layer: int | Int[Array, ""],
    pages: Int[Array, "n"],
    kind: int,
    head: Int[Array, ""],
) -> Float[Array, "c H"]:
    """Keys (kind 0) or values (the last) of one head in these pages, float32."""
    shape = (1, 1, 1, 1, *kv.shape[4:])
    cells = [_slice(kv, (layer, pages[i], kind, head, 0, 0), shape) for i in range(pages.shape[0])]
    return jnp.concatenate(cells, axis=4).reshape(-1, kv.shape[5]).astype(jnp.float32)


def _attend(
    queries: Float[Array, "R G H"],
    positions: Int[Array, "R"],
    block: Block,
    bounds: list[Int[Array, ""]],
    block_tokens: int,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "R G H"]:
    """Attention of one tile and key head over the blocks `bounds[0]:bounds[1]`; all float32."""
    rows, group, width = queries.shape
    flat = queries.reshape(rows * group, width)

    def add(number: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        keys, values = block(number)
        scores = lax.dot_general(flat, keys, (((1,), (1,)), ((), ())))
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = _visible(positions, number * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32), window)
        scores = jnp.where(jnp.repeat(visible, group, axis=0), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # a row may see nothing of this block
        weights, decay = jnp.exp(scores - base[:, None]), jnp.exp(top - base)
        return new_top, total * decay + jnp.sum(weights, axis=1), mixed * decay[:, None] + jnp.dot(weights, values)

    nothing = jnp.zeros(rows * group, jnp.float32)
    start = (nothing - jnp.inf, nothing, jnp.zeros_like(flat))
    _, total, mixed = lax.fori_loop(bounds[0], bounds[1], add, start)
    return (mixed / jnp.where(total > 0, total, 1.0)[:, None]).reshape(queries.shape)


def _visible(positions: Int[Array, "R"], columns: Int[Array, "c"], window: int | None) -> Bool[Array, "R c"]:
    distance = positions[:, None] - columns[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
