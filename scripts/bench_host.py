"""Host time of an engine step without a device: schedule, pack, read and commit results, make outputs.

    python scripts/bench_host.py [--output-json benchmarks/results/host_step.json]

The engine is the real one; its runner packs every step as usual, but the "device" answers at once with random tokens.
So what is measured is all that the host does between two launches, except the launch itself. Times are medians over
the steps of one run, in milliseconds of the thread's CPU time; a step of several decodes is also given per decode.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from jaxserve.batch import Bucket, EditRows, Level, Limits, SlotTable, pack
from jaxserve.checkpoints import find_model
from jaxserve.cli.bench import processor
from jaxserve.config import EngineArgs, resolve
from jaxserve.engine.balancer import Plan
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.programs import Buckets
from jaxserve.engine.runner import InFlight, Runner, fitting, programs_of
from jaxserve.engine.setup import Parts
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.text import Detokenizer, Tokenizer, load_tokenizer
from jaxserve.types import Work

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
    "vocab_size": 49152, "max_position_embeddings": 8192, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
NUM_PAGES = 12_000
SEQUENCES = 256
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}


@dataclass(frozen=True)
class Case:
    """One measurement: `SEQUENCES` requests decode, beside them prompts of `prefill` tokens keep coming (0: none)."""

    name: str
    decode_steps: int = 1
    prefill: int = 0
    stream: bool = False  # every token is detokenised and handed out
    sample: bool = False
    stats: bool = True


CASES = (
    Case("decode"),
    Case("decode, no statistics", stats=False),
    Case("decode, sampled", sample=True),
    Case("decode, 8 a dispatch", decode_steps=8),
    Case("decode, 8 a dispatch, sampled", decode_steps=8, sample=True),
    Case("decode, streamed text", stream=True),
    Case("decode beside prefill", prefill=1000),
    Case("decode beside prefill, streamed text", prefill=1000, stream=True),
)


class Clock:
    """Adds up the time of each part of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, with its time added to `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] += time.thread_time() - start

        return call

    def end_step(self) -> None:
        """Close the step that has just run."""
        self.steps.append(dict(self._seconds))
        self._seconds.clear()

    def medians(self) -> dict[str, float]:
        """Milliseconds by part."""
        names = {name for step in self.steps for name in step}
        return {name: round(1e3 * statistics.median(s.get(name, 0.0) for s in self.steps), 3) for name in sorted(names)}


class HostRunner:
    """Stands in for the runner: packs like it, and answers with random tokens."""

    def __init__(self, config: Any) -> None:
        pages_per_seq = -(-config.max_model_len // config.block_size)
        self.plan = SimpleNamespace(num_pages=NUM_PAGES)
        self._limits = Limits(config.max_num_seqs, pages_per_seq, config.block_size, NUM_PAGES, 20)
        self._buckets = Buckets(
            config.max_num_seqs, config.max_num_batched_tokens, config.decode_steps, accelerator=True
        )
        self._table = SlotTable(config.max_num_seqs)
        self._tokens = np.random.default_rng(0).integers(100, 2100, 1 << 20, np.int32)
        self._next = 0

    def launch(self, plan: Plan) -> InFlight:
        """As `Runner.launch`, but nothing runs."""
        bucket, edits = fitting(plan, [self._table], self._buckets)
        parts = programs_of(plan, bucket)
        packed = [cast(jax.Array, self._run(cast(Work, part[0]), bucket, edits[0])) for part in parts]
        return InFlight(plan, replace(bucket, steps=bucket.steps * len(parts)), self._limits, packed)

    def _run(self, work: Work, bucket: Bucket, edits: EditRows) -> np.ndarray:
        pack(work, bucket, self._limits, self._table, edits)
        words = bucket.steps * bucket.seqs
        if bucket.level >= Level.SAMPLE and bucket.steps == 1:
            words += bucket.seqs * (2 + 2 * self._limits.max_logprobs)
        self._next = (self._next + words) % (len(self._tokens) // 2)
        return self._tokens[self._next : self._next + words]


def build(case: Case, tokenizer: Tokenizer | None, clock: Clock) -> LLMEngine:
    """An engine whose parts are timed."""
    args = EngineArgs(decode_steps=case.decode_steps, disable_log_stats=not case.stats, max_num_seqs=SEQUENCES)
    config = resolve(args, HF_CONFIG, {}, "gpu")
    runner = HostRunner(config)
    engine = LLMEngine(Parts(config, tokenizer, cast(Runner, runner)))
    engine.scheduler.schedule = clock.timed("schedule", engine.scheduler.schedule)
    engine.runner.launch = clock.timed("pack", engine.runner.launch)
    engine.scheduler.commit = clock.timed("commit", engine.scheduler.commit)
    engine._outputs.process = clock.timed("outputs", engine._outputs.process)
    engine.step = clock.timed("total", engine.step)
    return engine


def measure(case: Case, tokenizer: Tokenizer | None, steps: int) -> dict[str, Any]:
    """Fill the engine, then time `steps` steps while every slot is busy."""
    clock = Clock()
    engine = build(case, tokenizer, clock)
    rng = np.random.default_rng(1)
    kind = RequestOutputKind.DELTA if case.stream else RequestOutputKind.FINAL_ONLY
    options: dict[str, Any] = SAMPLED if case.sample else {"temperature": 0.0}
    names = iter(range(10**9))

    def add(prompt: int, output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, output_kind=kind, **options)
        ids = rng.integers(100, 40_000, prompt).tolist()
        engine.add_request(str(next(names)), {"prompt_token_ids": ids}, params)

    places = SEQUENCES - 4 if case.prefill else SEQUENCES
    for _ in range(places):
        add(200, 4000)
    while engine.scheduler.num_waiting:
        engine.step()
    for _ in range(10 + steps):
        while case.prefill and engine.scheduler.num_running + engine.scheduler.num_waiting < SEQUENCES:
            add(case.prefill, 1)
        engine.step()
        clock.end_step()
    clock.steps = clock.steps[10:]
    parts = clock.medians()
    return {
        "case": case.name,
        "milliseconds": parts,
        "total_per_decode": round(parts["total"] / case.decode_steps, 3),
    }


def detokenise(tokenizer: Tokenizer, tokens: int, rounds: int) -> dict[str, Any]:
    """The text of `tokens` new tokens of every sequence, alone; it is a part of "outputs" above."""
    rng = np.random.default_rng(2)
    streams = [Detokenizer(tokenizer, [500, 501], SamplingParams()) for _ in range(SEQUENCES)]
    seconds = []
    for _ in range(rounds):
        new = rng.integers(100, 2100, (SEQUENCES, tokens)).tolist()
        start = time.thread_time()
        for stream, ids in zip(streams, new, strict=True):
            stream.update(ids)
            stream.new_text(finished=False)
        seconds.append(time.thread_time() - start)
    name = f"detokenise {tokens} token{'s' if tokens > 1 else ''} of each sequence"
    return {"case": name, "milliseconds": {"total": round(1e3 * statistics.median(seconds), 3)}}


def main() -> None:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each case")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--output-json", help="where to write the results")
    parser.add_argument("--no-tokenizer", action="store_true", help="make no text; needs no embedded model")
    args = parser.parse_args()
    tokenizer = None if args.no_tokenizer else load_tokenizer(find_model(None))
    rows = []
    for case in CASES:
        if args.only is None or args.only in case.name:
            rows.append(measure(case, tokenizer, args.steps))
            print(json.dumps(rows[-1]), flush=True)
    if tokenizer is not None and args.only is None:
        for tokens in (1, 8):
            rows.append(detokenise(tokenizer, tokens, args.steps))
            print(json.dumps(rows[-1]), flush=True)
    if args.output_json:
        facts = {
            "date": datetime.date.today().isoformat(),
            "what": f"host time of one engine step, {SEQUENCES} running sequences, median of {args.steps} steps",
            "cpu": processor(),
            "python": sys.version.split()[0],
            "numpy": importlib.metadata.version("numpy"),
        }
        with open(args.output_json, "w", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
