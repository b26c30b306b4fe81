"""Configs as published on the hub: they are understood, and give the published number of parameters."""

import math

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxserve import models
from jaxserve.models.config import SLIDING

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
}


def hub_config(architecture: str, sizes: tuple[int, ...], **values: object) -> dict:
    """`sizes`: vocabulary, width, MLP width, layers, heads, KV heads, trained length."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    return COMMON | {"architectures": [architecture]} | dict(zip(names, sizes, strict=True)) | values


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LONGROPE = {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}

# name -> config, number of parameters, sliding layers
HUB = {
    "SmolLM2-135M": (
        hub_config(
            "LlamaForCausalLM", (49152, 576, 1536, 30, 9, 3, 8192),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None, rope_interleaved=False,
            is_llama_config=True, pretraining_tp=1, attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
            **{"transformers.js_config": {"dtype": "q4"}},
        ),
        134_515_008, 0,
    ),
    "Llama-3.2-1B": (
        hub_config(
            "LlamaForCausalLM", (128256, 2048, 8192, 16, 32, 8, 131072),
            head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, attention_bias=False,
            rope_scaling=LLAMA3 | {"rope_type": "llama3"}, pretraining_tp=1, mlp_bias=False, tie_word_embeddings=True,
        ),
        1_235_814_400, 0,
    ),
    "Mistral-7B-v0.1": (
        hub_config(
            "MistralForCausalLM", (32000, 4096, 14336, 32, 32, 8, 32768),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
        ),
        7_241_732_096, 32,
    ),
    "Mistral-7B-v0.3": (
        hub_config(
            "MistralForCausalLM", (32768, 4096, 14336, 32, 32, 8, 32768),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, tie_word_embeddings=False,
        ),
        7_248_023_552, 0,
    ),
    "Qwen2.5-0.5B": (
        hub_config(
            "Qwen2ForCausalLM", (151936, 896, 4864, 24, 14, 2, 32768),
            hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, max_window_layers=24, sliding_window=32768,
            use_mrope=False, use_sliding_window=False, tie_word_embeddings=True,
        ),
        494_032_768, 0,
    ),
    "Qwen3-0.6B": (
        hub_config(
            "Qwen3ForCausalLM", (151936, 1024, 3072, 28, 16, 8, 40960),
            head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
            attention_bias=False, max_window_layers=28, sliding_window=None, use_sliding_window=False,
            tie_word_embeddings=True,
        ),
        596_049_920, 0,
    ),
    "gemma-2-2b": (
        hub_config(
            "Gemma2ForCausalLM", (256000, 2304, 9216, 26, 8, 4, 8192),
            head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
            rope_theta=10000.0, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256,
            sliding_window=4096, attention_bias=False, cache_implementation="hybrid",
        ),
        2_614_341_888, 13,
    ),
    "gemma-3-1b": (
        hub_config(
            "Gemma3ForCausalLM", (262144, 1152, 6912, 26, 4, 1, 32768),
            head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, rope_theta=1000000,
            rope_local_base_freq=10000, rope_scaling=None, attn_logit_softcapping=None, final_logit_softcapping=None,
            query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6, attention_bias=False,
            cache_implementation="hybrid",
        ),
        999_885_952, 22,
    ),
    "Phi-3-mini-4k": (
        hub_config(
            "Phi3ForCausalLM", (32064, 3072, 8192, 32, 32, 32, 4096),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, sliding_window=2047,
            original_max_position_embeddings=4096, attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0,
            tie_word_embeddings=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        ),
        3_821_079_552, 32,
    ),
    "Phi-4-mini": (
        hub_config(
            "Phi3ForCausalLM", (200064, 3072, 8192, 32, 24, 8, 131072),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=LONGROPE, sliding_window=262144,
            original_max_position_embeddings=4096, attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0,
            full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, partial_rotary_factor=0.75,
            tie_word_embeddings=True,
        ),
        3_836_021_760, 32,
    ),
    "phi-4": (
        hub_config(
            "Phi3ForCausalLM", (100352, 5120, 17920, 40, 40, 10, 16384),
            hidden_act="silu", rms_norm_eps=1e-5, rope_theta=250000, rope_scaling=None, sliding_window=None,
            original_max_position_embeddings=16384, attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0,
            tie_word_embeddings=False,
        ),
        14_659_507_200, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_config_gives_the_published_size(name: str) -> None:
    hf_config, num_parameters, num_sliding = HUB[name]
    family = models.resolve(hf_config)
    config = family.config(hf_config)
    _, state = models.abstract(family, config, jnp.dtype(jnp.bfloat16))
    assert sum(math.prod(parameter.shape) for _, parameter in nnx.to_flat_state(state)) == num_parameters
    assert config.layer_types.count(SLIDING) == num_sliding
