"""The engine: requests in, one step at a time, outputs out."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, no_type_check

import numpy as np

from jaxserve.config import EngineArgs, EngineConfig
from jaxserve.engine.balancer import Balancer
from jaxserve.engine.metrics import Metric, Metrics
from jaxserve.engine.outputs import OutputProcessor, RequestRecord, needs_host, streams, watched
from jaxserve.engine.pace import Pace
from jaxserve.engine.pages import Pages
from jaxserve.engine.runner import InFlight, Runner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.setup import Parts, build_parts
from jaxserve.inputs import make_request, make_sequences
from jaxserve.sampling_params import SamplingParams
from jaxserve.text import Tokenizer
from jaxserve.types import PromptType, Request, RequestOutput

logger = logging.getLogger(__name__)


def always() -> bool:
    """For callers who take every output at once."""
    return True


class LLMEngine:
    """Continuous batching over one model: add requests, call `step` until none is unfinished.

    `step` plans and launches the next step before it finishes the one before, so the device never waits for the host.
    """

    def __init__(self, parts: Parts):
        self.config: EngineConfig = parts.config
        config = parts.config
        self.tokenizer: Tokenizer | None = parts.tokenizer
        self.runner: Runner = parts.runner
        pages = parts.runner.plan.num_pages
        copies = config.parallel.data_parallel_size
        self.scheduler: Balancer = Balancer([make_scheduler(config, pages) for _ in range(copies)])
        self._metrics = Metrics(config.max_model_len) if config.log_stats else None
        self._outputs = OutputProcessor(parts.tokenizer, self.scheduler, self._metrics)
        self._inflight: InFlight | None = None
        self._pace = Pace(config.decode_steps)
        self._seeds = np.random.default_rng(config.seed)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """Load the model and compile what `warmup` asks for.

        Raises:
            ValueError: an argument, the model's files or the memory do not fit; the message says what to change.
        """
        return cls(build_parts(engine_args))

    @no_type_check  # for annotation checkers: whatever a caller passes gets a message of its own
    def make_request(
        self, request_id: str, prompt: PromptType, params: SamplingParams | None = None, **options: Any
    ) -> Request:
        """Check and tokenise one prompt without queueing it; see `jaxserve.inputs.make_request` for the options."""
        return make_request(request_id, prompt, params, tokenizer=self.tokenizer, config=self.config, **options)

    @no_type_check
    def add_request(
        self,
        request_id: str,
        prompt: PromptType | Request,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        *,
        ready: Callable[[], bool] = always,
    ) -> str:
        """Queue a prompt, or a request made before. Returns its id.

        Where `ready` says that its caller has not taken the outputs so far, tokens wait and come together later.

        Raises:
            TypeError, ValueError: the id is no string or in use, or the prompt or its parameters are invalid.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r} of type {type(request_id).__name__}.")
        if request_id in self._outputs.records:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request; choose another.")
        if isinstance(prompt, Request):
            request = replace(prompt, request_id=request_id)
        else:
            request = self.make_request(
                request_id, prompt, params,
                arrival_time=arrival_time, tokenization_kwargs=tokenization_kwargs, priority=priority,
            )  # fmt: skip
        sequences = make_sequences(
            request,
            eos_ids=self.config.eos_token_ids,
            max_model_len=self.config.max_model_len,
            fallback_seed=int(self._seeds.integers(2**63)),
        )
        now = time.monotonic()
        for sequence in sequences:
            sequence.stats.arrival_time, sequence.stats.queued_ts = request.arrival_time, now
            sequence.needs_host, sequence.streams = needs_host(request), streams(request)
            sequence.watched = watched(request)
            self.scheduler.add(sequence)
        self._outputs.add(request, sequences, ready)
        return request_id

    def abort_request(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """End requests now; unknown and finished ids are ignored. Returns their last outputs."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        records = [self._outputs.records[key] for key in ids if key in self._outputs.records]
        return [output for record in records if (output := self._end(record, "abort"))]

    def _end(self, record: RequestRecord, reason: str, error: str | None = None) -> RequestOutput | None:
        for continuation in record.continuations:
            self.scheduler.finish(continuation.sequence, reason)
        return self._outputs.close(record, error)

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then finish the one launched before; returns what became due."""
        plan = self.scheduler.schedule(self._pace.rules)
        launched = None if plan is None else self.runner.launch(plan)
        previous, self._inflight = self._inflight, launched
        outputs = self._failed()
        if previous is None:
            self._pace.pause()
        else:
            began = time.monotonic()
            finished = list(previous.results())
            waited = time.monotonic() - began
            if self._metrics is not None:
                self._metrics.device_wait_seconds += waited
            bucket = previous.bucket
            self._pace.step(bucket.steps if bucket.decode_only else 0, bucket.tokens, waited)
            for work, results in finished:
                gained = self.scheduler.commit(work, results.tokens)
                outputs += self._outputs.process(work, results, gained)
        return outputs

    def _failed(self) -> list[RequestOutput]:
        """Requests the scheduler had to give up because the pool is too small for them alone."""
        outputs = []
        for sequence in self.scheduler.take_failed():
            record = self._outputs.records.get(sequence.request.request_id)
            if record is not None:
                room = self.runner.plan.cache_tokens
                message = (
                    f"The cache holds {room} tokens, too few for this request's {sequence.num_tokens}; "
                    "raise gpu_memory_utilization or kv_cache_memory_bytes."
                )
                outputs.append(self._end(record, "error", message))
        return [output for output in outputs if output is not None]

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._outputs.records) or self._inflight is not None

    def get_num_unfinished_requests(self) -> int:
        """Requests added and neither finished nor aborted."""
        return len(self._outputs.records)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False (and a warning) while pages are in use."""
        if self.scheduler.reset_prefix_cache():
            return True
        logger.warning("the prefix cache was not reset: %d requests still hold pages", self.scheduler.num_running)
        return False

    def get_metrics(self) -> list[Metric]:
        """A snapshot of the engine's counters, gauges and histograms.

        Raises:
            ValueError: statistics were switched off with `disable_log_stats=True`.
        """
        if self._metrics is None:
            raise ValueError("get_metrics needs statistics; do not set disable_log_stats=True.")
        compiled = self.runner.programs.counts
        gauges = {
            "num_requests_running": self.scheduler.num_running,
            "num_requests_waiting": self.scheduler.num_waiting,
            "kv_cache_usage_perc": self.scheduler.usage,
            "compilation_seconds": compiled.seconds,
        }
        counters = {
            "num_preemptions": self.scheduler.num_preemptions,
            "prefix_cache_queries": self.scheduler.queried_tokens,
            "prefix_cache_hits": self.scheduler.hit_tokens,
            "compilations": compiled.total,
            "compilations_after_warmup": compiled.after_warmup,
        }
        return self._metrics.snapshot(gauges, counters)

    def close(self) -> None:
        """Abort what runs and free the device memory."""
        self.abort_request(list(self._outputs.records))
        self._inflight = None
        self.runner.close()


def make_scheduler(config: EngineConfig, num_pages: int) -> Scheduler:
    """The scheduler of one copy of the model."""
    return Scheduler(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        pages=Pages(num_pages, config.block_size, config.enable_prefix_caching),
        policy=config.scheduling_policy,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        decode_steps=config.decode_steps,
    )
