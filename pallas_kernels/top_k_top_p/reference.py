"""Sampling-set masks in plain jax: the specification, and the implementation for CPUs.

Float order is integer order of the bits (negative numbers reversed), so a threshold is found exactly by fixing its 32
bits one after the other, each with one compare-and-reduce pass over the row, instead of sorting it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32


def top_k_top_p_mask(
    logits: Float[Array, "S V"], top_k: Int[Array, "S"], top_p: Float[Array, "S"], min_p: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_mask`. A filter that no row uses is skipped."""
    use_k = (top_k > 0) & (top_k < logits.shape[1])
    use_p = top_p < 1
    logits = lax.cond(jnp.any(min_p > 0), lambda x: _min_p(x, min_p), lambda x: x, logits)
    logits = lax.cond(jnp.any(use_k), lambda x: _top_k(x, top_k, use_k), lambda x: x, logits)
    return lax.cond(jnp.any(use_p), lambda x: _top_p(x, top_p, use_p), lambda x: x, logits)


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
