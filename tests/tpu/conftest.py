"""The TPU compiler for tests; it needs no TPU. Skipped where libtpu is not installed."""

import importlib.util
import os
from pathlib import Path

import pytest

from sharding.topology import Slice

os.environ.update(Slice.parse("v5e-4").variables)  # read when the compiler is loaded, whichever slice is compiled for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("tpu_compiler") or item.get_closest_marker("tpu_aot"):
                item.add_marker(
                    pytest.mark.skip(reason="libtpu, the TPU compiler, is not installed (extra tpu or dev)")
                )


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for config files."""
    return tmp_path_factory.mktemp("configs")
