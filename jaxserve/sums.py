"""Sums over the devices that share a copy of the model: each has a part of what a block of a layer gives."""

from dataclasses import dataclass
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.all_reduce import all_reduce
from sharding.collectives import MODEL, shards


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """How the devices add up, and how often they have done so; without mailboxes, as XLA does it.

    Attributes:
        mailboxes: the table of this device, see `pallas_kernels.all_reduce.mailbox`.
        number: of sums so far, the same on all devices.
    """

    mailboxes: Int[Array, "words"] | None = None
    number: Int[Array, "1"] | None = None

    def total(self, x: Float[Array, "T D"], offset: int | Int[Array, ""]) -> Float[Array, "T D"]:
        """The sum of `x` over the devices. `offset` counts the sums of a step from 0, one after the other."""
        if shards() == 1:
            return x
        return all_reduce(x, self.mailboxes, self.number, offset, axis=MODEL)

    def after(self, count: int) -> "Sums":
        """What holds after so many sums."""
        return self if self.number is None else Sums(self.mailboxes, self.number + count)


PLAIN = Sums()
