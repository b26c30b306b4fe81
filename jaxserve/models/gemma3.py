"""Gemma 3 (text): Gemma 2 with normed query and key heads, and rotary embeddings of their own in windowed layers."""

from collections.abc import Mapping
from typing import Any

from jaxserve.layers.rope import Rope
from jaxserve.models import gemma2
from jaxserve.models.config import FULL, SLIDING, Attributes, ModelConfig
from jaxserve.models.decoder import SandwichBlock
from jaxserve.models.family import Family
from jaxserve.models.rope_scaling import build_rope


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes(hf_config)
    attributes.expect("attn_logit_softcapping", None)
    fields = gemma2.gemma_fields(attributes)
    num_layers = fields["num_layers"]
    period = attributes.get("sliding_window_pattern", attributes.get("_sliding_window_pattern", 6))
    pattern = (((SLIDING,) * (period - 1) + (FULL,)) * num_layers)[:num_layers]
    full, sliding = ropes(attributes, fields, max_model_len)
    result = ModelConfig(
        **fields,
        rope=full,
        sliding_rope=sliding,
        layer_types=tuple(attributes.get("layer_types", pattern)),
        qk_norm=True,
        logit_soft_cap=attributes.number("final_logit_softcapping", None),
    )
    attributes.finish()
    return result


def ropes(attributes: Attributes, fields: Mapping[str, Any], max_model_len: int | None) -> tuple[Rope, Rope]:
    """Those of full and of windowed layers, from one dictionary per layer type or from the older flat spelling."""
    parameters = attributes.get("rope_parameters", {})
    scaling = attributes.get("rope_scaling", {})
    thetas = {
        FULL: attributes.get("rope_theta", 1_000_000.0),
        SLIDING: attributes.get("rope_local_base_freq", 10_000.0),
    }
    if unknown := set(parameters) - set(thetas):
        raise ValueError(f"rope_parameters has {sorted(unknown)}; Gemma 3 has settings for {sorted(thetas)} only")

    def rope(layer_type: str, override: Mapping[str, Any]) -> Rope:
        return build_rope(
            {**(parameters.get(layer_type) or {}), **override},
            head_dim=fields["head_dim"],
            max_position_embeddings=fields["max_position_embeddings"],
            max_model_len=max_model_len,
            theta=float(thetas[layer_type]),
        )

    return rope(FULL, scaling), rope(SLIDING, {})


FAMILY = Family("gemma3", read_config, gemma2.rules, SandwichBlock)
