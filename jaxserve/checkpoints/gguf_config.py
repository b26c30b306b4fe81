"""A Hugging Face style model config made from a GGUF file's metadata."""

import math
from typing import Any

import numpy as np

from jaxserve.checkpoints.base import CheckpointError
from jaxserve.checkpoints.gguf import read_architecture
from jaxserve.checkpoints.gguf_file import GGUFFile

CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention scale is not 1/sqrt(H)
SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip


def read_gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """The config.json that the model would have on the Hugging Face hub.

    `vocab_size` is the number of embedding rows (llama.cpp drops padding rows, so the metadata may say more), and
    `dtype` is bfloat16, the precision that quantised models were trained in.

    Raises:
        CheckpointError: an unsupported architecture or rope scaling, or a key that is missing.
    """
    reader = _Reader(gguf)
    config = _common(reader)
    if reader.architecture.startswith("gemma"):
        config |= _gemma(reader, config)
    elif reader.architecture == "llama" and reader.get("attention.sliding_window"):
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": reader.get("attention.sliding_window"),
        }
    elif reader.architecture == "phi3":
        config["sliding_window"] = reader.get("attention.sliding_window")
    return config | _rope(reader, config)


def read_gguf_generation_config(gguf: GGUFFile) -> dict[str, Any]:
    """End-of-sequence ids (end of turn included) and the sampling defaults that the file carries."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = dict.fromkeys(gguf.metadata[key] for key in keys if key in gguf.metadata)
    config: dict[str, Any] = {"eos_token_id": list(ends)} if ends else {}
    if "tokenizer.ggml.bos_token_id" in gguf.metadata:
        config["bos_token_id"] = gguf.metadata["tokenizer.ggml.bos_token_id"]
    for key, name in SAMPLING.items():
        if f"general.sampling.{key}" in gguf.metadata:
            config[name] = gguf.metadata[f"general.sampling.{key}"]
    return config


class _Reader:
    """Looks keys up under the file's architecture."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.architecture = read_architecture(gguf)

    def get(self, key: str, default: Any = None) -> Any:
        return self.gguf.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.gguf.path}: the metadata key {self.architecture}.{key} is {value!r}, but a number is needed; "
                "convert the model again with a current llama.cpp"
            )
        return value

    def token(self, name: str) -> int | None:
        return self.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")


def _common(reader: _Reader) -> dict[str, Any]:
    """What every supported family has."""
    tensors = reader.gguf.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{reader.gguf.path} has no tensor token_embd.weight; it does not hold a whole model")
    class_name, model_type = CLASSES[reader.architecture]
    heads, width = reader.need("attention.head_count"), reader.need("embedding_length")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": reader.need("feed_forward_length"),
        "num_hidden_layers": reader.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.get("attention.head_count_kv", heads),
        "head_dim": reader.get("attention.key_length", width // heads),
        "max_position_embeddings": reader.need("context_length"),
        "rms_norm_eps": _round(reader.need("attention.layer_norm_rms_epsilon")),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "bos_token_id": reader.token("bos"),
        "eos_token_id": reader.token("eos"),
        "pad_token_id": reader.token("padding"),
        "dtype": "bfloat16",
    }
    if reader.architecture == "llama" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    return config


def _gemma(reader: _Reader, config: dict[str, Any]) -> dict[str, Any]:
    """Soft caps, alternating windows and the attention scale, which llama.cpp derives rather than stores."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    largest = layers == LARGEST_GEMMA[reader.architecture]
    pattern = 2 if reader.architecture == "gemma2" else 6
    extra = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if largest else config["head_dim"],
        "sliding_window": reader.need("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
    }
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        extra[cap] = _round(reader.get(cap)) if reader.get(cap) is not None else None
    if reader.architecture == "gemma3":
        extra["rope_local_base_freq"] = _round(reader.get("rope.freq_base_swa", 10000.0))
    return extra


def _rope(reader: _Reader, config: dict[str, Any]) -> dict[str, Any]:
    """Base, partial rotation and scaling."""
    default = 1_000_000.0 if reader.architecture == "gemma3" else 10_000.0
    theta = _round(reader.get("rope.freq_base", default))
    rotated = reader.get("rope.dimension_count", config["head_dim"])
    rope: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if rotated != config["head_dim"]:
        rope["partial_rotary_factor"] = rotated / config["head_dim"]
    kind = reader.get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in reader.gguf.tensors:
        original = reader.need("rope.scaling.original_context_length")
        rope |= {"rope_scaling": _long_rope(reader), "original_max_position_embeddings": original}
    elif "rope_freqs.weight" in reader.gguf.tensors:
        rope["rope_scaling"] = _llama3_rope(reader, theta, rotated)
    elif kind == "linear":
        rope["rope_scaling"] = {"rope_type": "linear", "factor": _round(reader.need("rope.scaling.factor"))}
    elif kind == "yarn":
        rope["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": _round(reader.need("rope.scaling.factor")),
            "original_max_position_embeddings": reader.need("rope.scaling.original_context_length"),
        }
    elif kind != "none":
        raise CheckpointError(f"{reader.gguf.path}: rope scaling {kind!r} is not supported (none, linear, yarn are)")
    return rope


def _long_rope(reader: _Reader) -> dict[str, Any]:
    """Phi's two lists of factors, which llama.cpp stores as tensors."""
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for kind in ("short", "long"):
        scaling[f"{kind}_factor"] = [_round(x) for x in reader.gguf.read(f"rope_factors_{kind}.weight").tolist()]
    return scaling


def _llama3_rope(reader: _Reader, theta: float, rotated: int) -> dict[str, Any]:
    """Llama 3.1's scaling; llama.cpp stores only the resulting factor per frequency, so the formula is checked."""
    factors = reader.gguf.read("rope_freqs.weight").astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": _round(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(scaling, theta, rotated)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{reader.gguf.path}: rope_freqs.weight {list(factors.shape)} is not Llama 3's scaling with factor "
            f"{scaling['factor']} over a context of 8192; use the model's safetensors instead"
        )
    return scaling


def llama3_factors(scaling: dict[str, Any], theta: float, rotated: int) -> np.ndarray:
    """What each of the `rotated / 2` rotary wavelengths is multiplied by (the Llama 3.1 reference code's formula)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _round(value: float) -> float:
    """A float32 of the file as the short decimal it stands for: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))
