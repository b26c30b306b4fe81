"""Make the reference logits of tests/models/goldens with Hugging Face transformers on tiny random models.

Run with an interpreter that has torch and transformers: `python scripts/make_goldens.py [CASE ...]`.
The weights are integers in [-127, 127] times a power of two, so that a file stores them in one byte each and every
dtype of the engine holds them exactly.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent.parent / "tests" / "models" / "goldens"
NUM_TOKENS = 24

BASE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {name: value for name, value in BASE.items() if name != "hidden_act"} | {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "tie_word_embeddings": True,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 2.5, 5.0],
}

# name -> model type, architecture, config in the spelling that checkpoints on the hub use
CASES = {
    "llama": ("llama", "LlamaForCausalLM", BASE),
    "llama_llama3": (
        "llama",
        "LlamaForCausalLM",
        BASE
        | {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_linear_biased": (
        "llama",
        "LlamaForCausalLM",
        BASE
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
    "llama_dynamic": ("llama", "LlamaForCausalLM", BASE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", "MistralForCausalLM", BASE | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", BASE | {"tie_word_embeddings": True, "rope_theta": 1000.0}),
    "qwen2_window": (
        "qwen2",
        "Qwen2ForCausalLM",
        BASE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", BASE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_yarn": (
        "qwen3",
        "Qwen3ForCausalLM",
        BASE
        | {
            "head_dim": 16,
            "rope_theta": 100.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA | {"final_logit_softcapping": 60.0, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "sliding_window_pattern": 3,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", BASE | {"sliding_window": 9, "original_max_position_embeddings": 64}),
    "phi3_longrope_short": (
        "phi3",
        "Phi3ForCausalLM",
        BASE | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "rope_scaling": LONGROPE},
    ),
    "phi3_longrope_long": (
        "phi3",
        "Phi3ForCausalLM",
        BASE
        | {
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_scaling": LONGROPE,
        },
    ),
}


def integer_weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Integers and the exponent of their factor: norms near their neutral value, the rest with gain about one."""
    if "norm" in name or name.endswith("bias"):
        return np.round(random.uniform(16, 48, shape)).astype(np.int8), -5
    spread = 1.0 if "embed" in name else 1.5 * shape[-1] ** -0.5
    exponent = int(np.ceil(np.log2(4 * spread / 127)))
    return np.clip(np.round(random.normal(0, spread / 2.0**exponent, shape)), -127, 127).astype(np.int8), exponent


def make(name: str) -> dict[str, np.ndarray]:
    """One case: both spellings of its config, token ids `[T]`, logits `[T, V]`, and the weights."""
    model_type, architecture, values = CASES[name]
    random = np.random.default_rng(sorted(CASES).index(name))
    values = json.loads(json.dumps(values))
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(values)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    case: dict[str, np.ndarray] = {}
    for key, parameter in model.named_parameters():
        integers, exponent = integer_weights(key, tuple(parameter.shape), random)
        parameter.data = torch.from_numpy(integers.astype(np.float32) * 2.0**exponent)
        case[f"weight:{key}"], case[f"exponent:{key}"] = integers, np.int8(exponent)
    model.tie_weights()
    ids = random.integers(3, values["vocab_size"], NUM_TOKENS)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0]
    model.config.architectures = [architecture]
    case["config"] = np.array(json.dumps(values | {"architectures": [architecture], "model_type": model_type}))
    case["saved_config"] = np.array(model.config.to_json_string())
    case["token_ids"], case["logits"] = ids.astype(np.int32), logits.numpy().astype(np.float32)
    return case


def main() -> None:
    """Write the named cases, all by default."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        case = make(name)
        np.savez_compressed(FOLDER / f"{name}.npz", **case)
        logits = case["logits"]
        print(f"{name}: |logits| up to {np.abs(logits).max():.2f}, {(FOLDER / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
