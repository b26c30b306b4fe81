"""vLLM's engine options that jaxserve does not have, so that nobody has to guess what became of a flag.

`NO_EFFECT` names choices that do not exist under XLA; setting one is harmless and is said in one warning line.
`UNSUPPORTED` names features that do not exist yet, each with the values that ask for nothing; any other value raises.
"""

import logging
from collections.abc import Mapping

from jaxserve.checks import UnsupportedError, shorten

logger = logging.getLogger(__name__)

# Name -> vLLM's default.
NO_EFFECT: Mapping[str, object] = {
    "aggregate_engine_logging": False,
    "all2all_backend": "allgather_reducescatter",
    "allow_deprecated_quantization": False,
    "async_scheduling": None,
    "attention_backend": None,
    "attention_config": None,
    "compilation_config": None,
    "cudagraph_capture_sizes": None,
    "cudagraph_metrics": False,
    "disable_cascade_attn": False,
    "disable_custom_all_reduce": False,
    "disable_hybrid_kv_cache_manager": None,
    "disable_nccl_for_dp_synchronization": None,
    "enable_flashinfer_autotune": None,
    "enable_layerwise_nvtx_tracing": False,
    "enforce_eager": False,
    "fail_on_environ_validation": False,
    "gdn_prefill_backend": None,
    "ir_op_priority": None,
    "kernel_config": None,
    "linear_backend": "auto",
    "max_cudagraph_capture_size": None,
    "max_parallel_loading_workers": None,
    "mm_encoder_attn_backend": None,
    "moe_backend": "auto",
    "optimization_level": 2,
    "prefix_caching_hash_algo": "sha256",
    "pt_load_map_location": "cpu",
    "ray_workers_use_nsight": False,
    "safetensors_load_strategy": "lazy",
    "show_hidden_metrics_for_version": None,
    "swap_space": 4,
    "use_v2_block_manager": True,
}

