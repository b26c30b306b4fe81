"""What an engine does by default on TPUs."""

import json
from pathlib import Path

import jax
import pytest

from jaxserve.cli.compile_job import prepare
from jaxserve.config import EngineArgs
from jaxserve.engine.blueprint import buckets_of
from jaxserve.engine.memory import HOLE_BYTES, memory_limit, total_memory
from jaxserve.engine.tracing import Recipe, device_facts
from sharding.topology import GENERATIONS, Slice

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_token_id": 1,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_decodes_have_eight_rows_or_more(path: Path):
    setup = prepare(EngineArgs(path), Slice.parse("v5e-8"), plan_only=True)
    buckets = buckets_of(setup.config)
    assert {one.seqs for one in buckets.all() if one.decode_only} == {8, 16, 32, 64, 128, 192, 256}
    assert buckets.choose(3, 3, buckets.largest.level, 0).seqs == 8
    few = prepare(EngineArgs(path, max_num_seqs=2), Slice.parse("v5e-8"), plan_only=True)
    assert {one.seqs for one in buckets_of(few.config).all() if one.decode_only} == {2}


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
def test_the_memory_is_what_the_compiler_allows(generation):
    device = Slice.parse(generation.slices[0]).abstract_device
    assert total_memory(device, 0.5) == generation.hbm_bytes
    assert memory_limit([device], 0.5) == generation.hbm_bytes // 2 - HOLE_BYTES


def test_an_allocator_knows_better():
    class Device:
        platform, device_kind, num_cores = "tpu", "TPU v5 lite", 1

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000 << 20, "bytes_in_use": 100 << 20}

    assert memory_limit([Device()], 0.9) == (800 << 20) - HOLE_BYTES
    assert total_memory(Device(), 0.9) == 1000 << 20


def test_recipes_say_how_many_cores_work_as_one_device(path: Path):
    for name, cores in (("v5e-8", 1), ("v5p-16", 2)):
        setup = prepare(EngineArgs(path), Slice.parse(name), plan_only=True)
        recipe = setup.plan().recipe
        assert recipe.device == (setup.target.generation.device_kind, cores, "tpu")
        assert Recipe.loads(recipe.dumps()).abstract_mesh.abstract_device == setup.device
    assert device_facts(jax.devices("cpu")[0]) == ("cpu", None, "cpu")


def test_a_slice_is_used_whole(path: Path):
    def sizes(**options: int) -> tuple[int, int]:
        parallel = prepare(EngineArgs(path, **options), Slice.parse("v5e-32"), plan_only=True).config.parallel
        return parallel.data_parallel_size, parallel.tensor_parallel_size

    assert sizes() == (2, 16)  # 16 query heads cannot be dealt out to 32 devices
    assert sizes(tensor_parallel_size=8) == (4, 8)
    assert sizes(data_parallel_size=8) == (8, 4)
