"""Ragged paged attention: one op for decode, chunked prefill and verification, mixed in one batch."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


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
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """PLACEHOLDER: simplest correct form, to be replaced."""
    rows = jnp.arange(q.shape[0])
    seq = jnp.clip(jnp.searchsorted(cu_q_lens, rows, side="right") - 1, 0, kv_lens.shape[0] - 1)
    position = kv_lens[seq] - cu_q_lens[seq + 1] + rows
    cells = kv[layer][page_table]  # [S, P, 2, K, p, H]
    s, p_, _, heads, page, width = cells.shape
    k, v = (cells[:, :, i].transpose(0, 1, 3, 2, 4).reshape(s, p_ * page, heads, width)[seq] for i in (0, 1))
    grouped = q.reshape(q.shape[0], heads, -1, width)
    scores = jnp.einsum("tkgh,tckh->tkgc", grouped, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    column = jnp.arange(k.shape[1])
    visible = column[None] <= position[:, None]
    if window is not None:
        visible &= column[None] > position[:, None] - window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("tkgc,tckh->tkgh", weights.astype(v.dtype), v)
    valid = (rows < cu_q_lens[-1]) & (position >= 0)
    return jnp.where(valid[:, None, None], out.reshape(q.shape), 0).astype(q.dtype)
