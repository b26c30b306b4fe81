"""Phi 3 and 4: Llama whose checkpoints hold q, k, v and gate, up fused, with partly rotated heads and LongRoPE."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxserve.layers.rope import Rope
from jaxserve.models.config import FULL, SLIDING, Attributes, ModelConfig, decoder_fields
from jaxserve.models.family import Family
from jaxserve.models.rope_scaling import build_rope
from jaxserve.models.table import Rule, down_rule, fused_gate_up, fused_qkv, norm_rules, outer_rules, output_rule


def read_config(hf_config: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
    """See `Family.config`."""
    attributes = Attributes(hf_config)
    fields = decoder_fields(attributes)
    for name in ("interpolate_factor", "full_attn_mod"):
        attributes.expect(name, 1)
    window = attributes.get("sliding_window", None)
    result = ModelConfig(
        **fields,
        rope=rope(attributes, fields, max_model_len),
        layer_types=(FULL if window is None else SLIDING,) * fields["num_layers"],
        window=window,
        activation=attributes.get("hidden_act", "silu"),
    )
    attributes.finish()
    return result


def rope(attributes: Attributes, fields: Mapping[str, Any], max_model_len: int | None) -> Rope:
    """LongRoPE goes by several names here, and its original length stands beside its settings."""
    settings = dict(attributes.get("rope_scaling", {}) or attributes.get("rope_parameters", {}))
    attributes.get("rope_parameters", None)
    rope_type = settings.pop("type", None)
    rope_type = settings.pop("rope_type", rope_type) or "default"
    original = attributes.get("original_max_position_embeddings", 4096)
    if rope_type in ("su", "yarn", "longrope"):
        settings |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    else:
        settings |= {"rope_type": rope_type}
    return build_rope(
        settings,
        head_dim=fields["head_dim"],
        max_position_embeddings=fields["max_position_embeddings"],
        max_model_len=max_model_len,
        theta=float(attributes.get("rope_theta", 10000.0)),
        partial_rotary_factor=float(attributes.get("partial_rotary_factor", 1.0)),
    )


def split_qkv(config: ModelConfig, sources: list[np.ndarray]) -> np.ndarray:
    """All queries, all keys, all values `[(N + 2 K) * H, D]`, regrouped per KV head."""
    (source,) = sources
    kv_heads = config.num_kv_heads // config.kv_copies
    heads = np.array([config.num_heads, config.num_heads + kv_heads]) * config.head_dim
    return fused_qkv(config, np.split(source, heads))


def split_gate_up(sources: list[np.ndarray]) -> np.ndarray:
    """All of gate, then all of up `[2 F, D]`, interleaved."""
    (source,) = sources
    return fused_gate_up(np.split(source, 2))


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Fused projections in the checkpoint, two norms per block."""
    layer = "model.layers.{i}."
    return (
        *outer_rules(config),
        Rule("layers.{i}.attention.qkv.kernel", (layer + "self_attn.qkv_proj.weight",), partial(split_qkv, config)),
        output_rule(config),
        Rule("layers.{i}.mlp.gate_up.kernel", (layer + "mlp.gate_up_proj.weight",), split_gate_up),
        down_rule(),
        *norm_rules({"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
    )


FAMILY = Family("phi3", read_config, rules)
