"""Sampling-set masks in plain jax: the specification, and the implementation for CPUs.

Where every row's set lies within its `HEAD` best tokens, those decide it. Elsewhere the threshold is searched: float
order is integer order of the bits (negative numbers reversed), so its 32 bits can be fixed one after the other, each
with one compare-and-reduce pass over the row, which is exact and far cheaper than sorting it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

HEAD = 128  # best tokens of a row that are looked at first


def top_k_top_p_mask(
    logits: Float[Array, "S V"], top_k: Int[Array, "S"], top_p: Float[Array, "S"], min_p: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_mask`. Filters that no row uses are skipped."""
    use_k = (top_k > 0) & (top_k < logits.shape[1])
    use_p = top_p < 1
    logits = lax.cond(jnp.any(min_p > 0), lambda x: _min_p(x, min_p), lambda x: x, logits)

    def search(x: Float[Array, "S V"]) -> Float[Array, "S V"]:
        x = lax.cond(jnp.any(use_k), lambda x: _top_k(x, top_k, use_k), lambda x: x, x)
        return lax.cond(jnp.any(use_p), lambda x: _top_p(x, top_p, use_p), lambda x: x, x)

    def restrict(x: Float[Array, "S V"]) -> Float[Array, "S V"]:
        floor, certain = _floor_from_head(x, top_k, top_p, use_k, use_p)
        return lax.cond(jnp.all(certain), lambda x: jnp.where(x >= floor[:, None], x, -jnp.inf), search, x)

    return lax.cond(jnp.any(use_k | use_p), restrict, lambda x: x, logits)


def _floor_from_head(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    use_k: Bool[Array, "S"],
    use_p: Bool[Array, "S"],
) -> tuple[Float[Array, "S"], Bool[Array, "S"]]:
    """The smallest logit that top-k and top-p keep, and for which rows the best `HEAD` tokens were enough to know."""
    size = min(HEAD, logits.shape[1])
    head = lax.top_k(logits, size)[0]
    kth = jnp.take_along_axis(head, jnp.clip(top_k - 1, 0, size - 1)[:, None], axis=1)
    floor = jnp.where(use_k[:, None], kth, -jnp.inf)
    best = jnp.max(head, axis=1, keepdims=True)  # a slice of `head` would make XLA sort the whole row
    total = jnp.sum(jnp.where(logits >= floor, jnp.exp(logits - best), 0.0), axis=1)
    weights = jnp.where(head >= floor, jnp.exp(head - best), 0.0)
    above = (head[:, None, :] > head[:, :, None]).astype(jnp.float32)
    larger = jnp.einsum("sij,sj->si", above, weights, precision=lax.Precision.HIGHEST)
    kept = (larger < (top_p * total)[:, None]) | (head == best)
    nucleus = jnp.min(jnp.where(kept, head, jnp.inf), axis=1)
    certain = (~use_k | (top_k <= size)) & (~use_p | ~jnp.all(kept, axis=1) | (jnp.min(head, axis=1) < floor[:, 0]))
    return jnp.where(use_p, jnp.maximum(nucleus, floor[:, 0]), floor[:, 0]), certain


def _min_p(logits: Float[Array, "S V"], min_p: Float[Array, "S"]) -> Float[Array, "S V"]:
    floor = jnp.max(logits, axis=1) + jnp.log(min_p)  # log(0) = -inf keeps everything
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


def _top_k(logits: Float[Array, "S V"], top_k: Int[Array, "S"], use: Bool[Array, "S"]) -> Float[Array, "S V"]:
    keys = _ordered_bits(logits)

    def enough(threshold: UInt32[Array, "S"]) -> Bool[Array, "S"]:
        return jnp.sum(keys >= threshold[:, None], axis=1, dtype=jnp.int32) >= top_k

    kth = _largest(enough, logits.shape[0])
    return jnp.where((keys >= kth[:, None]) | ~use[:, None], logits, -jnp.inf)


def _top_p(logits: Float[Array, "S V"], top_p: Float[Array, "S"], use: Bool[Array, "S"]) -> Float[Array, "S V"]:
    keys = _ordered_bits(logits)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    budget = top_p * jnp.sum(weights, axis=1)

    def too_many(threshold: UInt32[Array, "S"]) -> Bool[Array, "S"]:
        return jnp.sum(jnp.where(keys > threshold[:, None], weights, 0.0), axis=1) >= budget

    # Tokens up to the largest such threshold have too much probability above them.
    last_out = _largest(too_many, logits.shape[0])
    best = keys == jnp.max(keys, axis=1, keepdims=True)
    kept = (keys > last_out[:, None]) | best | ~use[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _ordered_bits(values: Float[Array, "S V"]) -> UInt32[Array, "S V"]:
    """Unsigned integers in the order of the floats; -0 becomes 0 first, so that equal floats get equal integers."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[UInt32[Array, "S"]], Bool[Array, "S"]], rows: int) -> UInt32[Array, "S"]:
    """Each row's largest integer that meets a condition met by all integers up to some point; 0 if none does."""

    def fix(step: Int[Array, ""], found: UInt32[Array, "S"]) -> UInt32[Array, "S"]:
        tried = found | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    return lax.fori_loop(0, 32, fix, jnp.zeros(rows, jnp.uint32))