# Feature -> name -> values that do not ask for it, vLLM's default first; None also stands for empty containers.
UNSUPPORTED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "this kind of parallelism": {
        "pipeline_parallel_size": (1,),
        "prefill_context_parallel_size": (1,),
        "decode_context_parallel_size": (1,),
        "cp_kv_cache_interleave_size": (1,),
        "dcp_kv_cache_interleave_size": (1,),
        "dcp_comm_backend": ("ag_rs",),
        "data_parallel_rank": (None, 0),
        "data_parallel_start_rank": (None, 0),
        "data_parallel_size_local": (None, 1),
        "data_parallel_address": (None,),
        "data_parallel_rpc_port": (None, 29550),
        "data_parallel_hybrid_lb": (False,),
        "data_parallel_external_lb": (False,),
        "data_parallel_multi_port_external_lb": (False,),
        "data_parallel_backend": ("mp",),
        "distributed_executor_backend": (None, "uni", "mp"),
        "distributed_timeout_seconds": (None,),
        "nnodes": (1,),
        "node_rank": (0,),
        "master_addr": ("127.0.0.1", None),
        "master_port": (29501, None),
        "device_ids": (None,),
        "numa_bind": (False,),
        "numa_bind_nodes": (None,),
        "numa_bind_cpus": (None,),
    },
    "expert parallelism": {
        "enable_expert_parallel": (False,),
        "enable_ep_weight_filter": (False,),
        "enable_eplb": (False,),
        "eplb_config": (None,),
        "expert_placement_strategy": ("linear",),
        "enable_elastic_ep": (False,),
        "enable_dbo": (False,),
        "ubatch_size": (0,),
        "dbo_decode_token_threshold": (32,),
        "dbo_prefill_token_threshold": (512,),
    },
    "LoRA adapters": {
        "enable_lora": (False,),
        "max_loras": (1,),
        "max_lora_rank": (16,),
        "max_cpu_loras": (None,),
        "lora_dtype": ("auto",),
        "lora_target_modules": (None,),
        "lora_modules": (None,),
        "default_mm_loras": (None,),
        "fully_sharded_loras": (False,),
        "enable_tower_connector_lora": (False,),
        "specialize_active_lora": (False,),
        "enable_mixed_moe_lora_format": (False,),
    },
    "speculative decoding": {
        "speculative_config": (None,),
        "spec_method": (None,),
        "spec_model": (None,),
        "spec_tokens": (None,),
    },
    "quantized weights": {
        "quantization": (None,),
        "quantization_config": (None,),
    },
    "a cache scaled by calibration": {"calculate_kv_scales": (False,), "kv_cache_dtype_skip_layers": (None,)},
    "images, video and audio": {
        "limit_mm_per_prompt": (None,),
        "enable_mm_embeds": (False,),
        "interleave_mm_strings": (False,),
        "language_model_only": (False, True),
        "media_io_kwargs": (None,),
        "mm_processor_kwargs": (None,),
        "mm_processor_cache_gb": (4, 0),
        "mm_processor_cache_type": (None, "lru"),
        "mm_shm_cache_max_object_size_mb": (128,),
        "mm_encoder_only": (False,),
        "mm_encoder_tp_mode": ("weights",),
        "mm_encoder_attn_dtype": (None,),
        "disable_mm_preprocessor_cache": (False, True),
        "disable_chunked_mm_input": (False,),
        "skip_mm_profiling": (False, True),
        "video_pruning_rate": (None, 0),
        "enable_mm_processor_stats": (False,),
        "allowed_local_media_path": ("",),
        "allowed_media_domains": (None,),
    },
    "embedding and other pooling models": {
        "runner": ("auto", "generate"),
        "convert": ("auto", "none"),
        "task": (None, "auto", "generate"),
        "pooler_config": (None,),
        "enable_prompt_embeds": (False,),
        "io_processor_plugin": (None,),
    },
    "models with code of their own": {
        "trust_remote_code": (False,),
        "code_revision": (None,),
        "model_impl": ("auto", "vllm"),
        "hf_config_path": (None,),
        "config_format": ("auto", "hf"),
        "model_loader_extra_config": (None,),
        "ignore_patterns": (None,),
        "override_attention_dtype": (None,),
        "disable_sliding_window": (False,),
        "kv_sharing_fast_prefill": (False,),
        "mamba_backend": ("triton",),
        "mamba_block_size": (None,),
        "mamba_cache_dtype": ("auto",),
        "mamba_cache_mode": ("none",),
        "mamba_ssm_cache_dtype": ("auto",),
    },
    "offloading to host memory": {
        "cpu_offload_gb": (0,),
        "cpu_offload_params": (None,),
        "offload_backend": ("auto",),
        "offload_group_size": (0,),
        "offload_num_in_group": (1,),
        "offload_params": (None,),
        "offload_prefetch_step": (1,),
        "kv_offloading_size": (None,),
        "kv_offloading_backend": ("native",),
        "enable_sleep_mode": (False,),
    },
    "moving a cache or weights between engines": {
        "kv_transfer_config": (None,),
        "kv_events_config": (None,),
        "ec_transfer_config": (None,),
        "weight_transfer_config": (None,),
    },
    "structured outputs and reasoning": {
        "structured_outputs_config": (None,),
        "reasoning_config": (None,),
        "reasoning_parser": (None, ""),
        "reasoning_parser_plugin": (None, ""),
    },
    "this way of scheduling": {
        "max_num_partial_prefills": (1,),
        "max_long_partial_prefills": (1,),
        "performance_mode": ("balanced",),
        "prefill_schedule_interval": (None, 0, 1),
        "scheduler_cls": (None,),
        "scheduler_reserve_full_isl": (True,),
        "stream_interval": (1,),
        "watermark": (0,),
    },
    "tracing and these statistics": {
        "collect_detailed_traces": (None,),
        "enable_log_requests": (False,),
        "enable_logging_iteration_details": (False,),
        "enable_mfu_metrics": (False,),
        "kv_cache_metrics": (False,),
        "kv_cache_metrics_sample": (0.01,),
        "otlp_traces_endpoint": (None,),
        "profiler_config": (None,),
    },
    "plugging code into the engine": {
        "additional_config": (None,),
        "logits_processor_pattern": (None,),
        "logits_processors": (None,),
        "worker_cls": ("auto",),
        "worker_extension_cls": ("",),
    },
    "these server settings": {
        "renderer_num_workers": (1,),
        "shutdown_timeout": (0,),
        "tokens_only": (False,),
    },
}


def same(value: object, neutral: object) -> bool:
    """Whether an option asks for nothing: equal to the neutral value, which as None covers empty containers."""
    if neutral is None:
        return value is None or (isinstance(value, dict | list | tuple | set) and not value)
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    return isinstance(value, str | int | float) and value == neutral


def check_foreign(options: Mapping[str, object]) -> None:
    """Refuse what is not supported; say in one line what has no effect.

    Raises:
        UnsupportedError: a feature that does not exist yet is asked for.
    """
    for feature, names in UNSUPPORTED.items():
        for name in names.keys() & options.keys():
            value, neutral = options[name], names[name]
            if not any(same(value, allowed) for allowed in neutral):
                raise UnsupportedError(
                    f"{name}={shorten(value)} asks for {feature}, which jaxserve does not support yet; "
                    f"leave it out (or at {neutral[0]!r}).",
                    parameter=name,
                    value=value,
                )
    idle = sorted(name for name in NO_EFFECT.keys() & options.keys() if not same(options[name], NO_EFFECT[name]))
    if idle:
        shown = ", ".join(f"{name}={shorten(options[name], 40)}" for name in idle)
        logger.warning("These options have no meaning for XLA programs and are not used: %s", shown)
