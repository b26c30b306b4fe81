"""Exact search for a float among those that are between two others, in the integer order of their bits."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

LOWEST = -1.0e38  # stands for -inf where differences are taken
MANY = 2**30  # logits, more than any row has


def largest(
    measure: Callable[[list[Array]], Iterable[tuple[Array, Array]]],
    need: Shaped[Array, "*rows"],
    low: Int[Array, "*rows"],
    high: Int[Array, "*rows"],
    bits: int,
    first: Sequence[Array] = (),
) -> tuple[Int[Array, "*rows"], Bool[Array, "*rows"]]:
    """Each row's largest integer of `low` to `high` from whose float on the logits weigh what they `need`.

    They are expected to do so at `low`; also returns for which rows that was seen to hold at the result. `measure`
    takes ascending thresholds and gives for each how many logits are at or above it, and what they weigh.

    Every round tries `2**bits - 1` thresholds. A row is done as soon as there is one logit in its range, or exactly
    what it needs above it: all floats from there up to the next logit give the same set. The thresholds of the first
    round can be given as `first`, ascending, where the bits of the bounds say little of where the logits are.
    """

    def narrow(state: tuple[Array, ...], first: Sequence[Array] = ()) -> tuple[Array, ...]:
        low, high, least, most = state  # and how many logits are from `low` on (many: not known) and above `high`
        is_open = low < high
        orders = [jnp.clip(order_of(float_), low, high) for float_ in first] or between(low, high, bits)
        for order, (count, total) in zip(orders, measure([value_of(order) for order in orders]), strict=True):
            enough = is_open & (total >= need)
            low, least = jnp.where(enough, jnp.maximum(low, order), low), jnp.where(enough, count, least)
            lower = is_open & (total < need) & (order <= high)
            high, most = jnp.where(lower, order - 1, high), jnp.where(lower, count, most)
            high = jnp.where(enough & (total == need), low, high)
        return low, jnp.where(least - most == 1, low, high), least, most

    state = (low, high, jnp.full_like(low, MANY), jnp.zeros_like(low))
    state = narrow(state, first) if first else state
    low, _, least, _ = lax.while_loop(lambda state: any_of(state[0] < state[1]), narrow, state)
    return low, least < MANY


def share_bound(best: Array, share: Array, total: Array, size: int) -> Array:
    """A float that is under the nucleus of `share` of rows whose `size` logits weigh so much, relative to the best.

    If all logits were under it, they would not have the rest of the share. It has some room for rounding.
    """
    return jnp.maximum(best, LOWEST) + jnp.log((1 - share) * total / size) - 0.01


def any_of(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """`jnp.any`, in operations that all kernels have."""
    return jnp.max(jnp.where(flags, 1.0, 0.0)) > 0


def between(low: Array, high: Array, bits: int) -> list[Array]:
    """Ascending integers that cut a range into `2**bits` about equal parts."""
    if bits == 0:
        return []
    middle = _middle(low, high)
    return [*between(low, middle - 1, bits - 1), middle, *between(middle, high, bits - 1)]


def _middle(low: Int[Array, "..."], high: Int[Array, "..."]) -> Int[Array, "..."]:
    """Their mean, rounded up, without overflow."""
    return (low | high) - lax.shift_right_arithmetic(low ^ high, 1)


def order_of(value: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the floats."""
    return _flip(lax.bitcast_convert_type(value, jnp.int32))


def value_of(order: Int[Array, "..."]) -> Float[Array, "..."]:
    """The float of such an integer."""
    return lax.bitcast_convert_type(_flip(order), jnp.float32)


def _flip(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Float bits to ordered integers, and back."""
    return bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
