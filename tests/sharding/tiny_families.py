"""A tiny checkpoint of every model family, with head counts that eight devices can share."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxserve import models
from jaxserve.models.config import ModelConfig
from jaxserve.models.table import expand

HEADS, HEAD, WIDTH, INNER, VOCAB = 8, 8, 32, 48, 64
BASE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "eos_token_id": VOCAB - 1,
}
GEMMA = {"tie_word_embeddings": True, "sliding_window": 4, "query_pre_attn_scalar": HEAD}
BIASES = {"attention_bias": True, "mlp_bias": True}
# family -> what its config.json says beyond the above; between them every number of KV heads from one to all
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, **BIASES},
    "mistral": {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 4, "sliding_window": 4},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8, "attention_bias": True},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 2},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "num_key_value_heads": 4, **GEMMA},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        **GEMMA,
    },
}


def tensor_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Of a checkpoint's tensor, by its Hugging Face name."""
    module, kind = name.split(".")[-2:]
    q, kv, vocab = HEADS * HEAD, config.num_kv_heads * HEAD, config.vocab_size
    outputs = {
        "q_proj": q, "k_proj": kv, "v_proj": kv, "qkv_proj": q + 2 * kv, "o_proj": WIDTH, "gate_proj": INNER,
        "up_proj": INNER, "gate_up_proj": 2 * INNER, "down_proj": WIDTH, "embed_tokens": vocab, "lm_head": vocab,
    }  # fmt: skip
    if module not in outputs:
        return (HEAD,) if module in ("q_norm", "k_norm") else (WIDTH,)
    inputs = {"o_proj": q, "down_proj": INNER}.get(module, WIDTH)
    return (outputs[module],) if kind == "bias" else (outputs[module], inputs)


def write_family(folder: Path, name: str, **changes: object) -> Path:
    """A Hugging Face folder of random float32 weights; `changes` (but of widths and heads) replace config values."""
    hf_config = BASE | FAMILIES[name] | changes
    family = models.resolve(hf_config)
    config = family.config(hf_config)
    rng = np.random.default_rng(1)
    tensors = {}
    for rule in expand(family.rules(config), config.num_layers):
        for source in rule.sources:
            shape = tensor_shape(source, config)
            scale = shape[1] ** -0.5 if len(shape) > 1 else 0.3
            offset = 1.0 - config.norm_offset if "norm" in source else 0.0
            tensors[source] = (offset + scale * rng.standard_normal(shape)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, folder / "model.safetensors")
    return folder
