"""Llama 2, 3.x and models of the same shape, such as SmolLM2: the plain decoder, with optional biases."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import FULL, Attributes, ModelConfig, decoder_fields
from jaxserve.models.family import Family
from jaxserve.models.rope_scaling import read_rope
from jaxserve.models.table import Rule, attention_rules, mlp_rules, norm_rules, outer_rules


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes(hf_config)
    fields = decoder_fields(attributes)
    bias = attributes.get("attention_bias", False)
    result = ModelConfig(
        **fields,
        rope=read_rope(attributes, fields, max_model_len),
        layer_types=(FULL,) * fields["num_layers"],
        activation=attributes.get("hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=attributes.get("mlp_bias", False),
    )
    attributes.finish()
    return result


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Separate projections, two norms per block."""
    norms = norm_rules({"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"})
    return (*outer_rules(config), *attention_rules(config), *mlp_rules(config), *norms)


FAMILY = Family("llama", read_config, rules)
