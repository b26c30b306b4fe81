"""What a model family is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import CausalLM, PreNormBlock, SandwichBlock
from jaxserve.models.table import Rule


@dataclass(frozen=True)
class Family:
    """One row: how a family's config is read, which block it stacks, and how its checkpoints map to parameters.

    Attributes:
        ignored: fnmatch patterns of checkpoint tensors that carry nothing of their own.
    """

    name: str
    read_config: Callable[[Mapping[str, Any], int | None], ModelConfig]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    block: type[PreNormBlock] | type[SandwichBlock] = PreNormBlock
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def config(self, hf_config: Mapping[str, Any], max_model_len: int | None = None) -> ModelConfig:
        """The architecture facts of a Hugging Face config.

        `max_model_len` is the longest sequence that will be served, in tokens, by default the model's own limit; it
        decides between rotary settings that depend on length.

        Raises:
            ValueError: naming an attribute that is missing, or that is neither handled nor switched off.
        """
        return self.read_config(hf_config, max_model_len)

    def build(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalLM:
        """The model with random weights; under `nnx.eval_shape` only its shapes."""
        return CausalLM(config, self.block, dtype=dtype, rngs=rngs)

    def ignores(self, config: ModelConfig) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold beyond those the rules name."""
        return (*self.ignored, "lm_head.weight") if config.tie_word_embeddings else self.ignored
