"""What a caller says about engines in Ray actors, under the names that `ray.data.llm` and `ray.serve` have for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, no_type_check

from jaxserve.checks import check_bool, check_choice, check_float, check_int, check_strings, require, shorten
from jaxserve.config import EngineArgs
from jaxserve.sampling_params import SamplingParams

DEVICES = ("auto", "gpu", "tpu", "cpu")


@no_type_check  # for annotation checkers: every field is checked when it is set up, with a message of its own
@dataclass(frozen=True, kw_only=True)
class EngineActorConfig:
    """An engine in a Ray actor, and what the actor is given.

    Attributes:
        model_source: a folder, a GGUF file or a hub id that every node can read; None is the embedded model.
        engine_kwargs: fields of `EngineArgs`. An actor gets `tensor_parallel_size` x `data_parallel_size` devices.
        device: "gpu", "tpu" or "cpu"; "auto" is the first of them that the cluster has now.
        accelerator_type: Ray's name of a kind of accelerator, such as "H100".
        num_cpus: that Ray sets aside for the actor. On CPU it is also how many threads the engine computes with, if it
            is given; left out it is 1 for Ray and the engine uses all cores of the machine.
        runtime_env: of the actors, as Ray takes it.
    """

    model_source: str | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    accelerator_type: str | None = None
    num_cpus: float | None = None
    runtime_env: Mapping[str, Any] | None = None

    def engine_args(self) -> EngineArgs:
        """The engine's options, checked as far as that goes without the model.

        Raises:
            TypeError, ValueError: an unknown option, or a value that cannot be; the message names it.
        """
        return EngineArgs(self.model_source, **{"use_tqdm_on_load": False, **self.engine_kwargs})

    @property
    def num_devices(self) -> int:
        """Devices of one actor."""
        args = self.engine_args()
        return args.tensor_parallel_size * args.data_parallel_size


@no_type_check
@dataclass(frozen=True, kw_only=True)
class EngineProcessorConfig(EngineActorConfig):
    """A pool of engine actors for Ray Data.

    Attributes:
        batch_size: rows of a batch, which is also what is done again after an actor was lost.
        max_concurrent_batches: that an actor works on at the same time, so that it never runs empty between them.
        concurrency: number of actors; (m, n) lets Ray start m and add up to n.
        sampling_params: for every row; a row's own column `sampling_params` counts more.
        chat_template_kwargs: for the chat template of rows with `messages`; a row's own column counts more.
        should_continue_on_error: a row that cannot be answered says why in its column `__inference_error__`; False ends
            the run with the first such row's error.
        max_restarts: of each actor after its process died; -1 is no limit.
        max_task_retries: of each batch after its actor died; -1 is no limit.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of bounds; the message names field and value.
    """

    batch_size: int = 32
    max_concurrent_batches: int = 8
    concurrency: int | tuple[int, int] = 1
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    should_continue_on_error: bool = True
    max_restarts: int = 8
    max_task_retries: int = 4

    def __post_init__(self) -> None:
        _check_actor(self)
        for name, low in (("batch_size", 1), ("max_concurrent_batches", 1), ("max_restarts", -1),
                          ("max_task_retries", -1)):  # fmt: skip
            require(check_int(name, getattr(self, name)) >= low, name, getattr(self, name), f"be {low} or more")
        check_bool("should_continue_on_error", self.should_continue_on_error)
        for name in ("sampling_params", "chat_template_kwargs"):
            _check_mapping(name, getattr(self, name))
        SamplingParams.from_optional(**self.sampling_params)
        low, high = self.pool
        require(1 <= low <= high, "concurrency", self.concurrency, "be 1 or more, or (least, most) in this order")

    @property
    def pool(self) -> tuple[int, int]:
        """The least and the greatest number of actors."""
        given = self.concurrency
        if not isinstance(given, tuple | list):
            return check_int("concurrency", given), given
        require(len(given) == 2, "concurrency", given, "be a number or (least, most)")
        return check_int("concurrency[0]", given[0]), check_int("concurrency[1]", given[1])


@no_type_check
@dataclass(frozen=True, kw_only=True)
class ServingConfig(EngineActorConfig):
    """The OpenAI API over replicas of an engine in Ray Serve.

    Attributes:
        num_replicas: engines, each with devices of its own; "auto" with `deployment_config["autoscaling_config"]`.
        deployment_config: further options of `ray.serve.deployment`, such as `max_ongoing_requests`.
        api_keys: of callers; none lets everybody in.
        allowed_origins: web sites whose pages may call this (CORS).
        max_queue_requests, max_queue_tokens: of each replica; what is more is refused with 429. None is no limit.
        request_timeout: seconds until a request ends with 504; None is no limit.
        max_body_mb: larger bodies are refused, MiB.
        strict_requests: refuse unknown fields instead of naming them in the header `X-Ignored-Fields`.
        response_role: of chat answers.
        metrics_prefix: of the Prometheus names in /metrics.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of bounds; the message names field and value.
    """

    num_replicas: int | str = 1
    deployment_config: Mapping[str, Any] = field(default_factory=dict)
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue_requests: int | None = None
    max_queue_tokens: int | None = None
    request_timeout: float | None = None
    max_body_mb: float = 32.0
    strict_requests: bool = False
    response_role: str = "assistant"
    metrics_prefix: str = "jaxserve"

    def __post_init__(self) -> None:
        _check_actor(self)
        _check_mapping("deployment_config", self.deployment_config)
        if self.num_replicas != "auto":
            rule = "be 1 or more, or 'auto'"
            require(check_int("num_replicas", self.num_replicas) >= 1, "num_replicas", self.num_replicas, rule)
        for name in ("api_keys", "allowed_origins"):
            check_strings(name, getattr(self, name))
        for name in ("max_queue_requests", "max_queue_tokens"):
            value = getattr(self, name)
            require(value is None or check_int(name, value) >= 1, name, value, "be 1 or more, or None for no limit")
        for name in ("request_timeout", "max_body_mb"):
            value = getattr(self, name)
            require(value is None or check_float(name, value) > 0, name, value, "be above 0")
        check_bool("strict_requests", self.strict_requests)


@no_type_check
def _check_actor(config: EngineActorConfig) -> None:
    check_choice("device", config.device, DEVICES)
    if config.num_cpus is not None:
        require(check_float("num_cpus", config.num_cpus) >= 0, "num_cpus", config.num_cpus, "be 0 or more")
    _check_mapping("engine_kwargs", config.engine_kwargs)
    rule = "not hold 'model'; name the model in model_source"
    require("model" not in config.engine_kwargs, "engine_kwargs", config.engine_kwargs, rule)
    config.engine_args()


@no_type_check
def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {shorten(value)} of type {type(value).__name__}.")
