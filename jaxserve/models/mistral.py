"""Mistral: Llama whose layers all attend to a sliding window, where the config has one."""

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
    window = attributes.optional("sliding_window", 4096)
    result = ModelConfig(
        **fields,
        rope=read_rope(attributes, fields, max_model_len),
        layer_types=(FULL if window is None else SLIDING,) * fields["num_layers"],
        window=window,
        activation=attributes.get("hidden_act", "silu"),
    )
    attributes.finish()
    return result


FAMILY = Family("mistral", read_config, llama.rules)
