"""Model families: resolve a Hugging Face config to the family that computes it."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family

# architecture -> module of its family
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "Gemma2ForCausalLM": "gemma2",
        "Gemma3ForCausalLM": "gemma3",
        "Phi3ForCausalLM": "phi3",
    }
)


def resolve(hf_config: Mapping[str, Any]) -> Family:
    """The family of `hf_config["architectures"][0]`.

    Raises:
        ValueError: for an unknown or missing architecture, listing the supported ones.
    """
    name = next(iter(hf_config.get("architectures") or ()), "")
    if name not in FAMILIES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return import_module(f"jaxserve.models.{FAMILIES[name]}").FAMILY


def abstract(family: Family, config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, Mapping[Any, Any]]:
    """The graph definition and the `nnx.State` of the model, parameters as shapes, none of them allocated."""
    return nnx.split(nnx.eval_shape(lambda: family.build(config, dtype=dtype, rngs=nnx.Rngs(0))))
