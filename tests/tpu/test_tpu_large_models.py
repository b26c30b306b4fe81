"""Whole models for TPU slices, by hand: `pytest -m tpu_aot tests/tpu` takes minutes for each."""

import json
from pathlib import Path

import pytest

from jaxserve.batch import Bucket
from jaxserve.cli.compile_job import prepare
from jaxserve.config import EngineArgs
from jaxserve.engine.ahead import compile_all, read_report
from jaxserve.engine.blueprint import buckets_of
from jaxserve.engine.hlo import Program
from jaxserve.engine.tracing import Tracer
from sharding.topology import Slice

pytestmark = pytest.mark.tpu_aot
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_token_id": 151645,
}
LLAMA_31_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": 128009,
}
CASES = [(QWEN3_8B, "v5e-8"), (QWEN3_8B, "v6e-4"), (LLAMA_31_70B, "v6e-8"), (LLAMA_31_70B, "v5p-8")]


@pytest.mark.parametrize(("config", "slice_name"), CASES, ids=["8B-v5e-8", "8B-v6e-4", "70B-v6e-8", "70B-v5p-8"])
def test_the_plan_is_the_compilers(config: dict, slice_name: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    setup = prepare(EngineArgs(path), Slice.parse(slice_name), plan_only=False)
    blueprint = setup.plan()
    plan = blueprint.plan
    compiler = blueprint.compiler(Tracer(blueprint.recipe, blueprint.model), None)
    (prefill,) = compile_all(compiler, [buckets_of(blueprint.config).largest], 1)
    compiled = compiler(Bucket(64, 64))
    decode = read_report(Bucket(64, 64), compiled, 0.0)
    assert plan.weights + plan.working + plan.cache == pytest.approx(prefill.total, rel=0.02)
    assert plan.weights + plan.cache == pytest.approx(decode.arguments, rel=0.02)
    assert max(prefill.working, decode.working) <= plan.working
    assert max(prefill.total, decode.total) <= plan.limit
    program = Program.parse(compiled.as_text() or "")
    matrix = config["hidden_size"] * config["intermediate_size"] * 2 // blueprint.model.mesh.shape["model"]
    assert list(program.copies(matrix)) == []
    hidden = 64 * config["hidden_size"] * 2
    sums = [size for kind, size in decode.exchanges if kind == "all-reduce" and size == hidden]
    assert len(sums) == 1 + 2 * config["num_hidden_layers"]
