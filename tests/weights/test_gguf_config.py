"""GGUF metadata as Hugging Face configs."""

import gguf
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, write_gguf

from jaxserve import models
from jaxserve.checkpoints import CheckpointError, open_checkpoint, read_generation_config, read_hf_config
from jaxserve.checkpoints.gguf_config import llama3_factors

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write(path, arch, numbers, tensors=None):
    """A GGUF file without layers, with `arch.`-prefixed numbers and strings over common ones."""
    writer = gguf.GGUFWriter(path, arch)
    common = {"block_count": 12, "context_length": 8192, "embedding_length": 64, "feed_forward_length": 128,
              "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
              "rope.freq_base": 500000.0, "attention.key_length": 32}  # fmt: skip
    for key, value in (common | numbers).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    for name, value in ({"token_embd.weight": np.zeros((10, 64), np.float32)} | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_config_equals_that_of_the_folder(gguf_file):
    config = read_hf_config(gguf_file)
    expected = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    assert {key: config[key] for key in expected} == expected
    assert config["dtype"] == "bfloat16"
    assert read_generation_config(gguf_file) == {"eos_token_id": [2, 3], "bos_token_id": 1}


def test_tied_embeddings_are_seen_by_the_absent_output(tmp_path, tensors):
    del tensors["lm_head.weight"]
    assert read_hf_config(write_gguf(tmp_path / "m.gguf", tensors))["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("arch", "numbers", "expected"),
    [
        ("llama", {}, {"architectures": ["LlamaForCausalLM"], "head_dim": 32, "vocab_size": 10, "rms_norm_eps": 1e-6}),
        ("llama", {"attention.sliding_window": 99}, {"architectures": ["MistralForCausalLM"], "sliding_window": 99}),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                   "rope.scaling.original_context_length": 2048},
         {"architectures": ["Qwen2ForCausalLM"],
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}),
        ("qwen3", {}, {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "rope_theta": 500000.0}),
        ("gemma2", {"attention.sliding_window": 77, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
         {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
          "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"] * 6}),
        ("gemma2", {"attention.sliding_window": 77, "block_count": 46}, {"query_pre_attn_scalar": 16}),
        ("gemma3", {"attention.sliding_window": 77, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
         {"architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 8.0},
          "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2, "rope_local_base_freq": 10000.0}),
        ("phi3", {"attention.sliding_window": 55, "rope.dimension_count": 24},
         {"architectures": ["Phi3ForCausalLM"], "sliding_window": 55, "partial_rotary_factor": 0.75}),
    ],
)  # fmt: skip
def test_families(tmp_path, arch, numbers, expected):
    config = read_hf_config(write(tmp_path / "m.gguf", arch, numbers))
    assert {key: config.get(key) for key in expected} == expected
    models.resolve(config).config(config)  # every attribute is one the family understands


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    factors = llama3_factors(LLAMA3, 500000.0, 32).astype(np.float32)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    config = read_hf_config(write(tmp_path / "m.gguf", "llama", {}, {"rope_freqs.weight": factors}))
    assert config["rope_scaling"] == {"rope_type": "llama3"} | LLAMA3
    factors[8] *= 1.1
    path = write(tmp_path / "n.gguf", "llama", {}, {"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match=r"is not Llama 3's scaling with factor 8.0"):
        read_hf_config(path)


def test_llama3_factors_agree_with_transformers_free_reference():
    """The branchy formula of the Llama 3.1 reference code, frequency by frequency."""
    for j, found in enumerate(llama3_factors(LLAMA3, 500000.0, 128)):
        wavelength = 2 * np.pi * 500000.0 ** (2 * j / 128)
        if wavelength < 8192 / 4.0:
            expected = 1.0
        elif wavelength > 8192 / 1.0:
            expected = 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = 1 / ((1 - smooth) / 8.0 + smooth)
        assert found == pytest.approx(expected)


def test_long_rope_factors(tmp_path):
    tensors = {
        "rope_factors_long.weight": np.full(16, 2.5, np.float32),
        "rope_factors_short.weight": np.ones(16, np.float32),
    }
    path = write(tmp_path / "m.gguf", "phi3", {"rope.scaling.original_context_length": 4096}, tensors)
    config = read_hf_config(path)
    assert config["rope_scaling"] == {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.5] * 16}
    assert config["original_max_position_embeddings"] == 4096


def test_missing_and_unsupported_metadata(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", {"context_length": "long"})
    with pytest.raises(CheckpointError, match=r"llama.context_length is 'long', but a number is needed"):
        read_hf_config(path)
    path = write(tmp_path / "n.gguf", "llama", {"rope.scaling.type": "ntk"})
    with pytest.raises(CheckpointError, match="rope scaling 'ntk' is not supported"):
        read_hf_config(path)


def test_gemma_norms_are_stored_as_what_is_added_to_one(tmp_path):
    ours = {"model.norm": "output_norm", "model.layers.0.input_layernorm": "blk.0.attn_norm",
            "model.layers.0.post_attention_layernorm": "blk.0.post_attention_norm",
            "model.layers.0.pre_feedforward_layernorm": "blk.0.ffn_norm",
            "model.layers.0.post_feedforward_layernorm": "blk.0.post_ffw_norm",
            "model.layers.0.self_attn.q_norm": "blk.0.attn_q_norm"}  # fmt: skip
    values = {name: np.random.default_rng(i).normal(size=64).astype(np.float32) for i, name in enumerate(ours)}
    stored = {f"{theirs}.weight": values[name] + np.float32(1) for name, theirs in ours.items()}
    rows = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    stored |= {"blk.0.attn_q.weight": rows, "blk.0.ffn_up.weight": rows}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", "gemma3", {}, stored))
    for name, value in values.items():
        np.testing.assert_allclose(checkpoint.read(f"{name}.weight"), value, atol=1e-6)
    for name in ("self_attn.q_proj", "mlp.up_proj"):  # neither shifted nor reordered
        np.testing.assert_array_equal(checkpoint.read(f"model.layers.0.{name}.weight"), rows)


def test_phi3_names(tmp_path):
    stored = {
        "blk.1.attn_qkv.weight": np.ones((4, 64), np.float32),
        "blk.1.ffn_up.weight": np.ones((6, 64), np.float32),
    }
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", "phi3", {}, stored))
    assert checkpoint.shape("model.layers.1.self_attn.qkv_proj.weight") == (4, 64)
    assert checkpoint.shape("model.layers.1.mlp.gate_up_proj.weight") == (6, 64)
