"""Engine options: `EngineArgs` (what a caller says) -> `resolve` -> `EngineConfig` (what an engine runs with)."""

from jaxserve.config.args import EngineArgs
from jaxserve.config.engine_config import EMBEDDED_MODEL, EngineConfig, resolve
from jaxserve.config.model_facts import default_sampling_params, load_generation_config, merge_overrides, model_limit
from jaxserve.config.parallel import ParallelConfig

__all__ = [
    "EMBEDDED_MODEL",
    "EngineArgs",
    "EngineConfig",
    "ParallelConfig",
    "default_sampling_params",
    "load_generation_config",
    "merge_overrides",
    "model_limit",
    "resolve",
]
