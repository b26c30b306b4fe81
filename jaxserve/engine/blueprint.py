"""An engine as it is known before any array exists: what `Runner` builds, and what is compiled ahead of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxserve.batch import Bucket, Limits
from jaxserve.checks import require
from jaxserve.config import EngineArgs, EngineConfig
from jaxserve.engine.memory import MemoryPlan, estimate_working, plan_memory
from jaxserve.engine.programs import Buckets
from jaxserve.engine.step import ScoreMode
from jaxserve.engine.step_compiler import StepCompiler
from jaxserve.engine.tracing import ProgramStore, Recipe
from jaxserve.weights import ModelPlan
from pallas_kernels import all_reduce, attention, gated_mlp, kv_write, matmul, rope_kv_write, top_k_top_p

# Of XLA, by platform. Rematerialization counts the donated cache twice, finds the program far over its limit and spends
# most of the compilation on shrinking what needs no shrinking. Tuning Triton's matrix products takes 15 of the 18
# seconds of CPU time of a program's compilation, and cuBLAS's are as fast (docs/decisions.md). Tuning the choice among
# those runs them, with operands of its own, in memory that steps count on when a program compiles beside them.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str | bool]] = MappingProxyType(
    {
        "gpu": {
            "xla_disable_hlo_passes": "rematerialization,hlo-rematerialization",
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_autotune_level": "0",
        }
    }
)

OPS = MappingProxyType(
    {kind.OP.name: kind.OP for kind in (attention, rope_kv_write, kv_write, matmul, gated_mlp, top_k_top_p, all_reduce)}
)
TPU_ROWS = 8  # that a TPU works on at a time
SLOW_BYTES = 6 << 30  # of weights; reading them takes longer than the host needs to launch a step on one accelerator


@dataclass(frozen=True)
class Blueprint:
    """A model on its devices with every size decided.

    Attributes:
        model: on a mesh of devices, which may be abstract as long as nothing is compiled.
        config: of the engine, with the context that the memory plan allows.
        plan: of the memory of each device.
        device: one of the devices, or what stands for them.
        mailboxes: whether devices that share a copy of the model have given one another memory for their sums.
    """

    model: ModelPlan
    config: EngineConfig
    plan: MemoryPlan
    device: Any
    mailboxes: bool = False

    @cached_property
    def limits(self) -> Limits:
        """The sizes no step changes."""
        vocab, most = self.model.model_config.vocab_size, self.config.max_logprobs
        return Limits(
            max_num_seqs=self.config.max_num_seqs,
            pages_per_seq=-(-self.config.max_model_len // self.plan.page_size),
            page_size=self.plan.page_size,
            num_pages=self.plan.num_pages,
            max_logprobs=vocab if most < 0 else min(most, vocab),
        )

    @cached_property
    def recipe(self) -> Recipe:
        """All that decides what its programs are."""
        recipe = Recipe.of(self.model, self.limits, ScoreMode.parse(self.config.logprobs_mode), self.device)
        return replace(recipe, kernels=tuple(self.config.kernels.items()), mailboxes=self.mailboxes)

    def compiler(self, trace: Callable[[Bucket], bytes], store: ProgramStore | None) -> StepCompiler:
        """Makes its programs from what `trace` exports; keeps exported ones in `store` if they have names."""
        return StepCompiler.of(self.recipe, self.model, trace, store, self.compiler_options)

    @property
    def compiler_options(self) -> Mapping[str, str | bool]:
        """Of XLA."""
        return COMPILER_OPTIONS.get(self.device.platform, {})


def cache_dtype(model: ModelPlan) -> np.dtype:
    """Of keys and values."""
    return np.dtype(model.dtype)


def buckets_of(config: EngineConfig) -> Buckets:
    """The step shapes of an engine."""
    return Buckets(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.decode_steps,
        accelerator=config.platform != "cpu",
        smallest=TPU_ROWS if config.platform == "tpu" else 1,
    )


def draft(model: ModelPlan, config: EngineConfig, limit: int | None, working: int | None = None) -> MemoryPlan:
    """The memory plan of a device with `limit` bytes for the engine.

    Args:
        working: bytes that a step needs besides weights and cache; None is an estimate.

    Raises:
        ValueError: no request of `max_model_len` tokens fits; it names the numbers and flags.
    """
    parts = model.mesh.shape["model"]
    dtype = cache_dtype(model)
    if working is None:
        working = estimate_working(model.model_config, buckets_of(config).largest, dtype, config.platform, parts)
    return plan_memory(
        config, model.model_config, limit, weights=model.device_bytes, working=working, dtype=dtype, parts=parts
    )


def settled(config: EngineConfig, args: EngineArgs, model: ModelPlan) -> EngineConfig:
    """The config with what the size of the weights decides, unless the caller did.

    Raises:
        ParameterError: `kernels` names an op or an implementation that does not exist.
    """
    for op, name in config.kernels.items():
        require(op in OPS, "kernels", op, f"name ops among {', '.join(OPS)}")
        choices = ", ".join(OPS[op].table)
        require(name in OPS[op].table, f"kernels[{op!r}]", name, f"be one of {choices}")
    slow = args.decode_steps is None and model.device_bytes > SLOW_BYTES * model.mesh.size
    return replace(config, decode_steps=1) if slow else config
