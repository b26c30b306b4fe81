"""The OpenAI API behind Ray Serve: replicas with an engine each, and the same routes as `jaxserve serve`."""

from collections.abc import Mapping
from typing import Any, no_type_check

from fastapi import FastAPI
from ray import serve

from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.interpreter import keep_what_is_there, take_short_turns
from jaxserve.ray.config import ServingConfig
from jaxserve.ray.devices import actor_options, claim_devices, find_device
from jaxserve.server.app import make_app
from jaxserve.server.middleware import Keys
from jaxserve.server.observe import EngineMetrics
from jaxserve.server.options import AppOptions, Limits
from jaxserve.server.service import Service

MIB = 1 << 20
NAME = "jaxserve"
DEPLOYMENT = {
    "max_ongoing_requests": 1024,  # of a replica; the engine batches what runs and queues the rest
    "health_check_period_s": 5.0,
    "max_constructor_retry_count": 1,  # an engine that cannot start says why; it would not start the next time either
}


class OpenAIReplica:
    """One engine and the application around it, in a replica of Ray Serve."""

    _engine: AsyncLLMEngine | None = None

    def __init__(self, config: ServingConfig, device: str):
        claim_devices(config, device)
        take_short_turns()
        self._config = config
        self._engine = AsyncLLMEngine.from_engine_args(config.engine_args())
        keep_what_is_there()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve calls this once, after the constructor."""
        config, engine = self._config, self._engine
        assert engine is not None
        limits = Limits(config.max_queue_requests, config.max_queue_tokens, config.request_timeout)
        service = Service(engine, limits, response_role=config.response_role)
        options = AppOptions(
            keys=Keys(config.api_keys),
            admin_keys=Keys(()),
            max_body_bytes=int(config.max_body_mb * MIB),
            strict=config.strict_requests,
            access_log=False,  # Ray Serve has one
            allowed_origins=config.allowed_origins,
        )
        return make_app(service, EngineMetrics(engine, config.metrics_prefix), options)

    async def check_health(self) -> None:
        """Raise `EngineDeadError` when the engine is dead; Ray Serve then starts another replica."""
        assert self._engine is not None
        await self._engine.check_health()

    def __del__(self) -> None:
        """Stop the engine; Ray Serve calls this when the replica ends."""
        if self._engine is not None:
            self._engine.shutdown()


@no_type_check  # for annotation checkers: a file's values are checked by the config
def build_openai_app(config: ServingConfig | Mapping[str, Any]) -> serve.Application:
    """An application for `serve.run`, `serve run` and `serve deploy`.

    Args:
        config: or its fields as a dict, as the `args` of a Serve config file are.

    Raises:
        TypeError, ValueError: a field that does not exist, is of the wrong type or out of bounds.
    """
    config = ServingConfig(**config) if isinstance(config, Mapping) else config
    device = find_device(config.device)
    given = dict(config.deployment_config)
    options = actor_options(config, device) | given.pop("ray_actor_options", {})
    replica = serve.ingress()(OpenAIReplica)
    settings = {"name": NAME, "num_replicas": config.num_replicas, **DEPLOYMENT, **given}
    return serve.deployment(**settings, ray_actor_options=options)(replica).bind(config, device)
