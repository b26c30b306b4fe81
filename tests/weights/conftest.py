"""Fixtures: one set of tiny weights, in a Hugging Face folder and in a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import make_tensors, write_folder, write_gguf


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """Random weights of a two-layer Llama by Hugging Face names, float32."""
    return make_tensors()


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A good model folder in one file."""
    return write_folder(tmp_path / "model", tensors)


@pytest.fixture
def gguf_file(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A good GGUF file in float32."""
    return write_gguf(tmp_path / "model.gguf", tensors)
