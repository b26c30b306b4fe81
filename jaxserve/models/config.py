"""What the shared blocks must know about a model, and how it is read from a Hugging Face config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.layers.mlp import ACTIVATIONS
from jaxserve.layers.rope import Rope

FULL = "full_attention"
SLIDING = "sliding_attention"
VOCAB_TILE = 128  # of a padded vocabulary, each device has a multiple of so many rows, which accelerators like


@dataclass(frozen=True)
class ModelConfig:
    """Facts of an architecture; names follow the Hugging Face config where it has one.

    Attributes:
        layer_types: FULL or SLIDING for each layer; sliding layers attend to the last `window` positions.
        rope: the rotary embedding; `sliding_rope` replaces it in sliding layers where it is given.
        attention_scale: factor of the query-key products.
        attention_soft_cap, logit_soft_cap: `c` in `c * tanh(x / c)`, applied to attention scores and to logits.
        norm_offset: what is added to the stored scales of the norms.
        embedding_scale: factor of the token embeddings, rounded to the model's dtype.
        kv_copies: how many of the `num_kv_heads` are copies of one head of the checkpoint.
        vocab_padding: rows of no token behind those of the vocabulary, so that devices can share all of them evenly.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope: Rope
    attention_scale: float
    norm_eps: float
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool = False
    activation: str = "silu"
    window: int | None = None
    sliding_rope: Rope | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float | None = None
    kv_copies: int = 1
    vocab_padding: int = 0

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the output projection."""
        return self.vocab_size + self.vocab_padding

    def split(self, parts: int) -> "ModelConfig":
        """What `parts` devices that share a copy of the model serve.

        With fewer KV heads than devices each is copied; a vocabulary that they cannot share evenly is padded.

        Raises:
            ValueError: heads or MLP cannot be dealt out evenly.
        """
        if uneven := self._uneven(parts):
            choices = ", ".join(str(n) for n in range(1, self.num_heads + 1) if not self._uneven(n))
            what = " and ".join(uneven)
            raise ValueError(f"tensor_parallel_size={parts} does not deal out {what} evenly; choose one of {choices}")
        config, kv_heads = self, self.num_kv_heads
        if kv_heads < parts:
            config = replace(config, num_kv_heads=parts, kv_copies=parts // kv_heads)
        if self.vocab_size % parts:
            config = replace(config, vocab_padding=-self.vocab_size % (parts * VOCAB_TILE))
        return config

    def _uneven(self, parts: int) -> list[str]:
        """What `parts` devices cannot hold equal parts of."""
        sizes = {"query heads": self.num_heads, "key/value heads": self.num_kv_heads}
        sizes |= {"MLP columns (intermediate_size)": self.intermediate_size}
        copied = parts % self.num_kv_heads == 0
        return [f"{n} {what}" for what, n in sizes.items() if n % parts and not (what == "key/value heads" and copied)]

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_layers}"
            )
        if unknown := set(self.layer_types) - {FULL, SLIDING}:
            raise ValueError(f"layer_types holds {sorted(unknown)}; supported are {FULL!r} and {SLIDING!r}")
        if SLIDING in self.layer_types and (self.window is None or self.window < 1):
            raise ValueError(f"sliding_window is {self.window}, but layer_types has sliding layers; it must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.activation!r} is not supported; supported are {sorted(ACTIVATIONS)}")

    def window_of(self, layer_type: str) -> int | None:
        """Positions a layer of this type attends to, None for all."""
        return self.window if layer_type == SLIDING else None

    def rope_of(self, layer_type: str) -> Rope:
        """Rotary embedding of a layer of this type."""
        return self.sliding_rope if layer_type == SLIDING and self.sliding_rope is not None else self.rope


# Attributes that never change what the model computes at inference: bookkeeping, training, generation defaults.
# fmt: off
HARMLESS: frozenset[str] = frozenset((
    "architectures", "model_type", "model_name", "auto_map", "torch_dtype", "dtype", "transformers_version",
    "name_or_path", "_name_or_path", "_commit_hash", "is_llama_config", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "use_cache",
    "cache_implementation", "pretraining_tp", "chunk_size_feed_forward", "gradient_checkpointing",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "max_new_tokens", "num_beams",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
))
# fmt: on

_REQUIRED = object()


class Attributes:
    """Reads a config attribute by attribute and then insists that nothing which matters is left over."""

    def __init__(self, hf_config: Mapping[str, Any]):
        self._values = hf_config
        self._handled = set(HARMLESS)

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The attribute's value, or `default` where it is absent or None; without a default: ValueError."""
        self._handled.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"the model's config.json has no {name!r}; add it or name a complete checkpoint")
        return default

    def optional(self, name: str, default: Any) -> Any:
        """The attribute's value, an explicit null included, or `default` where it is absent."""
        self._handled.add(name)
        return self._values.get(name, default)

    def number(self, name: str, default: float | None) -> float | None:
        """As `optional`, as a float, since JSON may write 30.0 as 30."""
        value = self.optional(name, default)
        return None if value is None else float(value)

    def expect(self, name: str, supported: Any) -> None:
        """Raise ValueError unless the attribute is absent or has the one value that is supported."""
        if (value := self.get(name, supported)) != supported:
            raise ValueError(f"config.json sets {name}={value!r}, but this architecture supports only {supported!r}")

    def finish(self) -> None:
        """Raise ValueError naming the attributes nobody read, unless they are switched off (None or False)."""
        left = {k: v for k, v in self._values.items() if k not in self._handled and v is not None and v is not False}
        if left:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(left.items()))
            raise ValueError(
                f"config.json has attributes that this architecture does not handle: {listed}; "
                "remove them if they do not change what the model computes"
            )


def decoder_fields(attributes: Attributes) -> dict[str, Any]:
    """The `ModelConfig` fields that nearly every family spells the same way.

    `layer_types`, `rope`, biases and whatever else is special are left to the family.
    """
    hidden_size, num_heads = attributes.get("hidden_size"), attributes.get("num_attention_heads")
    head_dim = attributes.get("head_dim", hidden_size // num_heads)
    return {
        "num_layers": attributes.get("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": attributes.get("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "intermediate_size": attributes.get("intermediate_size"),
        "vocab_size": attributes.get("vocab_size"),
        "max_position_embeddings": attributes.get("max_position_embeddings"),
        "attention_scale": head_dim**-0.5,
        "norm_eps": float(attributes.get("rms_norm_eps")),
        "tie_word_embeddings": attributes.get("tie_word_embeddings", False),
    }
