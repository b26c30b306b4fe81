"""`EngineConfig`: the frozen settings an engine runs with, worked out from `EngineArgs`, the model and the platform."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxserve.checks import ParameterError, check_choice, require
from jaxserve.config.args import DTYPES, EngineArgs
from jaxserve.config.model_facts import (
    choose_dtype,
    default_sampling_params,
    eos_token_ids,
    merge_overrides,
    model_limit,
    model_vocab_size,
)
from jaxserve.config.parallel import ParallelConfig

PLATFORMS = ("cpu", "gpu", "tpu")
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
BLOCK_SIZES = MappingProxyType({"cpu": 32, "gpu": 64, "tpu": 128})  # a TPU works on tiles of 128 columns
LARGE_GPU_BYTES = 70 * 2**30
CACHE_FOLDER = Path(".cache") / "jaxserve"  # in the home folder


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine, checked and complete.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        dtype: "float32", "bfloat16" or "float16", of weights, activations and cache.
        vocab_size: rows of the embedding table, so token ids are below it.
        max_model_len: longest prompt plus output in tokens.
        fit_max_model_len: whether the memory plan may lower `max_model_len` (nobody asked for that very length).
        parallel: sizes of the device mesh.
        block_size: tokens per cache page.
        served_model_names: at least one name.
        log_stats: collect statistics.
        warmup: "none", "lazy" or "full".
        kernels: implementation by op, instead of the best that can serve.
        compilation_cache_dir: folder of compiled programs, None for none.
        eos_token_ids: ids that end a sequence unless a request ignores them.
        default_sampling: `SamplingParams` fields for requests without params.
    """

    platform: str
    model: str | None
    chat_template: str | None
    load_format: str
    use_tqdm_on_load: bool
    dtype: str
    seed: int
    vocab_size: int
    max_model_len: int
    fit_max_model_len: bool
    served_model_names: tuple[str, ...]
    max_logprobs: int
    logprobs_mode: str
    parallel: ParallelConfig
    block_size: int
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    enable_prefix_caching: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    scheduling_policy: str
    decode_steps: int
    warmup: str
    kernels: Mapping[str, str]
    compilation_cache_dir: Path | None
    log_stats: bool
    eos_token_ids: frozenset[int] = frozenset()
    default_sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def fitted(self, max_model_len: int) -> "EngineConfig":
        """The config for a shorter context, which the memory plan found to be all that fits."""
        limit = f"be between 1 and {self.max_model_len}"
        require(1 <= max_model_len <= self.max_model_len, "max_model_len", max_model_len, limit)
        threshold = min(self.long_prefill_token_threshold, max_model_len)
        return replace(self, max_model_len=max_model_len, long_prefill_token_threshold=threshold)


_NAMES = {item.name for item in fields(EngineConfig)}


