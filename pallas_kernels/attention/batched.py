"""Ragged paged attention in plain jax for accelerators: all tiles at once, block of keys by block of keys.

The reference walks tiles one after the other, which suits a CPU; a GPU or TPU needs all of them in each operation. The
price is a gather of every tile's pages, and that the longest sequence of the batch sets the number of blocks.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

TILE_ROWS = 32  # query rows per tile of a batch that is not all decodes
BLOCK_TOKENS = 256  # keys per block, at most


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
    num_tokens, num_heads, width = q.shape
    num_kv_heads, page = kv.shape[3:5]
    rows = 1 if num_tokens == kv_lens.shape[0] else min(TILE_ROWS, num_tokens)
    seq, row, valid = _tiles(cu_q_lens, num_tokens, rows)
    position = row + (kv_lens - cu_q_lens[1:])[seq][:, None]  # [n R]
    tiles = q.at[row].get(mode="clip").reshape(*row.shape, num_kv_heads, num_heads // num_kv_heads, width)
    block_pages = min(max(BLOCK_TOKENS // page, 1), page_table.shape[1])
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    columns = block_pages * page

    def add_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        pages = lax.dynamic_slice_in_dim(table, index * block_pages, block_pages, axis=1)[seq]
        cells = kv.at[layer, pages].get(mode="clip")  # [n, pages, 2, K, p, H]
        keys, values = (
            cells[:, :, kind].transpose(0, 2, 1, 3, 4).reshape(len(seq), num_kv_heads, columns, width)
            for kind in (0, kv.shape[2] - 1)
        )
        scores = _einsum("nrkgh,nkch->nkrgc", tiles, keys) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        distance = position[:, :, None] - (index * columns + jnp.arange(columns, dtype=jnp.int32))
        visible = valid[:, :, None] & (distance >= 0)
        if window is not None:
            visible &= distance < window
        return _accumulate(carry, jnp.where(visible[:, None, :, None], scores, -jnp.inf), values)

    shape = (len(seq), num_kv_heads, rows, num_heads // num_kv_heads)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))
    newest = jnp.max(jnp.where(valid, position + 1, 0))
    oldest = 0 if window is None else jnp.min(jnp.where(valid, jnp.maximum(position - window + 1, 0), newest))
    bounds = oldest // columns, (newest + columns - 1) // columns
    _, total, mixed = lax.fori_loop(*bounds, add_block, start)
    out = jnp.where(total[..., None] > 0, mixed / jnp.maximum(total, 1e-37)[..., None], 0)
    out = out.transpose(0, 2, 1, 3, 4).reshape(*row.shape, num_heads, width).astype(q.dtype)
    return jnp.zeros_like(q).at[jnp.where(valid, row, num_tokens)].set(out, mode="drop")


def _tiles(cu_q_lens: Int[Array, "bounds"], num_tokens: int, rows: int) -> tuple[Array, Array, Array]:
    """Each tile's sequence `[n]`, its query rows `[n, R]`, and which of them exist; a tile belongs to one sequence."""
    starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
    counts = (ends - starts + rows - 1) // rows
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    num_tiles = num_tokens if rows == 1 else num_tokens // rows + len(counts)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(upto <= tile[:, None], axis=1, dtype=jnp.int32), len(counts) - 1)
    first = starts[seq] + (tile - (upto - counts)[seq]) * rows
    row = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    return seq, row, (row < ends[seq][:, None]) & (tile < upto[-1])[:, None]


def _accumulate(
    carry: tuple[Array, Array, Array], scores: Float[Array, "n K R G c"], values: Float[Array, "n K c H"]
) -> tuple[Array, Array, Array]:
    """One block of the running softmax (Milakov and Gimelshein 2018); statistics are float32 `[n, K, R, G]`."""
    top, total, mixed = carry
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    base = jnp.where(new_top == -jnp.inf, 0, new_top)  # a row may see nothing of this block
    weights = jnp.exp(scores - base[..., None])
    decay = jnp.exp(top - base)
    new = _einsum("nkrgc,nkch->nkrgh", weights.astype(values.dtype), values)
    return new_top, total * decay + jnp.sum(weights, axis=-1), mixed * decay[..., None] + new


def _einsum(subscripts: str, left: Array, right: Array) -> Array:
    """Products with float32 sums; float32 inputs are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=jnp.float32)
