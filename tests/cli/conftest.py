"""A tiny Llama with the embedded model's tokenizer: real files, programs that compile in a moment."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.text import load_tokenizer

WIDTH, INNER, HEAD, VOCAB = 32, 64, 16, 49152
LAYER = {
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
    "self_attn.q_proj": (2 * HEAD, WIDTH),
    "self_attn.k_proj": (HEAD, WIDTH),
    "self_attn.v_proj": (HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, 2 * HEAD),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """A Hugging Face folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in LAYER.items()}
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    load_tokenizer(smollm2_path).hf.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny_model: Path, compilation_cache: str) -> list[str]:
    """Flags of an engine that starts fast."""
    lengths = ["--max-model-len", "256", "--max-num-batched-tokens", "64"]
    sizes = [*lengths, "--max-num-seqs", "4", "--num-gpu-blocks-override", "64"]
    return ["--model", str(tiny_model), *sizes, "--compilation-cache-dir", compilation_cache]
