"""jaxserve: a functional JAX engine for LLM inference and serving on CPUs, NVIDIA GPUs and TPUs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxserve.version import __version__ as __version__

if TYPE_CHECKING:
    from jaxserve.config import EngineArgs, ParallelConfig
    from jaxserve.engine.async_engine import AsyncLLMEngine
    from jaxserve.engine.engine import LLMEngine
    from jaxserve.engine.errors import EngineDeadError
    from jaxserve.llm import LLM
    from jaxserve.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams, StructuredOutputsParams
    from jaxserve.types import (
        CompletionOutput,
        Logprob,
        PromptType,
        RequestOutput,
        TextPrompt,
        TokensPrompt,
    )


# Public name -> module; loaded on first use, so that `import jaxserve` alone does not start jax.
_MODULES = {
    "LLM": "jaxserve.llm",
    "LLMEngine": "jaxserve.engine.engine",
    "AsyncLLMEngine": "jaxserve.engine.async_engine",
    "EngineDeadError": "jaxserve.engine.errors",
    "EngineArgs": "jaxserve.config",
    "ParallelConfig": "jaxserve.config",
    "SamplingParams": "jaxserve.sampling_params",
    "BeamSearchParams": "jaxserve.sampling_params",
    "RequestOutputKind": "jaxserve.sampling_params",
    "StructuredOutputsParams": "jaxserve.sampling_params",
    "PromptType": "jaxserve.types",
    "TextPrompt": "jaxserve.types",
    "TokensPrompt": "jaxserve.types",
    "RequestOutput": "jaxserve.types",
    "CompletionOutput": "jaxserve.types",
    "Logprob": "jaxserve.types",
}

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "EngineDeadError",
    "LLMEngine",
    "Logprob",
    "ParallelConfig",
    "PromptType",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
