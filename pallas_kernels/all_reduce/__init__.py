"""Add up an array over the devices that share a copy of the model."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.all_reduce import reference
from pallas_kernels.dispatch import Op, only_on

OP = Op(
    "all_reduce",
    {"mosaic_gpu": only_on("gpu", "pallas_kernels.all_reduce.mosaic_gpu", "all_reduce"), "xla": reference.all_reduce},
)


def all_reduce(
    x: Float[Array, "T D"],
    mailboxes: Int[Array, "words"] | None,
    number: Int[Array, "1"] | None,
    offset: int | Int[Array, ""],
    *,
    axis: str,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """The sum of `x` over the devices of a mesh axis, inside a `shard_map` over it.

    `mailboxes` is this device's table (`pallas_kernels.all_reduce.mailbox`) of memory that the devices have given one
    another, None where there is none. Sums through mailboxes are counted: this is number `number + offset` on all
    devices, one more than the sum before it.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: the named implementation does not serve this platform, shape or dtype.
    """
    with jax.named_scope("all_reduce"):
        return OP(implementation, x, mailboxes, number, offset, axis=axis)