def resolve(
    args: EngineArgs,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    platform: str,
    *,
    device_memory: int | None = None,
    device_kind: str = "",
) -> EngineConfig:
    """Check the options against a model and fill in what was left open.

    Args:
        args: the options; checked again, not changed.
        hf_config: the model's config.json; `hf_overrides` are merged into it here.
        generation_config: its generation_config.json, or an empty mapping (see `load_generation_config`).
        platform: "cpu", "gpu" or "tpu".
        device_memory: bytes of one device, for the defaults of the batch sizes; None is unknown.
        device_kind: what jax calls the device, for the defaults of the batch sizes.

    Raises:
        ParameterError: (a `ValueError`) options that the model or each other rule out; says which and what to do.
        TypeError: an option of the wrong type.
    """
    check_choice("platform", platform, PLATFORMS)
    args = args.validated()
    hf_config = merge_overrides(hf_config, args.hf_overrides)
    on_cpu = platform == "cpu"
    dtype = choose_dtype(args.dtype, hf_config, platform)
    cache_dtype = DTYPES.get(args.kv_cache_dtype, dtype)
    rule = f'be "auto" or the dtype of the model, {dtype} (another cache type is not supported yet)'
    require(cache_dtype == dtype, "kv_cache_dtype", args.kv_cache_dtype, rule)
    max_model_len = _context_length(args.max_model_len, model_limit(hf_config))
    seqs, tokens = _batch_sizes(args, max_model_len, _default_sizes(platform, device_memory, device_kind))
    sampling = {} if args.generation_config == "vllm" else generation_config
    worked_out: dict[str, Any] = {
        "platform": platform,
        "dtype": dtype,
        "vocab_size": model_vocab_size(hf_config),
        "max_model_len": max_model_len,
        "fit_max_model_len": args.max_model_len is None,
        "served_model_names": tuple(args.served_model_name or [args.model or EMBEDDED_MODEL]),
        "parallel": ParallelConfig(args.tensor_parallel_size, args.data_parallel_size),
        "block_size": args.block_size or BLOCK_SIZES[platform],
        "max_num_seqs": seqs,
        "max_num_batched_tokens": tokens,
        "decode_steps": args.decode_steps or (1 if on_cpu else 8),
        "warmup": args.warmup or ("none" if on_cpu else "lazy"),
        "kernels": MappingProxyType(dict(sorted(args.kernels.items()))),
        "compilation_cache_dir": _cache_dir(args.compilation_cache_dir),
        "log_stats": not args.disable_log_stats,
        "eos_token_ids": eos_token_ids(hf_config, generation_config),
        "default_sampling": MappingProxyType(default_sampling_params(sampling, args.override_generation_config)),
    }
    as_given = {item.name: getattr(args, item.name) for item in fields(args) if item.name in _NAMES}
    return EngineConfig(**(as_given | worked_out))


def _context_length(requested: int | str | None, limit: int) -> int:
    if not isinstance(requested, int):  # validated: an int or None
        return limit
    if requested > limit:
        raise ParameterError(
            f"max_model_len={requested} is more than the {limit} tokens that the model's config.json allows. Lower "
            'it, or stretch the model on purpose with hf_overrides, such as {"rope_scaling": {"rope_type": "yarn", '
            f'"factor": 4.0, "original_max_position_embeddings": {limit}}}}}.',
            parameter="max_model_len",
            value=requested,
        )
    return requested


def _default_sizes(platform: str, memory: int | None, kind: str) -> tuple[int, int]:
    """Default `max_num_seqs` and `max_num_batched_tokens` of a device."""
    if platform == "gpu":
        large = memory is not None and memory >= LARGE_GPU_BYTES and "a100" not in kind.lower()
        return (1024, 16384) if large else (256, 8192)
    if platform == "tpu":
        return 256, 1024 if "v5 lite" in kind.lower() else 2048
    return 256, 4096


def _batch_sizes(args: EngineArgs, max_model_len: int, defaults: tuple[int, int]) -> tuple[int, int]:
    """Sequences and tokens per step: what was asked for, else defaults that suit it and the context length."""
    default_seqs, default_tokens = defaults
    tokens, seqs = args.max_num_batched_tokens, args.max_num_seqs
    if seqs is None:
        seqs = default_seqs if tokens is None else min(default_seqs, tokens)
    if tokens is None:
        tokens = max(default_tokens, seqs, 0 if args.enable_chunked_prefill else max_model_len)
    elif not args.enable_chunked_prefill and tokens < max_model_len:
        raise ParameterError(
            f"max_num_batched_tokens={tokens} is less than max_model_len={max_model_len}, but with "
            "enable_chunked_prefill=False a prompt must fit in one step. Raise max_num_batched_tokens, lower "
            "max_model_len, or allow chunked prefill.",
            parameter="max_num_batched_tokens",
            value=tokens,
        )
    threshold = args.long_prefill_token_threshold
    rule = f"be at most max_model_len ({max_model_len})"
    require(threshold <= max_model_len, "long_prefill_token_threshold", threshold, rule)
    rule = "be 0 with enable_chunked_prefill=False, where a prompt is never split"
    require(args.enable_chunked_prefill or threshold == 0, "long_prefill_token_threshold", threshold, rule)
    return seqs, min(tokens, seqs * max_model_len)  # no step can hold more


def _cache_dir(requested: str | None) -> Path | None:
    if requested is None:
        return Path.home() / CACHE_FOLDER
    return Path(requested).expanduser() if requested else None
