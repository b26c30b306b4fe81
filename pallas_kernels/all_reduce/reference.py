"""The all-reduce as XLA does it."""

from jax import lax
from jaxtyping import Array, Float, Int


def all_reduce(
    x: Float[Array, "T D"],
    mailboxes: Int[Array, "words"] | None,
    number: Int[Array, "1"] | None,
    offset: int | Int[Array, ""],
    *,
    axis: str,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.all_reduce.all_reduce`."""
    del mailboxes, number, offset  # it needs none
    return lax.psum(x, axis)
