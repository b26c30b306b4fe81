"""Ragged paged attention: one op for decode, chunked prefill and verification, mixed in one batch."""

import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import batched, reference
from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.kv_layout import as_queries, from_values


def _xla(*arrays: Any, **options: Any) -> Array:
    """Plain jax in the form that suits the platform the program is lowered for."""
    cpu, other = (functools.partial(form.paged_attention, **options) for form in (reference, batched))
    return lax.platform_dependent(*arrays, cpu=cpu, default=other)


OP = Op(
    "paged_attention",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.attention.mosaic_gpu", "paged_attention"),
        "mosaic_tpu": only_on("tpu", "pallas_kernels.attention.mosaic_tpu", "paged_attention"),
        "xla": _xla,
    },
)


def paged_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages kinds K p width"],
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
    """Causal attention of `T` query rows over the cached keys and values of their sequences.

    Sequence `s` owns the rows `cu_q_lens[s]:cu_q_lens[s + 1]`. They are its last positions: row `t` stands at position
    `kv_lens[s] - cu_q_lens[s + 1] + t`, and its own key and value are already in the cache. The key at column `c` is
    in `kv[layer, page_table[s, c // p], 0, :, c % p]`, its value at index 1 of the same page; where a page is laid out
    otherwise (`pallas_kernels.kv_layout`) the layout follows from its shape. Row `t` sees columns `c <= position`, of
    these only the last `window` (`position - c < window`). The score of a query `x` and a key `y` is `scale * (x . y)`,
    then `soft_cap * tanh(score / soft_cap)`; softmax and sums are float32. The `N` query heads are groups of `N / K`
    consecutive heads per key head.

    Decodes (one row), prefill chunks and padding mix freely. Sequences without rows are padding; rows at or past
    `cu_q_lens[S]` are padding and come out as 0, as does a row that sees nothing. `T == S` suggests that every
    sequence has one row at most: still right when it is not so, but slow.
    Cache cells past a sequence's length must be finite. Entries of `page_table` past the used pages are ignored.

    Args:
        q: queries; kv: stacked cache of all layers (kinds: key, value), `p` tokens per page.
        layer: index into the cache, static or traced.
        page_table: pages of each sequence in order; cu_q_lens: ascending row offsets, starting at 0.
        kv_lens: cached positions of each sequence, this step's included.
        scale: factor of the dot products.
        window: how many positions a row sees, its own included; None for all.
        soft_cap: bound of the scores; None for none.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Returns:
        float `[T, N, H]` in the dtype of `q`.

    Raises:
        ValueError: shapes or options that no implementation can mean, or an unknown implementation.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    _check(q, kv, window, soft_cap)
    with jax.named_scope("paged_attention"):
        out = OP(
            implementation, as_queries(q, kv.shape[-1]), kv, layer, page_table, cu_q_lens, kv_lens,
            scale=scale, window=window, soft_cap=soft_cap,
        )  # fmt: skip
        return from_values(out, q.shape[-1], kv.shape[2])


def _check(q: Array, kv: Array, window: int | None, soft_cap: float | None) -> None:
    heads, key_heads = q.shape[1], kv.shape[3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None for no window")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be positive, or None for no cap")
