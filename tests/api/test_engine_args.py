"""EngineArgs: names, defaults, bounds, vLLM's other options, and the metadata the command line is made of."""

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checks import ParameterError, UnsupportedError
from jaxserve.config import EngineArgs
from jaxserve.config.args import FOREIGN_NAMES, default_of
from jaxserve.config.options import PARSERS, parse_count, parse_length, parse_names, parse_object
from jaxserve.config.vllm_names import NO_EFFECT, UNSUPPORTED

FIELDS = {field.name: field for field in dataclasses.fields(EngineArgs)}
VLLM_DEFAULTS = {
    "model": None,
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "chat_template": None,
    "revision": None,
    "tokenizer_revision": None,
    "hf_token": None,
    "hf_overrides": {},
    "download_dir": None,
    "load_format": "auto",
    "use_tqdm_on_load": True,
    "dtype": "auto",
    "seed": 0,
    "max_model_len": None,
    "served_model_name": None,
    "generation_config": "auto",
    "override_generation_config": {},
    "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs",
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "block_size": None,
    "gpu_memory_utilization": 0.92,
    "kv_cache_memory_bytes": None,
    "num_gpu_blocks_override": None,
    "kv_cache_dtype": "auto",
    "enable_prefix_caching": True,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "enable_chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "scheduling_policy": "fcfs",
    "disable_log_stats": False,
}
OWN_DEFAULTS = {"decode_steps": None, "warmup": None, "compilation_cache_dir": None, "kernels": {}}

