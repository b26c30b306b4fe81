"""The sampling floor as the TPU compiler sees it, for chips that are not there."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.top_k_top_p import OP, mosaic_tpu, top_k_top_p_floor
from sharding.topology import Slice, TopologyError

QWEN, GEMMA = 151_936, 262_144  # vocabularies


def shapes(rows: int, size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    columns = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in ("int32", "float32", "float32", "float32")]
    return jax.ShapeDtypeStruct((rows, size), "float32"), *columns


def device_of(name: str, monkeypatch: pytest.MonkeyPatch) -> jax.Device:
    target = Slice.parse(name)
    for variable, value in target.variables.items():
        monkeypatch.setenv(variable, value)
    try:
        return target.devices()[0]
    except TopologyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "serves"), [("v4-8", QWEN), ("v6e-4", GEMMA)])
def test_it_is_the_choice_where_rows_fit(name: str, serves: int) -> None:
    """A generation's VMEM holds two blocks of 8 such rows, or one; it never holds those of 2 million logits."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=Slice.parse(name).abstract_device)):
        assert OP.choice(None, *shapes(64, serves)) == "mosaic_tpu"
        assert OP.choice(None, *shapes(64, 2_000_000 if name == "v4-8" else 5_000_000)) == "xla"


@pytest.mark.parametrize(("name", "rows", "size"), [("v5e-4", 64, QWEN), ("v6e-4", 17, 4099)])
def test_the_kernel_compiles_and_reads_the_logits_in_place(
    name: str, rows: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = NamedSharding(Mesh([device_of(name, monkeypatch)], "x"), P())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes(rows, size)]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=Slice.parse(name).abstract_device)):
        traced = jax.jit(lambda *args: top_k_top_p_floor(*args, implementation="mosaic_tpu")).trace(*arguments)
    compiled = traced.lower().compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    makers = re.findall(rf"= f32\[{rows},{size}\]\S* (\w+)\(", text)
    assert makers == ["parameter"]  # neither copied nor padded
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * size


def test_vmem_is_two_blocks_of_rows_and_the_lists() -> None:
    blocks, lists = 2 * 8 * QWEN * 4, 8 * 6 * 16 * 128 * 4
    assert mosaic_tpu.vmem_use(QWEN, 2) == blocks + lists + (1 << 20)
    assert mosaic_tpu.vmem_use(QWEN, 2) < 16 << 20
