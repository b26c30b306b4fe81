"""Throughput and latency of the engine on random prompts, at several numbers of requests in flight."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxserve.bench.workload import LARGEST_TOKEN_ID, Workload
from jaxserve.checks import require
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.metrics import Counter
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.types import RequestOutput, TokensPrompt


@dataclass(frozen=True)
class Result:
    """One run: `batch_size` requests in flight until all `num_prompts` were done. Times are in seconds.

    `compilations_after_warmup` counts programs compiled during the timed runs; above zero the times include pauses.
    """

    batch_size: int
    num_prompts: int
    input_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    time_to_first_token_median: float
    time_to_first_token_p99: float
    time_per_output_token_median: float
    compilations_after_warmup: int = 0


def run(engine: LLMEngine, workload: Workload, batch_size: int, *, repeat: int, sampling: SamplingParams) -> Result:
    """The fastest of `repeat` runs after one that is not timed; the prefix cache is emptied before each.

    Raises:
        ParameterError: the longest request does not fit the engine's context.
    """
    limit = engine.config.max_model_len
    rule = f"fit max_model_len ({limit}) with the longest prompt and output; shorten them or raise max_model_len"
    require(workload.longest <= limit, "the workload", workload.longest, rule)
    results, compiled = [], 0
    for _ in range(repeat + 1):
        engine.reset_prefix_cache()
        results.append(run_once(engine, workload, batch_size, sampling))
        if len(results) == 1:
            compiled = count(engine, "compilations")
    best = min(results[1:], key=lambda result: result.seconds)
    return replace(best, compilations_after_warmup=count(engine, "compilations") - compiled)


def run_once(engine: LLMEngine, workload: Workload, batch_size: int, sampling: SamplingParams) -> Result:
    """Run the workload with at most `batch_size` requests in flight."""
    vocab_size = LARGEST_TOKEN_ID if engine.tokenizer is None else engine.tokenizer.vocab_size
    requests = workload.requests(workload.num_prompts or batch_size, vocab_size)
    start = time.perf_counter()
    outputs = list(drive(engine, requests, batch_size, sampling))
    seconds = time.perf_counter() - start
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    given = sum(len(output.prompt_token_ids) for output in outputs)
    stats = [output.metrics for output in outputs if output.metrics is not None]
    first = sorted(one.first_token_latency for one in stats)
    gaps = sorted(
        (one.last_token_ts - one.first_token_ts) / (one.num_generation_tokens - 1)
        for one in stats
        if one.num_generation_tokens > 1
    )
    return Result(
        batch_size=batch_size,
        num_prompts=len(requests),
        input_tokens=given,
        output_tokens=generated,
        seconds=seconds,
        output_tokens_per_second=generated / seconds,
        total_tokens_per_second=(given + generated) / seconds,
        time_to_first_token_median=quantile(first, 0.5),
        time_to_first_token_p99=quantile(first, 0.99),
        time_per_output_token_median=quantile(gaps, 0.5),
    )


def drive(
    engine: LLMEngine, requests: list[tuple[TokensPrompt, int]], batch_size: int, sampling: SamplingParams
) -> Iterator[RequestOutput]:
    """Keep `batch_size` requests in flight; yields the final outputs.

    Raises:
        RuntimeError: a request failed, which would spoil the measurement.
    """
    waiting = iter(enumerate(requests))

    def add() -> None:
        for number, (prompt, length) in waiting:
            fixed = {"max_tokens": length, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
            engine.add_request(f"bench-{number}", prompt, replace(sampling, **fixed))
            return

    for _ in range(batch_size):
        add()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            add()
            yield output


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of sorted values lie; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def count(engine: LLMEngine, name: str) -> int:
    """A counter of the engine."""
    found = [metric for metric in engine.get_metrics() if metric.name.endswith(f":{name}")]
    return int(sum(metric.value for metric in found if isinstance(metric, Counter)))


COLUMNS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("batch", lambda r: str(r.batch_size)),
    ("requests", lambda r: str(r.num_prompts)),
    ("seconds", lambda r: f"{r.seconds:.2f}"),
    ("output tok/s", lambda r: f"{r.output_tokens_per_second:.1f}"),
    ("total tok/s", lambda r: f"{r.total_tokens_per_second:.1f}"),
    ("first token ms", lambda r: f"{1e3 * r.time_to_first_token_median:.0f}"),
    ("p99 ms", lambda r: f"{1e3 * r.time_to_first_token_p99:.0f}"),
    ("per token ms", lambda r: f"{1e3 * r.time_per_output_token_median:.1f}"),
    ("compiled", lambda r: str(r.compilations_after_warmup)),
)


def table_header() -> str:
    """Titles of the columns of `table_row`."""
    return "  ".join(title for title, _ in COLUMNS)


def table_row(result: Result) -> str:
    """One line of the table."""
    return "  ".join(f"{cell(result):>{len(title)}}" for title, cell in COLUMNS)


def report(workload: Workload, results: list[Result], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values: `facts` about model, device and versions, the workload and the results."""
    late = sum(result.compilations_after_warmup for result in results)
    rounded = [{key: round(value, 6) for key, value in asdict(result).items()} for result in results]
    return {**facts, "workload": asdict(workload), "compilations_after_warmup": late, "results": rounded}
