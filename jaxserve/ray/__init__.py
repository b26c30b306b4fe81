"""Engines in Ray actors: batch inference over Ray Data and the OpenAI API behind Ray Serve. Needs the extra `ray`."""

try:
    import ray.data
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError(f"jaxserve.ray needs Ray ({error}): pip install 'jaxserve[ray]'") from error

from jaxserve.ray.config import EngineProcessorConfig, ServingConfig
from jaxserve.ray.processor import Processor, build_processor
from jaxserve.ray.serving import build_openai_app

__all__ = ["EngineProcessorConfig", "Processor", "ServingConfig", "build_openai_app", "build_processor"]
