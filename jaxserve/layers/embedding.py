"""Token embedding, which is the output projection as well where weights are tied."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.layers.linear import contract, normal
from sharding.collectives import shard, shards


class Embedding(nnx.Module):
    """A table `[V, D]`. Where the vocabulary is split, a device has the rows and logits of its part, else zeros."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (vocab_size, hidden_size), hidden_size**-0.5, dtype), axes=("V", "D"))

    def __call__(self, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
        # Ids are checked on the host; clipping only spares XLA the fill value of out-of-range rows.
        table = self.table[...]
        if shards() == 1:
            return jnp.take(table, token_ids, axis=0, mode="clip")
        local = token_ids - shard() * len(table)
        mine = (local >= 0) & (local < len(table))
        return jnp.where(mine[:, None], jnp.take(table, local, axis=0, mode="clip"), 0)

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Products with every row of the table, in float32."""
        return contract(hidden, self.table[...], jnp.dtype(jnp.float32))
