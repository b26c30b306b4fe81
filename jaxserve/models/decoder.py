"""The decoder that every family shares, and the two arrangements of norms found in its blocks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.kv_cache import Chunks, Index, KVCache
from jaxserve.layers.attention import Attention
from jaxserve.layers.embedding import Embedding
from jaxserve.layers.linear import Linear, contract
from jaxserve.layers.mlp import ACTIVATIONS, GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rope import Tables
from jaxserve.models.config import ModelConfig
from jaxserve.sums import PLAIN, Sums
from pallas_kernels.block_tail import block_tail
from pallas_kernels.norm_matmul import norm_matmul
from sharding.collectives import shard, shards

Step = tuple[Float[Array, "T D"], KVCache]


def make_norm(config: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
    """A norm over the model width."""
    return RMSNorm(config.hidden_size, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)


def make_attention(config: ModelConfig, layer_type: str, dtype: jnp.dtype, rngs: nnx.Rngs) -> Attention:
    """The attention of a layer of this type."""

    def head_norm() -> RMSNorm | None:
        if not config.qk_norm:
            return None
        return RMSNorm(config.head_dim, axis="H", eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)

    return Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        scale=config.attention_scale,
        window=config.window_of(layer_type),
        soft_cap=config.attention_soft_cap,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        q_norm=head_norm(),
        k_norm=head_norm(),
        dtype=dtype,
        rngs=rngs,
    )


def make_mlp(config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> GatedMLP:
    """The feed-forward block."""
    width, inner = config.hidden_size, config.intermediate_size
    return GatedMLP(width, inner, config.activation, bias=config.mlp_bias, dtype=dtype, rngs=rngs)


class PreNormBlock(nnx.Module):
    """Norms before attention and MLP (Llama and most others)."""

    def __init__(self, config: ModelConfig, layer_type: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config, dtype)
        self.attention = make_attention(config, layer_type, dtype, rngs)
        self.mlp_norm = make_norm(config, dtype)
        self.mlp = make_mlp(config, dtype, rngs)

    def __call__(
        self, x: Float[Array, "T D"], rope: Tables, chunks: Chunks, cache: KVCache, layer: Index, sums: Sums
    ) -> Step:
        attention, mlp = self.attention, self.mlp
        if shards() == 1 and attention.qkv.bias is attention.out.bias is mlp.gate_up.bias is None:
            return self._merged(x, rope, chunks, cache, layer)
        attended, cache = attention(self.attention_norm(x), rope, chunks, cache, layer)
        x = x + sums.total(attended, 1 + 2 * layer)
        return x + sums.total(mlp(self.mlp_norm(x)), 2 + 2 * layer), cache

    def _merged(self, x: Float[Array, "T D"], rope: Tables, chunks: Chunks, cache: KVCache, layer: Index) -> Step:
        """Without biases, and where nothing is to be added up over devices, norms and products can be one kernel."""
        attention, mlp, norm = self.attention, self.mlp, self.attention_norm
        with jax.named_scope("attention"):
            weights = norm.scale[...], attention.qkv.kernel[...]
            qkv = norm_matmul(x, *weights, contract, norm_eps=norm.eps, norm_offset=norm.offset)
            heads, cache = attention.heads(qkv, rope, chunks, cache, layer)
        norm = self.mlp_norm
        with jax.named_scope("mlp"):
            projection = attention.out.kernel[...].reshape(x.shape[1], -1)
            weights = projection, norm.scale[...], mlp.gate_up.kernel[...], mlp.down.kernel[...]
            operands = x, heads.reshape(len(x), -1), *weights, ACTIVATIONS[mlp.activation], contract
            return block_tail(*operands, norm_eps=norm.eps, norm_offset=norm.offset), cache


class SandwichBlock(nnx.Module):
    """Norms before and after attention and MLP (Gemma 2 and 3)."""

    def __init__(self, config: ModelConfig, layer_type: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config, dtype)
        self.attention = make_attention(config, layer_type, dtype, rngs)
        self.post_attention_norm = make_norm(config, dtype)
        self.mlp_norm = make_norm(config, dtype)
        self.mlp = make_mlp(config, dtype, rngs)
        self.post_mlp_norm = make_norm(config, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rope: Tables, chunks: Chunks, cache: KVCache, layer: Index, sums: Sums
    ) -> Step:
        attended, cache = self.attention(self.attention_norm(x), rope, chunks, cache, layer)
        x = x + self.post_attention_norm(sums.total(attended, 1 + 2 * layer))
        return x + self.post_mlp_norm(sums.total(self.mlp(self.mlp_norm(x)), 2 + 2 * layer)), cache


@jax.jit
def run_block(
    block: PreNormBlock | SandwichBlock,
    x: Float[Array, "T D"],
    rope: Tables,
    chunks: Chunks,
    cache: KVCache,
    layer: Index,
    sums: Sums,
) -> Step:
    """One layer. Under `jit` all layers of one kind are traced and lowered once; XLA then inlines each call.

    That makes the Python side of a program of 36 layers ten times shorter (0.3 s instead of 3 s), which matters since
    the threads that compile an engine's programs share one interpreter.
    """
    return block(x, rope, chunks, cache, layer, sums)


class CausalLM(nnx.Module):
    """Embedding, a stack of blocks of one class, final norm and output projection.

    Layers stay a Python list: the cache array is donated and written in place, which a scan over layers would break.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: type[PreNormBlock] | type[SandwichBlock],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embedding = Embedding(config.vocab_rows, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([block(config, kind, dtype=dtype, rngs=rngs) for kind in config.layer_types])
        self.norm = make_norm(config, dtype)
        width, vocabulary = (("D", config.hidden_size),), (("V", config.vocab_rows),)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(width, vocabulary, dtype=dtype, rngs=rngs)

    @property
    def num_sums(self) -> int:
        """Sums over the devices in a step: the embedding, and two a layer."""
        return 1 + 2 * len(self.layers)

    def __call__(self, token_ids: Int[Array, "T"], chunks: Chunks, cache: KVCache, sums: Sums = PLAIN) -> Step:
        """Hidden states after the final norm, `[T, D]` in the model's dtype, and the cache with the new tokens."""
        config = self.config
        with jax.named_scope("embedding"):
            x = sums.total(self.embedding(token_ids), 0)
            if config.embedding_scale is not None:
                x = x * jnp.asarray(config.embedding_scale, x.dtype)
        with jax.named_scope("rope"):
            tables = {rope: rope.tables(chunks.positions) for rope in {config.rope_of(t) for t in config.layer_types}}
        for i, (layer, layer_type) in enumerate(zip(self.layers, config.layer_types, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                rope = tables[config.rope_of(layer_type)]
                x, cache = run_block(layer, x, rope, chunks, cache, jnp.int32(i), sums)
        with jax.named_scope("final_norm"):
            return self.norm(x), cache

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Float32 logits of normed hidden states, soft cap included; -inf where a row stands for no token."""
        with jax.named_scope("logits"):
            if self.lm_head is None:
                logits = self.embedding.logits(hidden)
            else:
                logits = self.lm_head(hidden, jnp.dtype(jnp.float32))
            cap = self.config.logit_soft_cap
            logits = logits if cap is None else cap * jnp.tanh(logits / cap)
            if not self.config.vocab_padding:
                return logits
            tokens = shard() * logits.shape[1] + jnp.arange(logits.shape[1])
            return jnp.where(tokens < self.config.vocab_size, logits, -jnp.inf)
