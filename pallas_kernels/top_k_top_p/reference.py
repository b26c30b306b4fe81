"""The sampling floor in plain jax: the specification, and the implementation for CPUs.

Where every row's floor lies within its `HEAD` best tokens, those decide it. Elsewhere it is searched: float order is
integer order of the bits (negative numbers reversed), so its 32 bits can be fixed one after the other, each with one
compare-and-reduce pass over the row, which is exact and far cheaper than sorting it. Rows that several devices share
are searched by `split_rows`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.top_k_top_p import split_rows

HEAD = 128  # best tokens of a row that are looked at first
SIGN = 1 << 31


def top_k_top_p_floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    scale: Float[Array, "S"],
    *,
    axis: str | None = None,
) -> Float[Array, "S"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_floor`. Filters that no row uses are skipped."""
    logits = logits * scale[:, None]
    if axis is not None:
        return split_rows.top_k_top_p_floor(logits, top_k, top_p, min_p, axis)
    use_k = (top_k > 0) & (top_k < logits.shape[1])
    use_p = top_p < 1
    off = jnp.full(logits.shape[0], -jnp.inf, jnp.float32)
    # log(0) = -inf keeps everything
    low = lax.cond(jnp.any(min_p > 0), lambda: jnp.max(logits, axis=1) + jnp.log(min_p), lambda: off)

    def search() -> Float[Array, "S"]:
        kth = lax.cond(jnp.any(use_k), lambda: jnp.where(use_k, _kth(logits, top_k), -jnp.inf), lambda: off)
        floor = jnp.maximum(low, kth)
        nucleus = lax.cond(
            jnp.any(use_p), lambda: jnp.where(use_p, _nucleus(logits, top_p, floor), -jnp.inf), lambda: off
        )
        return jnp.maximum(floor, nucleus)

    def restrict() -> Float[Array, "S"]:
        floor, certain = _floor_from_head(logits, top_k, top_p, low, use_k, use_p)
        return lax.cond(jnp.all(certain), lambda: floor, search)

    return lax.cond(jnp.any(use_k | use_p), restrict, lambda: low)


def _floor_from_head(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    low: Float[Array, "S"],
    use_k: Bool[Array, "S"],
    use_p: Bool[Array, "S"],
) -> tuple[Float[Array, "S"], Bool[Array, "S"]]:
    """The floor where nothing under `low` may be kept, and for which rows the best `HEAD` tokens suffice to know it."""
    size = min(HEAD, logits.shape[1])
    head = lax.top_k(logits, size)[0]
    kth = jnp.take_along_axis(head, jnp.clip(top_k - 1, 0, size - 1)[:, None], axis=1)
    floor = jnp.maximum(jnp.where(use_k[:, None], kth, -jnp.inf), low[:, None])
    best = jnp.max(head, axis=1, keepdims=True)  # a slice of `head` would make XLA sort the whole row
    total = jnp.sum(jnp.where(logits >= floor, jnp.exp(logits - best), 0.0), axis=1)
    weights = jnp.where(head >= floor, jnp.exp(head - best), 0.0)
    above = (head[:, None, :] > head[:, :, None]).astype(jnp.float32)
    larger = jnp.einsum("sij,sj->si", above, weights, precision=lax.Precision.HIGHEST)
    kept = (larger < (top_p * total)[:, None]) | (head == best)
    nucleus = jnp.min(jnp.where(kept, head, jnp.inf), axis=1)
    certain = (~use_k | (top_k <= size)) & (~use_p | ~jnp.all(kept, axis=1) | (jnp.min(head, axis=1) < floor[:, 0]))
    return jnp.where(use_p, jnp.maximum(nucleus, floor[:, 0]), floor[:, 0]), certain


def _kth(logits: Float[Array, "S V"], top_k: Int[Array, "S"]) -> Float[Array, "S"]:
    """The k-th largest logit, for `0 < k <= V`."""
    keys = _ordered_bits(logits)

    def enough(threshold: UInt32[Array, "S"]) -> Bool[Array, "S"]:
        return jnp.sum(keys >= threshold[:, None], axis=1, dtype=jnp.int32) >= top_k

    return _largest(enough, jnp.max(logits, axis=1))


def _nucleus(logits: Float[Array, "S V"], top_p: Float[Array, "S"], floor: Float[Array, "S"]) -> Float[Array, "S"]:
    """The largest float such that the logits from there on have the share `top_p` of all from `floor` on."""
    keys, best = _ordered_bits(logits), jnp.max(logits, axis=1)
    weights = jnp.where(logits >= floor[:, None], jnp.exp(logits - best[:, None]), 0.0)
    budget = top_p * jnp.sum(weights, axis=1)

    def enough(threshold: UInt32[Array, "S"]) -> Bool[Array, "S"]:
        return jnp.sum(jnp.where(keys >= threshold[:, None], weights, 0.0), axis=1) >= budget

    return _largest(enough, best)


def _ordered_bits(values: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats; -0 becomes 0 first, so that equal floats get equal integers."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    return jnp.where(bits >= jnp.uint32(SIGN), ~bits, bits | jnp.uint32(SIGN))


def _largest(holds: Callable[[UInt32[Array, "S"]], Bool[Array, "S"]], best: Float[Array, "S"]) -> Float[Array, "S"]:
    """Each row's largest float up to `best` of those that meet a condition; all up to some point do."""

    def fix(step: Int[Array, ""], found: UInt32[Array, "S"]) -> UInt32[Array, "S"]:
        tried = found | (jnp.uint32(SIGN) >> step.astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    found = lax.fori_loop(0, 32, fix, jnp.zeros(best.shape, jnp.uint32))
    found = jnp.clip(found, _ordered_bits(jnp.full_like(best, -jnp.inf)), _ordered_bits(best))  # outside are NaNs
    bits = jnp.where(found >= jnp.uint32(SIGN), found ^ jnp.uint32(SIGN), ~found)
    return lax.bitcast_convert_type(bits, jnp.float32)
