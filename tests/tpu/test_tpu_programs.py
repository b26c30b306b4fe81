"""Decode and prefill of every model family, compiled by the TPU compiler for chips that are not here."""

import json
from pathlib import Path

import pytest

from jaxserve.batch import Bucket
from jaxserve.cli.compile_job import Setup, prepare
from jaxserve.config import EngineArgs
from jaxserve.engine.ahead import ProgramReport, read_report
from jaxserve.engine.hlo import Program
from jaxserve.engine.tracing import Tracer
from sharding.topology import Slice

pytestmark = pytest.mark.tpu_compiler
DECODE, PREFILL = Bucket(16, 16), Bucket(32, 8)
BASE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "eos_token_id": 1,
}
GEMMA = {"tie_word_embeddings": True, "sliding_window": 256, "query_pre_attn_scalar": 128}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 64},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 256},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 8},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 256, **GEMMA},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "layer_types": ["sliding_attention"], **GEMMA},
}
SMALLEST_MATRIX = 512 * 1024 * 2 // 4  # bytes of a device's part


def set_up(configs: Path, family: str, slice_name: str, **options: int) -> Setup:
    """A small model of the family on a slice."""
    path = configs / f"{family}.json"
    path.write_text(json.dumps(BASE | FAMILIES[family]))
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 256}
    return prepare(EngineArgs(path, **(sizes | options)), Slice.parse(slice_name), plan_only=False)


def compile_one(setup: Setup, bucket: Bucket) -> tuple[ProgramReport, Program, list[str]]:
    """The program of a bucket: its figures, its text, and which kernels it holds."""
    blueprint = setup.plan()
    compiled = blueprint.compiler(Tracer(blueprint.recipe, blueprint.model), None)(bucket)
    program = Program.parse(compiled.as_text() or "")
    return read_report(bucket, compiled, 0.0), program, [scope for scope, _, _ in program.traffic().kernels if scope]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("slice_name", "bucket"), [("v5e-4", DECODE), ("v5e-1", PREFILL)], ids=["decode", "prefill"])
def test_a_step_of_every_family(configs: Path, family: str, slice_name: str, bucket: Bucket):
    setup = set_up(configs, family, slice_name)
    report, program, kernels = compile_one(setup, bucket)
    plan, layers = setup.plan().plan, setup.model.model_config.num_layers
    assert sum("paged_attention" in scope for scope in kernels) == layers
    assert sum("write_kv" in scope for scope in kernels) == layers
    assert [line.text for line in program.copies(SMALLEST_MATRIX)] == []  # neither of the cache nor of weights
    assert report.aliased >= plan.cache  # it is changed in place
    assert report.arguments == pytest.approx(plan.weights + plan.cache, rel=0.02)
    assert report.working < plan.cache / 4  # activations alone
    hidden = bucket.tokens * BASE["hidden_size"] * 2
    sums = [size for kind, size in report.exchanges if kind == "all-reduce" and size == hidden]
    assert len(sums) == (0 if slice_name == "v5e-1" else 1 + 2 * layers)  # embedding, attention and MLP of each layer


def test_copies_of_the_model_share_one_program(configs: Path):
    setup = set_up(configs, "qwen3", "v5e-4", data_parallel_size=2)
    assert setup.config.parallel.tensor_parallel_size == 2
    report, program, kernels = compile_one(setup, DECODE)
    assert kernels
    assert not list(program.copies(SMALLEST_MATRIX))
    gathers = [size for kind, size in report.exchanges if kind == "all-gather"]
    assert 2 * 16 * 8 in gathers  # the best token of both halves of the vocabulary, with its logit


@pytest.mark.parametrize("slice_name", ["v6e-1", "v4-8"])
def test_other_generations(configs: Path, slice_name: str):
    report, program, kernels = compile_one(set_up(configs, "qwen3", slice_name), DECODE)
    assert len(kernels) >= 4
    assert not list(program.copies(SMALLEST_MATRIX))
    assert report.code > 0
