"""What the tests of the server share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_flags(compilation_cache: str, smollm2_path: Path) -> list[str]:
    """A quick start: the embedded model, few programs, all of them kept."""
    sizes = ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    return [str(smollm2_path), "--served-model-name", "tiny,small-alias", *sizes, "--warmup", "none",
            "--compilation-cache-dir", compilation_cache]  # fmt: skip