ACCEPTED = [
    ("max_model_len", "32k", 32_000),
    ("max_model_len", "8K", 8192),
    ("max_model_len", "auto", None),
    ("max_model_len", -1, None),
    ("max_model_len", "-1", None),
    ("max_model_len", np.int32(77), 77),
    ("kv_cache_memory_bytes", "2G", 2 << 30),
    ("max_num_batched_tokens", "1k", 1000),
    ("model", Path("a") / "b", "a/b"),
    ("served_model_name", "one", ["one"]),
    ("served_model_name", ("one", "two"), ["one", "two"]),
    ("gpu_memory_utilization", 1, 1.0),
    ("max_logprobs", -1, -1),
    ("hf_token", True, True),
    ("compilation_cache_dir", "", ""),
    ("warmup", "none", "none"),
]
BAD_VALUES = [
    ("model", ""),
    ("dtype", "int8"),
    ("max_model_len", 0),
    ("max_model_len", -2),
    ("max_model_len", "lots"),
    ("max_model_len", "1.5"),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", 0),
    ("block_size", 24),
    ("block_size", 1024),
    ("block_size", 0),
    ("gpu_memory_utilization", 0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", math.nan),
    ("kv_cache_memory_bytes", 0),
    ("num_gpu_blocks_override", 0),
    ("scheduling_policy", "lifo"),
    ("max_logprobs", -2),
    ("logprobs_mode", "raw"),
    ("warmup", "slow"),
    ("tokenizer_mode", "slow"),
    ("load_format", "pt"),
    ("long_prefill_token_threshold", -1),
    ("seed", 2**63),
    ("served_model_name", [""]),
    ("generation_config", ""),
]
BAD_TYPES = [
    ("model", 3),
    ("tokenizer", ["a"]),
    ("dtype", None),
    ("dtype", np.float32),
    ("max_model_len", 1.5),
    ("max_model_len", True),
    ("max_num_seqs", b"many"),
    ("enable_prefix_caching", 1),
    ("enable_prefix_caching", None),
    ("hf_overrides", lambda config: config),
    ("hf_overrides", {1: 2}),
    ("gpu_memory_utilization", "0.9"),
    ("seed", None),
    ("seed", 1.0),
    ("served_model_name", [1]),
    ("hf_token", 5),
]


def test_fields_and_defaults():
    args = EngineArgs()
    assert vars(args) == VLLM_DEFAULTS | OWN_DEFAULTS
    assert {name: default_of(field) for name, field in FIELDS.items()} == VLLM_DEFAULTS | OWN_DEFAULTS
    assert EngineArgs("folder").model == EngineArgs(model="folder").model == "folder"
    assert EngineArgs(**vars(args)) == args
    assert args.hf_overrides is not EngineArgs().hf_overrides


@pytest.mark.parametrize(("name", "value", "stored"), ACCEPTED)
def test_accepted(name, value, stored):
    result = getattr(EngineArgs(**{name: value}), name)
    assert result == stored
    assert type(result) is type(stored)


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value(name, value):
    with pytest.raises(ParameterError) as info:
        EngineArgs(**{name: value})
    assert name in str(info.value)
    assert repr(value) in str(info.value)


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_bad_type(name, value):
    with pytest.raises(TypeError, match=name):
        EngineArgs(**{name: value})


def test_options_that_rule_each_other_out():
    with pytest.raises(ParameterError, match=r"max_num_batched_tokens=8 .* max_num_seqs=9"):
        EngineArgs(max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ParameterError, match=r"chat_template .*skip_tokenizer_init"):
        EngineArgs(skip_tokenizer_init=True, chat_template="x")


def test_unknown_name_suggests_the_closest():
    with pytest.raises(TypeError, match=r"'max_model_length'.*'max_model_len'"):
        EngineArgs(max_model_length=5)
    with pytest.raises(TypeError, match=r"'enforce_eagre'.*'enforce_eager'"):
        EngineArgs(enforce_eagre=True)
    with pytest.raises(TypeError, match="'zzzz'"):
        EngineArgs(zzzz=1)


def test_one_warning_line_names_only_what_was_changed(caplog):
    with caplog.at_level(logging.WARNING):
        EngineArgs(
            enforce_eager=True, swap_space=8, attention_backend=None, compilation_config={}, optimization_level=2
        )
    (record,) = caplog.records
    assert "enforce_eager=True" in record.getMessage()
    assert "swap_space=8" in record.getMessage()
    assert "\n" not in record.getMessage()
    for name in ("attention_backend", "compilation_config", "optimization_level"):
        assert name not in record.getMessage()


def test_vllm_defaults_pass_silently(caplog):
    neutral = {name: values[0] for names in UNSUPPORTED.values() for name, values in names.items()}
    EngineArgs(**NO_EFFECT, **neutral)
    EngineArgs(tensor_parallel_size=1, quantization=None, runner="generate", limit_mm_per_prompt={}, cpu_offload_gb=0.0)
    assert not caplog.records


@pytest.mark.parametrize("name", sorted(name for names in UNSUPPORTED.values() for name in names))
def test_every_unsupported_option_is_refused(name):
    with pytest.raises(UnsupportedError, match=rf"{name}='anything else'.*not support.* yet") as info:
        EngineArgs(**{name: "anything else"})
    assert isinstance(info.value, ValueError)
    assert isinstance(info.value, NotImplementedError)


@pytest.mark.parametrize(
    "options",
    [{"enable_lora": True}, {"pipeline_parallel_size": 2}, {"trust_remote_code": True},
     {"speculative_config": {"a": 1}}, {"quantization": "fp8"},
     {"cpu_offload_gb": 0.5}, {"limit_mm_per_prompt": {"image": 1}}, {"runner": "pooling"},
     {"enable_prompt_embeds": True}, {"max_num_partial_prefills": 2}, {"pipeline_parallel_size": True}],
)  # fmt: skip
def test_features_that_do_not_exist_yet(options):
    with pytest.raises(UnsupportedError, match=next(iter(options))):
        EngineArgs(**options)


def test_tables_do_not_overlap():
    names = [*FIELDS, *NO_EFFECT, *(name for names in UNSUPPORTED.values() for name in names)]
    assert len(names) == len(set(names))
    assert len(FOREIGN_NAMES) == len(names) - len(FIELDS)


def test_metadata_is_complete():
    for name, field in FIELDS.items():
        about = field.metadata
        assert about["help"], name
        assert about["help"][-1] != ".", name
        assert about["group"] in ("model", "sampling", "parallel", "cache", "scheduler", "engine"), name
        assert about["parse"] is PARSERS[about["kind"]], name
        assert (about["parse"] is None) == (field.type is bool or field.type == "bool"), name
        default = default_of(field)
        assert default is None or not about["choices"] or default in about["choices"], name


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("32k", 32_000), ("32K", 32_768), ("25.6k", 25_600),
                                              ("1.5M", 3 << 19), ("2m", 2_000_000), ("3G", 3 << 30)])  # fmt: skip
def test_parse_count(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-3", "1.5", "0x10", "1e3", "3T", "1.0001k", "½"])
def test_parse_count_refuses(text):
    with pytest.raises(ParameterError, match="whole number"):
        parse_count(text)


def test_other_parsers():
    assert (parse_length("auto"), parse_length("-1"), parse_length("1k")) == ("auto", -1, 1000)
    assert parse_object('{"a": {"b": 1}}') == {"a": {"b": 1}}
    assert parse_names("a, b,") == ["a", "b"]
    for text in ("{", "[1]", "3"):
        with pytest.raises(ParameterError, match="JSON"):
            parse_object(text)


def test_validated_checks_again_and_copies():
    args = EngineArgs(hf_overrides={"a": 1})
    copy = args.validated()
    assert copy == args
    assert copy.hf_overrides is not args.hf_overrides
    args.max_num_seqs = -3
    with pytest.raises(ParameterError, match="max_num_seqs"):
        args.validated()


GARBAGE = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.sampled_from(sorted(FOREIGN_NAMES)), GARBAGE, max_size=3))
def test_garbage_raises_value_or_type_error_only(options):
    try:
        args = EngineArgs(**options)
    except (ValueError, TypeError):
        return
    assert args.validated() == args
