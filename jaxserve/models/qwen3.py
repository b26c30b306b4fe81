"""Qwen 3 (dense): Llama with normed query and key heads."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import Attributes, ModelConfig, decoder_fields
from jaxserve.models.family import Family
from jaxserve.models.qwen2 import window_fields
from jaxserve.models.rope_scaling import read_rope


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes({"head_dim": 128, **hf_config})
    fields = decoder_fields(attributes)
    bias = attributes.get("attention_bias", False)
    result = ModelConfig(
        **fields,
        **window_fields(attributes, fields["num_layers"]),
        rope=read_rope(attributes, fields, max_model_len),
        activation=attributes.get("hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    attributes.finish()
    return result


FAMILY = Family("qwen3", read_config, llama.rules)
