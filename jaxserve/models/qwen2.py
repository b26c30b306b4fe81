"""Qwen 2 and 2.5: Llama with biased q, k and v, and sliding windows in the upper layers if switched on."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import FULL, SLIDING, Attributes, ModelConfig, decoder_fields
from jaxserve.models.family import Family
from jaxserve.models.rope_scaling import read_rope


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes(hf_config)
    fields = decoder_fields(attributes)
    result = ModelConfig(
        **fields,
        **window_fields(attributes, fields["num_layers"]),
        rope=read_rope(attributes, fields, max_model_len),
        activation=attributes.get("hidden_act", "silu"),
        qkv_bias=True,
    )
    attributes.finish()
    return result


def window_fields(attributes: Attributes, num_layers: int) -> dict[str, Any]:
    """`layer_types` and `window`: full attention below `max_window_layers`, windows from there on, if switched on.

    An explicit `layer_types` wins; switched off, a window is none even if the config has a number for it.
    """
    window = attributes.optional("sliding_window", 4096)
    used = attributes.get("use_sliding_window", False) and window is not None
    lower = min(attributes.get("max_window_layers", 28), num_layers)
    full = lower if used else num_layers
    kinds = attributes.get("layer_types", (FULL,) * full + (SLIDING,) * (num_layers - full))
    return {"layer_types": tuple(kinds), "window": window if used else None}


FAMILY = Family("qwen2", read_config, llama.rules)
