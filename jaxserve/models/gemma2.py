"""Gemma 2: four norms per block, scales stored as distance from one, soft caps, every other layer windowed."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import FULL, SLIDING, Attributes, ModelConfig, decoder_fields
from jaxserve.models.decoder import SandwichBlock
from jaxserve.models.family import Family
from jaxserve.models.rope_scaling import read_rope
from jaxserve.models.table import Rule, attention_rules, mlp_rules, norm_rules, outer_rules


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes(hf_config)
    fields = gemma_fields(attributes)
    num_layers = fields["num_layers"]
    alternating = ((SLIDING, FULL) * num_layers)[:num_layers]
    result = ModelConfig(
        **fields,
        rope=read_rope(attributes, fields, max_model_len),
        layer_types=tuple(attributes.get("layer_types", alternating)),
        logit_soft_cap=attributes.number("final_logit_softcapping", 30.0),
        attention_soft_cap=attributes.number("attn_logit_softcapping", 50.0),
    )
    attributes.finish()
    return result


def gemma_fields(attributes: Attributes) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    attributes.expect("use_bidirectional_attention", False)
    attributes.get("hidden_act", None)  # an older name beside hidden_activation, never used
    fields = decoder_fields(attributes)
    bias = attributes.get("attention_bias", False)
    return fields | {
        "tie_word_embeddings": attributes.get("tie_word_embeddings", True),
        "attention_scale": attributes.get("query_pre_attn_scalar", 256) ** -0.5,
        "activation": attributes.get("hidden_activation", "gelu_pytorch_tanh"),
        "window": attributes.get("sliding_window", 4096),
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "output_bias": bias,
    }


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Separate projections, four norms per block."""
    norms = norm_rules(
        {
            "attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    )
    return (*outer_rules(config), *attention_rules(config), *mlp_rules(config), *norms)


FAMILY = Family("gemma2", read_config, rules, SandwichBlock)
