"""What the tests of the server share."""

import json
from pathlib import Path

import pytest

from jaxserve.text import load_tokenizer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def small_flags(compilation_cache: str, smollm2_path: Path) -> list[str]:
    """A quick start: the embedded model, few programs, all of them kept."""
    sizes = ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    return [str(smollm2_path), "--served-model-name", "tiny,small-alias", *sizes, "--warmup", "none",
            "--compilation-cache-dir", compilation_cache]  # fmt: skip


@pytest.fixture(scope="session")
def quick_flags(compilation_cache: str, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A random model with the embedded model's tokenizer, whose programs compile in a moment."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "config.json").write_text(json.dumps(TINY))
    load_tokenizer(smollm2_path).hf.save_pretrained(folder)
    sizes = ["--max-model-len", "2048", "--max-num-seqs", "4", "--num-gpu-blocks-override", "256"]
    return [str(folder), "--load-format", "dummy", *sizes, "--warmup", "none",
            "--compilation-cache-dir", compilation_cache]  # fmt: skip
