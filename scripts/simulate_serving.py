"""Scheduler and pace before a device that only takes time: what steps look like, and how many tokens a second come out.

    python scripts/simulate_serving.py --device qwen3-0.6b-h100 --host-ms 3.5 6 9 [--lengths random] [--offline]

Scheduler and pace are the real ones. A step takes a time of its own, one for each token that its program could hold,
and one for each token in the cache that it reads; the host takes `--host-ms` between the results of a step and the next
launch. Callers answer the end of a request with the next one after `--caller-ms`. The devices' figures were fitted to
steps measured on an H100. Nothing is said here of text, sampling or the network.
"""

import argparse
import heapq
import json
import sys
from dataclasses import asdict, dataclass, field

import numpy as np

from jaxserve.engine.pace import Pace
from jaxserve.engine.pages import Pages
from jaxserve.engine.scheduler import Scheduler
from jaxserve.sampling_params import SamplingParams
from jaxserve.types import Request, Sequence, Work

LAUNCH_SECONDS = 0.7e-3  # of the host for each program of a step beyond the first


@dataclass(frozen=True)
class Device:
    """Seconds of a step: `step`, `token` for each that its program holds, `cached` for each token of a context."""

    step: float
    token: float
    cached: float
    decode_steps: int = 8


DEVICES = {
    "qwen3-0.6b-h100": Device(1.8e-3, 3.0e-6, 114_688 / 2.95e12),
    "qwen3-8b-h100": Device(6.2e-3, 2.3e-5, 147_456 / 2.94e12, decode_steps=1),
}


@dataclass(frozen=True)
class Load:
    """Requests and their callers, of whom `streams` wait for an answer at a time; all at once without streams."""

    requests: int = 4096
    streams: int | None = 512
    random_lengths: bool = False
    host_seconds: float = 3.5e-3
    caller_seconds: float = 4e-3

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompts and answers: 256 and 192, or log-normal with means of about 220 and 190, capped."""
        if not self.random_lengths:
            return [(256, 192)] * self.requests
        drawn = np.random.default_rng(0).lognormal([5.0, 4.9], 0.9, (self.requests, 2)).clip(4, 1024)
        return [(int(prompt), int(answer)) for prompt, answer in drawn]


@dataclass
class Clock:
    """The host's time, which the pace reads."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Found:
    """What has been seen so far, in seconds and counts."""

    busy: float = 0.0
    steps: int = 0
    mixed: int = 0
    held: int = 0  # tokens of the programs of mixed steps
    used: int = 0  # those that were computed
    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def report(self, tokens: int, seconds: float) -> dict[str, object]:
        """Rates and quantiles; milliseconds."""

        def quantiles(values: list[float]) -> list[float]:
            return [round(1e3 * float(q), 1) for q in np.quantile(values or [0.0], [0.5, 0.99])]

        return {
            "output tokens per second": round(tokens / seconds),
            "device busy": round(self.busy / seconds, 3),
            "steps": self.steps,
            "with prompts": self.mixed,
            "their programs' fill": round(self.used / max(self.held, 1), 3),
            "gaps ms, median and p99": quantiles(self.gaps),
            "first token ms, median and p99": quantiles(self.first),
        }


