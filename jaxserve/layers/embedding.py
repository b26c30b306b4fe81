"""Token embedding, which is the output projection as well where weights are tied."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.layers.linear import contract, normal


class Embedding(nnx.Module):
    """A table `[V, D]`."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (vocab_size, hidden_size), hidden_size**-0.5, dtype), axes=("V", "D"))

    def __call__(self, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
        # Ids are checked on the host; clipping only spares XLA the fill value of out-of-range rows.
        return jnp.take(self.table[...], token_ids, axis=0, mode="clip")

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Products with every row of the table, in float32."""
        return contract(hidden, self.table[...], jnp.dtype(jnp.float32))
