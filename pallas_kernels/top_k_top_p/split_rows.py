"""The sampling floor of rows that several devices share, in plain jax.

Sorting the parts, or fixing one bit of the floor after the other, would cost either far more arithmetic or far more
collectives. Here every round compares the part of each device with several thresholds in one pass over it, and adds up
the counts and weights of all devices, which is one all-reduce of a few numbers a row. The range that is left is cut
until one logit is in it, or exactly as many as needed are above it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.top_k_top_p.search import LOWEST, largest, order_of, share_bound, value_of

BITS = 3  # of the range are fixed by one round, with 2**BITS - 1 thresholds
FIRST = (48.0, 24.0, 12.0, 6.0, 3.0, 1.5, 0.75)  # under the best logit: the thresholds of the first round


def top_k_top_p_floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    axis: str,
) -> Float[Array, "S"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_floor`. Filters that no row uses are skipped.

    Every device gets the same sums from the all-reduces, hence takes the same turns.
    """
    size = logits.shape[1] * lax.axis_size(axis)
    use_k, use_p = (top_k > 0) & (top_k < size), top_p < 1
    off = jnp.full(top_k.shape, -jnp.inf, jnp.float32)

    def search() -> Float[Array, "S"]:
        best = lax.pmax(jnp.max(logits, axis=1), axis)
        row = _Row(logits, best, size, axis)
        low = best + jnp.log(min_p)  # log(0) = -inf keeps everything
        floor = lax.cond(jnp.any(use_k), lambda: _kth(row, top_k, use_k, low), lambda: low)
        return lax.cond(jnp.any(use_p), lambda: _nucleus(row, top_p, use_p, floor), lambda: floor)

    return lax.cond(jnp.any(use_k | use_p | (min_p > 0)), search, lambda: off)


@dataclass(frozen=True)
class _Row:
    """Rows of `size` logits, of which each device along `axis` holds a part, and their largest."""

    logits: Float[Array, "S V"]
    best: Float[Array, "S"]
    size: int
    axis: str

    def weights(self) -> Float[Array, "S V"]:
        return jnp.exp(self.logits - jnp.maximum(self.best, LOWEST)[:, None])

    def first(self) -> list[Array]:
        return [self.best - distance for distance in FIRST]

    def count(self, thresholds: list[Array]) -> list[tuple[Array, Array]]:
        """How many logits are at or above each threshold, twice: what they weigh if each weighs 1."""
        counts = [jnp.sum(self.logits >= t[:, None], axis=1, dtype=jnp.int32) for t in thresholds]
        return [(count, count) for count in lax.psum(jnp.stack(counts), self.axis)]

    def weigh(self, thresholds: list[Array]) -> list[tuple[Array, Array]]:
        """How many logits are at or above each threshold, and the sums of their weights."""
        weights = jnp.exp(self.logits - jnp.maximum(self.best, LOWEST)[:, None])
        above = [self.logits >= t[:, None] for t in thresholds]
        # One all-reduce for both: float32 counts exactly, up to 2**24.
        counts = [jnp.sum(flags, axis=1, dtype=jnp.float32) for flags in above]
        sums = [jnp.sum(jnp.where(flags, weights, 0.0), axis=1) for flags in above]
        totals = lax.psum(jnp.stack(counts + sums), self.axis)
        return list(zip(totals[: len(counts)].astype(jnp.int32), totals[len(counts) :], strict=True))


def _kth(row: _Row, top_k: Int[Array, "S"], on: Bool[Array, "S"], low: Float[Array, "S"]) -> Float[Array, "S"]:
    """`low`, raised to the k-th largest logit where that is `on` and higher."""
    last = order_of(row.best)
    kth = value_of(largest(row.count, top_k, jnp.where(on, order_of(low), last), last, BITS, row.first())[0])
    return jnp.where(on, jnp.maximum(low, kth), low)


def _nucleus(row: _Row, top_p: Float[Array, "S"], on: Bool[Array, "S"], floor: Float[Array, "S"]) -> Float[Array, "S"]:
    """`floor`, raised where that is `on` to the nucleus of what is left."""
    kept, last = row.weigh([floor])[0][1], order_of(row.best)
    least = share_bound(row.best, top_p, kept, row.size)
    start = jnp.where(on, jnp.maximum(order_of(floor), order_of(least)), last)
    nucleus = value_of(largest(row.weigh, top_p * kept, start, last, BITS, row.first())[0])
    return jnp.where(on, jnp.maximum(floor, nucleus), floor)
