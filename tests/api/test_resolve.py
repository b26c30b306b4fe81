"""From EngineArgs and a model's config files to an EngineConfig."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxserve.checks import ParameterError
from jaxserve.config import (
    EngineArgs,
    EngineConfig,
    default_sampling_params,
    load_generation_config,
    merge_overrides,
    model_limit,
    resolve,
)

HF = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "vocab_size": 1000,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
GIB = 1 << 30


def configure(platform: str = "cpu", hf: dict | None = None, generation: dict | None = None, **options) -> EngineConfig:
    return resolve(EngineArgs(**options), HF if hf is None else hf, generation or {}, platform)


def test_defaults_on_each_platform():
    cpu, gpu, tpu = (configure(platform) for platform in ("cpu", "gpu", "tpu"))
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.block_size, cpu.dtype) == (256, 4096, 32, "float32")
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens, gpu.block_size, gpu.dtype) == (256, 8192, 64, "bfloat16")
    assert (tpu.max_num_seqs, tpu.max_num_batched_tokens, tpu.block_size, tpu.dtype) == (256, 2048, 128, "bfloat16")
    assert (cpu.warmup, gpu.warmup, tpu.warmup) == ("none", "lazy", "lazy")
    assert cpu.max_model_len == 2048
    assert cpu.fit_max_model_len
    assert cpu.vocab_size == 1000
    assert cpu.eos_token_ids == {2}
    assert cpu.served_model_names == ("SmolLM2-135M-Instruct",)
    assert cpu.log_stats
    with pytest.raises(dataclasses.FrozenInstanceError):
        cpu.seed = 3
    with pytest.raises(TypeError):
        cpu.default_sampling["temperature"] = 1
    with pytest.raises(ParameterError, match="platform"):
        configure("cuda")


@pytest.mark.parametrize(("platform", "memory", "kind", "sizes"), [
    ("gpu", 80 * GIB, "NVIDIA H100 80GB HBM3", (1024, 16384)),
    ("gpu", 80 * GIB, "NVIDIA A100-SXM4-80GB", (256, 8192)),
    ("gpu", 24 * GIB, "NVIDIA L4", (256, 8192)),
    ("tpu", None, "TPU v6 lite", (256, 2048)),
    ("tpu", None, "TPU v5 lite", (256, 1024)),
    ("tpu", None, "TPU v5", (256, 2048)),
])  # fmt: skip
def test_batch_sizes_by_device(platform, memory, kind, sizes):
    config = resolve(EngineArgs(), HF, {}, platform, device_memory=memory, device_kind=kind)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == sizes


@pytest.mark.parametrize(("options", "seqs", "tokens"), [
    ({"max_num_batched_tokens": 16}, 16, 16),  # fewer sequences than the default, since each needs a token
    ({"max_num_seqs": 5000}, 5000, 5000),
    ({"max_num_seqs": 1}, 1, 2048),  # no more than the sequences can hold
    ({"max_num_seqs": 2, "max_model_len": 10, "max_num_batched_tokens": 999}, 2, 20),
    ({"enable_chunked_prefill": False}, 256, 4096),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}, 256, 2048),
])  # fmt: skip
def test_batch_sizes(options, seqs, tokens):
    config = configure(**options)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (seqs, tokens)


def test_without_chunked_prefill_a_step_holds_a_prompt():
    hf = HF | {"max_position_embeddings": 10_000}
    assert configure(hf=hf, enable_chunked_prefill=False).max_num_batched_tokens == 10_000


@pytest.mark.parametrize(("options", "words"), [
    ({"max_model_len": 2049}, ("2049", "2048", "hf_overrides")),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 2047}, ("2047", "2048", "chunked")),
    ({"long_prefill_token_threshold": 2049}, ("2049", "2048")),
    ({"enable_chunked_prefill": False, "long_prefill_token_threshold": 5}, ("enable_chunked_prefill",)),
    ({"kv_cache_dtype": "bfloat16"}, ("kv_cache_dtype", "float32")),
    ({"override_generation_config": {"temperature": 9}}, ("temperature", "9")),
    ({"override_generation_config": {"temp": 1}}, ("temp", "top_p")),
])  # fmt: skip
def test_what_the_model_rules_out(options, words):
    with pytest.raises(ParameterError) as info:
        configure(**options)
    assert all(word in str(info.value) for word in words)


def test_asked_for_context_is_not_fitted():
    config = configure(max_model_len="1k")
    assert (config.max_model_len, config.fit_max_model_len) == (1000, False)
    fitted = configure(long_prefill_token_threshold=500).fitted(300)
    assert (fitted.max_model_len, fitted.long_prefill_token_threshold) == (300, 300)
    with pytest.raises(ParameterError, match="max_model_len"):
        config.fitted(1001)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("hf", "limit"), [
    ({"max_position_embeddings": 100}, 100),
    ({"n_positions": 77}, 77),
    ({"max_position_embeddings": 100, "rope_scaling": None}, 100),
    ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 200),
    ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 8}}, 800),
    ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
    ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "factor": 32.0}}, 131072),
    ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
    ({"max_position_embeddings": 40960, "rope_parameters": YARN | {"rope_theta": 1e6}}, 131072),
    ({"max_position_embeddings": 131072, "model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear",
      "factor": 8.0}}, 131072),
    ({"max_position_embeddings": 50, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2},
      "sliding_attention": {"rope_type": "default"}}}, 100),
    ({"text_config": {"max_position_embeddings": 64}}, 64),
])  # fmt: skip
def test_model_limit(hf, limit):
    assert model_limit(hf) == limit


def test_incomplete_model_config():
    with pytest.raises(ParameterError, match="max_position_embeddings"):
        model_limit({})
    with pytest.raises(ParameterError, match="vocab_size"):
        configure(hf={"max_position_embeddings": 5})


def test_overrides_stretch_the_model_and_leave_its_config_alone():
    hf = {**HF, "rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}
    before = json.dumps(hf)
    merged = merge_overrides(hf, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "x": 1})
    assert merged["rope_scaling"] == {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}
    assert merged["x"] == 1
    overrides = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert configure(hf=hf, hf_overrides=overrides, max_model_len=4096).max_model_len == 4096
    assert json.dumps(hf) == before


@pytest.mark.parametrize(("platform", "requested", "stored", "family", "chosen"), [
    ("cpu", "auto", "bfloat16", "llama", "float32"),
    ("cpu", "bfloat16", "float32", "llama", "bfloat16"),
    ("gpu", "auto", "float32", "llama", "bfloat16"),
    ("gpu", "auto", "torch.float16", "llama", "float16"),
    ("gpu", "auto", None, "llama", "bfloat16"),
    ("gpu", "auto", "float16", "gemma2", "bfloat16"),
    ("tpu", "auto", "float16", "llama", "bfloat16"),
    ("gpu", "half", "bfloat16", "llama", "float16"),
    ("gpu", "float", "bfloat16", "llama", "float32"),
])  # fmt: skip
def test_dtype(platform, requested, stored, family, chosen):
    hf = {**HF, "dtype": stored, "model_type": family}
    config = configure(platform, hf, dtype=requested, kv_cache_dtype="auto" if requested == "auto" else requested)
    assert config.dtype == chosen


@pytest.mark.parametrize(("platform", "family"), [("tpu", "llama"), ("gpu", "gemma3_text")])
def test_float16_is_refused_where_it_does_not_work(platform, family):
    with pytest.raises(ParameterError, match=r"float16.*bfloat16"):
        configure(platform, HF | {"model_type": family}, dtype="half")


def test_end_of_sequence_ids_come_from_both_files():
    assert configure(generation={"eos_token_id": [3, 4]}).eos_token_ids == {2, 3, 4}
    assert configure(generation={"eos_token_id": [3]}, generation_config="vllm").eos_token_ids == {2, 3}
    assert configure(hf=HF | {"eos_token_id": None}).eos_token_ids == frozenset()


def test_default_sampling():
    generation = {
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 50,
        "max_new_tokens": 100,
        "do_sample": True,
        "min_p": None,
    }
    assert default_sampling_params(generation, {}) == {"temperature": 0.6, "top_k": 50, "max_tokens": 100}
    assert default_sampling_params(generation, {"temperature": 1, "repetition_penalty": 1.1}) == {
        "top_k": 50,
        "max_tokens": 100,
        "repetition_penalty": 1.1,
    }
    assert configure(generation=generation).default_sampling["temperature"] == 0.6
    neutral = configure(generation=generation, generation_config="vllm", override_generation_config={"top_k": 3})
    assert neutral.default_sampling == {"top_k": 3}
    with pytest.raises(ParameterError, match=r"temperature.*override_generation_config"):
        default_sampling_params({"temperature": -1}, {})
    with pytest.raises(ParameterError, match="generation config"):
        default_sampling_params({"top_k": "many"}, {})


def test_load_generation_config(tmp_path: Path):
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    assert load_generation_config("auto", model) == {}
    assert load_generation_config("auto", model / "model.gguf") == {}
    (model / "generation_config.json").write_text('{"top_k": 5}')
    assert load_generation_config("auto", model) == {"top_k": 5}
    with pytest.raises(ParameterError, match="does not exist"):
        load_generation_config(str(other), model)
    (other / "generation_config.json").write_text('{"top_k": 6}')
    assert load_generation_config(str(other), model) == {"top_k": 6}
    for text in ("{", "[1]"):
        (other / "generation_config.json").write_text(text)
        with pytest.raises(ParameterError, match="JSON"):
            load_generation_config(str(other), model)


def test_compilation_cache_folder():
    assert configure().compilation_cache_dir == Path.home() / ".cache" / "jaxserve"
    assert configure(compilation_cache_dir="").compilation_cache_dir is None
    assert configure(compilation_cache_dir="/tmp/x").compilation_cache_dir == Path("/tmp/x")


def test_changed_args_are_checked_again_and_not_changed():
    args = EngineArgs(served_model_name="a")
    before = dict(vars(args))
    assert resolve(args, HF, {}, "cpu").served_model_names == ("a",)
    assert vars(args) == before
    args.dtype = "int4"
    with pytest.raises(ParameterError, match="dtype"):
        resolve(args, HF, {}, "cpu")
