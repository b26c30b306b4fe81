"""A tiny Llama with the embedded model's tokenizer: real files, programs that compile in a moment."""

from pathlib import Path

import pytest
from tiny_llama import write_model

from jaxserve.text import load_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """A Hugging Face folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, 49152)
    load_tokenizer(smollm2_path).hf.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny_model: Path, compilation_cache: str) -> list[str]:
    """Flags of an engine that starts fast."""
    lengths = ["--max-model-len", "256", "--max-num-batched-tokens", "64"]
    sizes = [*lengths, "--max-num-seqs", "4", "--num-gpu-blocks-override", "64"]
    return ["--model", str(tiny_model), *sizes, "--compilation-cache-dir", compilation_cache]
