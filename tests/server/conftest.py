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
    "num_hidden_layers": 1,
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
def quick_flags(compilation_cache: str, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A random model with the embedded model's tokenizer, whose programs compile in a moment."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "config.json").write_text(json.dumps(TINY))
    load_tokenizer(smollm2_path).hf.save_pretrained(folder)
    sizes = ["--max-model-len", "2048", "--max-num-seqs", "4", "--num-gpu-blocks-override", "256"]
    return [str(folder), "--load-format", "dummy", *sizes, "--warmup", "none",
            "--compilation-cache-dir", compilation_cache]  # fmt: skip
