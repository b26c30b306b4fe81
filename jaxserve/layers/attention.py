"""Grouped-query self-attention over the paged cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.kv_cache import Chunks, Index, KVCache
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rope import Tables


class Attention(nnx.Module):
    """Query, key and value in one projection `[K, G + 2, H]`: the `G` query heads of a KV head, its key, its value.

    So the fused axis can be split over KV heads without moving anything. `q_norm` and `k_norm`, given together or not
    at all and alike but for their scales, act on each head before the rotation. `window` counts the positions a token
    sees, its own included.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        width = (("D", hidden_size),)
        fused = (("K", num_kv_heads), ("G", num_heads // num_kv_heads + 2), ("H", head_dim))
        self.qkv = Linear(width, fused, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear((("N", num_heads), ("H", head_dim)), width, bias=output_bias, dtype=dtype, rngs=rngs)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.scale = scale
        self.window = window
        self.soft_cap = soft_cap

    def __call__(
        self, x: Float[Array, "T D"], rope: Tables, chunks: Chunks, cache: KVCache, layer: Index
    ) -> tuple[Float[Array, "T D"], KVCache]:
        with jax.named_scope("attention"):
            heads, cache = self.heads(self.qkv(x), rope, chunks, cache, layer)
            return self.out(heads), cache

    def heads(
        self, qkv: Float[Array, "T K heads H"], rope: Tables, chunks: Chunks, cache: KVCache, layer: Index
    ) -> tuple[Float[Array, "T N H"], KVCache]:
        """What lies between both projections."""
        q, cache = cache.write(layer, qkv, rope, chunks, **self._head_norms())
        return cache.attend(layer, q, chunks, scale=self.scale, window=self.window, soft_cap=self.soft_cap), cache

    def _head_norms(self) -> dict[str, Any]:
        """The norms of queries and keys as `KVCache.write` takes them."""
        if self.q_norm is None or self.k_norm is None:
            return {}
        norm = self.q_norm
        scales = {"q_scale": norm.scale[...], "k_scale": self.k_norm.scale[...]}
        return scales | {"norm_eps": norm.eps, "norm_offset": norm.offset}