def next_power(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (n - 1).bit_length()


class Simulation:
    """One load on one device."""

    def __init__(self, device: Device, load: Load):
        self._device, self._load, self._clock = device, load, Clock()
        self._scheduler = Scheduler(
            max_num_seqs=512, max_num_batched_tokens=16384, max_model_len=8192,
            pages=Pages(40_000, 64, enable_prefix_caching=False), decode_steps=device.decode_steps,
        )  # fmt: skip
        self._pace = Pace(device.decode_steps, self._clock)
        self._lengths = load.lengths()
        self._rest = iter(range(load.requests))
        streams = load.requests if load.streams is None else load.streams
        # Streams arrive one after the other, as connections do.
        between = 0.0 if load.streams is None else 1e-3
        self._arrivals = [(between * n, next(self._rest)) for n in range(min(streams, load.requests))]
        self._seen: dict[Sequence, float] = {}  # when its last token came, or it arrived
        self._idle_from = 0.0  # the device's time
        self._found = Found()

    def run(self) -> dict[str, object]:
        """Until every request has its answer."""
        flying: tuple[Work, float, int, int] | None = None
        ended = 0
        while ended < self._load.requests:
            self._arrive()
            work = self._scheduler.schedule(self._pace.rules)
            flying, before = None if work is None else (work, *self._launch(work)), flying
            if before is not None:
                ended += self._finish(*before)
            else:
                self._pace.pause()
                if work is None:
                    self._clock.now = max(self._clock.now, self._arrivals[0][0])
        return self._found.report(sum(answer for _, answer in self._lengths), self._clock.now)

    def _arrive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self._clock.now:
            arrival, number = heapq.heappop(self._arrivals)
            prompt, answer = self._lengths[number]
            tokens = np.zeros(prompt + answer, np.int32)
            request = Request(str(number), tokens[:prompt], SamplingParams(max_tokens=answer), arrival_time=arrival)
            sequence = Sequence(request, 0, 0, tokens, prompt, prompt, frozenset(), frozenset())
            sequence.needs_host, sequence.streams = False, self._load.streams is not None
            self._scheduler.add(sequence)
            self._seen[sequence] = arrival

    def _launch(self, work: Work) -> tuple[float, int, int]:
        """When it will be done, its decodes (0 with prompts) and the tokens that its program holds."""
        rows, tokens, device, found = len(work.sequences), work.total_tokens, self._device, self._found
        prompts = tokens > rows
        program = max(next_power(tokens), next_power(2 * rows)) if prompts else next_power(rows)
        context = float((work.starts + work.num_tokens).sum())
        seconds = work.steps * (device.step + device.token * program + device.cached * context)
        self._idle_from = max(self._idle_from, self._clock.now) + seconds
        found.busy += seconds
        found.steps += 1
        if prompts:
            found.mixed += 1
            found.held += program
            found.used += tokens
        return self._idle_from, 0 if prompts else work.steps, program

    def _finish(self, work: Work, done: float, decodes: int, program: int) -> int:
        """Wait for a step, do the host's work, and count the requests that end with it."""
        clock, waited = self._clock, max(0.0, done - self._clock.now)
        clock.now += waited
        self._pace.step(decodes, program, waited)
        gained = self._scheduler.commit(work, np.ones((work.steps, len(work.sequences)), np.int64))
        several = 1 < work.steps < self._device.decode_steps
        clock.now += self._load.host_seconds + LAUNCH_SECONDS * (work.steps - 1) * several
        ended = 0
        for sequence in gained:
            first = sequence.num_output <= work.steps
            (self._found.first if first else self._found.gaps).append(clock.now - self._seen[sequence])
            self._seen[sequence] = clock.now
            if sequence.finished:
                ended += 1
                del self._seen[sequence]
                if (number := next(self._rest, None)) is not None:
                    heapq.heappush(self._arrivals, (clock.now + self._load.caller_seconds, number))
        return ended


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default="qwen3-0.6b-h100", help="a model and what runs it")
    parser.add_argument("--lengths", choices=("fixed", "random"), default="fixed", help="256 in and 192 out, or random")
    parser.add_argument("--requests", type=int, default=4096, help="how many there are")
    parser.add_argument("--streams", type=int, default=512, help="how many are waited for at a time")
    parser.add_argument("--offline", action="store_true", help="all at once, and nobody watches the tokens")
    parser.add_argument("--host-ms", type=float, nargs="+", default=[3.5], help="the host's work for a step")
    parser.add_argument("--caller-ms", type=float, default=4.0, help="from an answer to the caller's next request")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """One line of JSON for each time of the host."""
    args = parse(arguments)
    for host in args.host_ms:
        load = Load(
            args.requests, None if args.offline else args.streams, args.lengths == "random", 1e-3 * host,
            1e-3 * args.caller_ms,
        )  # fmt: skip
        found = Simulation(DEVICES[args.device], load).run()
        print(json.dumps({"device": args.device, **asdict(load), **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
