"""`jaxserve bench serve`: a load of random requests on a running server."""

import argparse
import asyncio
import datetime
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench import serving
from jaxserve.bench.load import DISTRIBUTIONS, Lengths, Request, ServerError, arrival_times, make_requests
from jaxserve.bench.workload import LARGEST_TOKEN_ID
from jaxserve.checks import ParameterError, require
from jaxserve.cli import flags
from jaxserve.cli.bench import check_plotting, write_json
from jaxserve.config.options import parse_object
from jaxserve.interpreter import keep_what_is_there
from jaxserve.version import __version__

DESCRIPTION = """Send random requests to a server with OpenAI's API and report throughput and latency.

Works with any such server that streams. Requests arrive at random times at a mean rate; lengths and prompts are random
too, the same for the same --seed. Times are as seen from here: a request's clock starts when it is sent."""

# The options that results hold: what decides the figures, and nothing that could be a secret.
SAVED = ("endpoint", "timeout", "num_prompts", "request_rate", "burstiness", "max_concurrency", "warmups", "seed",
         "input_len", "output_len", "lengths", "length_sigma", "random_range_ratio", "max_total_len", "vocab_size",
         "ignore_eos", "temperature", "extra_body", "percentiles")  # fmt: skip
CHAT_TEMPLATE_TOKENS = 64  # room for what a chat template adds to a prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser.add_argument_group("server"))
    add_load(parser.add_argument_group("load"))
    add_requests(parser.add_argument_group("requests"))
    result = parser.add_argument_group("results")
    help = "percentiles to report (default: 90,95,99)"
    result.add_argument(
        "--percentiles", type=flags.reader(_percentiles), default=[90.0, 95.0, 99.0], metavar="X,...", help=help
    )
    result.add_argument("--output", metavar="FILE", help="write everything as JSON; - is standard output")
    result.add_argument("--details", action="store_true", help="every request's times too, in the JSON")
    result.add_argument("--plot", metavar="FILE", help="draw the distributions (.png, .svg or .pdf)")


def add_server(group: Any) -> None:
    local = "http://127.0.0.1:8000"
    group.add_argument("--base-url", default=local, metavar="URL", help=f"where it listens (default: {local})")
    group.add_argument("--model", metavar="NAME", help="the model's name there (default: the first it lists)")
    group.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    help = "completions sends token ids, chat sends words (default: completions)"
    names = list(serving.ENDPOINTS)
    group.add_argument("--endpoint", choices=names, default=names[0], metavar="|".join(names), help=help)
    help = "seconds for one request, connecting included (default: 600)"
    group.add_argument("--timeout", type=flags.reader(float), default=600.0, metavar="X", help=help)


def add_load(group: Any) -> None:
    whole, real = flags.reader(int), flags.reader(float)
    group.add_argument("--num-prompts", type=whole, default=100, metavar="N", help="requests (default: 100)")
    help = "requests per second, or inf for all at once (default: inf)"
    group.add_argument("--request-rate", type=real, default=math.inf, metavar="X|inf", help=help)
    help = "1 makes arrivals a Poisson process, less bursts, more regular (default: 1)"
    group.add_argument("--burstiness", type=real, default=1.0, metavar="X", help=help)
    help = "most requests in flight; more wait here (default: no limit)"
    group.add_argument("--max-concurrency", type=whole, metavar="N", help=help)
    help = "requests answered before the clock starts (default: 1)"
    group.add_argument("--warmups", type=whole, default=1, metavar="N", help=help)
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="of arrivals, lengths, prompts (default: 0)")


def add_requests(group: Any) -> None:
    whole, real = flags.reader(int), flags.reader(float)
    group.add_argument("--input-len", type=whole, default=220, metavar="N", help="mean prompt tokens (default: 220)")
    group.add_argument("--output-len", type=whole, default=190, metavar="N", help="mean output limit (default: 190)")
    help = f"how both spread; {DISTRIBUTIONS[0]} is like real conversations (default: {DISTRIBUTIONS[0]})"
    group.add_argument("--lengths", choices=DISTRIBUTIONS, metavar="|".join(DISTRIBUTIONS), help=help)
    help = "width of lognormal, the deviation of the logarithm (default: 1, about ShareGPT's)"
    group.add_argument("--length-sigma", type=real, default=1.0, metavar="X", help=help)
    help = "uniform lengths within this share of the means, 0 <= X < 1"
    group.add_argument("--random-range-ratio", type=real, metavar="X", help=help)
    help = "most tokens of prompt and output together; longer pairs are drawn anew (default: 4 times the means)"
    group.add_argument("--max-total-len", type=whole, metavar="N", help=help)
    help = f"prompt token ids are below it (default: {LARGEST_TOKEN_ID})"
    group.add_argument("--vocab-size", type=whole, default=LARGEST_TOKEN_ID, metavar="N", help=help)
    group.add_argument("--ignore-eos", action="store_true", help="always generate the whole output (vLLM's option)")
    group.add_argument("--temperature", type=real, default=0.0, metavar="X", help="default: 0, greedy")
    help = "more fields of every request, such as '{\"top_p\": 0.9}'; they override all others"
    group.add_argument("--extra-body", type=flags.reader(parse_object), default={}, metavar="JSON", help=help)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files. 1 if no request succeeded, 130 after an interruption."""
    check(args)
    asked = serving.Target(base_url(args.base_url), args.endpoint, args.model or "", args.api_key, args.timeout)
    spread = distribution(args)
    lengths = spread.draw(generator(args, 2), args.num_prompts)
    times = arrival_times(generator(args, 3), args.num_prompts, args.request_rate, args.burstiness)
    server = serving.ask_server(asked)
    target = replace(asked, model=args.model or server.model or "")
    if not target.model:
        raise ParameterError(f"{target.shown} lists no model at /v1/models; name one with --model.")
    check_context(lengths, server.max_model_len, CHAT_TEMPLATE_TOKENS if args.endpoint == "chat" else 0)
    warm = list(itertools.islice(itertools.cycle(lengths), args.warmups))
    warm_up(target, requests(args, target.model, warm, stream=1), args.max_concurrency)
    record, interrupted = measure(args, target, requests(args, target.model, lengths, stream=0), times)
    found = about(args, spread, target, server) | serving.report(record, args.num_prompts, args.percentiles)
    print(table(found), file=sys.stderr if args.output == "-" else sys.stdout, flush=True)
    if args.output is not None:
        answers = {"answers": [serving.details(answer) for answer in record.answers]} if args.details else {}
        write_json(args.output, found | answers)
    if args.plot is not None:
        serving.plot(record.answers, headline(found), args.plot)
    return 130 if interrupted else 0 if found["successful"] else 1


def check(args: argparse.Namespace) -> None:
    """Say before the run what is wrong with the command line.

    Raises:
        ParameterError: a value is out of its range, or a file cannot be written there.
        ImportError: matplotlib is missing.
    """
    require(args.num_prompts >= 1, "--num-prompts", args.num_prompts, "be 1 or more")
    require(args.warmups >= 0, "--warmups", args.warmups, "be 0 or more")
    require(args.seed >= 0, "--seed", args.seed, "be 0 or more")
    if args.max_concurrency is not None:
        require(args.max_concurrency >= 1, "--max-concurrency", args.max_concurrency, "be 1 or more")
    if args.random_range_ratio is not None and args.lengths not in (None, "uniform"):
        raise ParameterError(f"--random-range-ratio is for --lengths uniform, got --lengths {args.lengths}.")
    for flag, file in (("--output", args.output), ("--plot", args.plot)):
        if file not in (None, "-"):
            require(Path(file).absolute().parent.is_dir(), flag, file, "be in a folder that exists")
    if args.plot is not None:
        check_plotting()


def base_url(text: str) -> str:
    """The address without what clients of this API like to add."""
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def distribution(args: argparse.Namespace) -> Lengths:
    """How long requests are; a ratio alone asks for uniform lengths."""
    uniform = "uniform" if args.random_range_ratio is not None else DISTRIBUTIONS[0]
    ratio = 0.5 if args.random_range_ratio is None else args.random_range_ratio
    spread = (args.lengths or uniform, args.length_sigma, ratio, args.max_total_len)
    return Lengths(args.input_len, args.output_len, *spread)


def generator(args: argparse.Namespace, stream: int) -> np.random.Generator:
    """Random numbers for one purpose, so that a change of one does not change the others."""
    return np.random.default_rng([args.seed, stream])


def requests(args: argparse.Namespace, model: str, lengths: Sequence[tuple[int, int]], *, stream: int) -> list[Request]:
    """Requests of these lengths with the fields that the command line asks for."""
    fields = {"model": model, "temperature": args.temperature}
    fields |= ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body
    rng = generator(args, stream)
    return make_requests(rng, lengths, endpoint=args.endpoint, vocab_size=args.vocab_size, fields=fields)


def check_context(lengths: Sequence[tuple[int, int]], context: int | None, extra: int) -> None:
    """Say before the run that a request does not fit the server's context.

    Raises:
        ParameterError: the longest one does not.
    """
    longest = max(map(sum, lengths)) + extra
    if context is not None and longest > context:
        rule = f"fit the server's context of {context} tokens; use --max-total-len {context - extra} or shorter lengths"
        raise ParameterError(f"the longest request (prompt and output) must {rule}; it has {longest}.")


def warm_up(target: serving.Target, some: Sequence[Request], limit: int | None) -> None:
    """Send requests that are not counted.

    Raises:
        ServerError: one failed, so that the run would be of no use.
    """
    record = serving.Record()
    asyncio.run(serving.run(target, some, [0.0] * len(some), limit, record))
    for answer in record.answers:
        if answer.error is not None:
            raise ServerError(f"a warm-up request failed: {answer.error}")


def measure(
    args: argparse.Namespace, target: serving.Target, some: Sequence[Request], times: Sequence[float]
) -> tuple[serving.Record, bool]:
    """The run, and whether Ctrl-C ended it."""
    record = serving.Record()
    keep_what_is_there()  # a pause of this process would be taken for the server's
    with tqdm(total=len(some), unit=" requests", smoothing=0.1, disable=None) as bar:
        try:
            asyncio.run(serving.run(target, some, times, args.max_concurrency, record, lambda _: bar.update()))
        except KeyboardInterrupt:
            return record, True
    return record, False


def about(args: argparse.Namespace, spread: Lengths, target: serving.Target, server: serving.Server) -> dict[str, Any]:
    """What was measured, and how."""
    shown = {name: vars(args)[name] for name in SAVED}
    rate = "inf" if math.isinf(args.request_rate) else args.request_rate  # JSON has no infinity
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "server": {"url": target.shown, "owner": server.owner, "max_model_len": server.max_model_len},
        "model": target.model,
        "arguments": shown | {"request_rate": rate, "lengths": spread.distribution, "max_total_len": spread.most},
    }


def headline(found: dict[str, Any]) -> str:
    """What was measured, in one line."""
    args = found["arguments"]
    rate = "at once" if args["request_rate"] == "inf" else f"at {args['request_rate']:g}/s"
    limit = "" if args["max_concurrency"] is None else f", {args['max_concurrency']} in flight"
    url = found["server"]["url"]
    return f"{found['model']} at {url}, {args['endpoint']}: {args['num_prompts']} requests {rate}{limit}"


ROWS = {
    "successful": "successful requests",
    "failed": "failed requests",
    "unfinished": "unfinished requests",
    "seconds": "duration, s",
    "most_in_flight": "most requests in flight",
    "input_tokens": "input tokens",
    "output_tokens": "output tokens",
    "requests_per_second": "requests/s",
    "input_tokens_per_second": "input tokens/s",
    "output_tokens_per_second": "output tokens/s",
    "total_tokens_per_second": "total tokens/s",
    "tokens_per_event": "tokens per event",
}


def table(found: dict[str, Any]) -> str:
    """The figures as text, the commonest errors below them."""
    lines = [headline(found)]
    for name, title in ROWS.items():
        if found[name] is not None:
            number = f"{found[name]:.2f}" if isinstance(found[name], float) else str(found[name])
            lines.append(f"{title:<24}{number:>12}")
    lines += ["", f"{'ms':<24}" + "".join(f"{column:>10}" for column in found["latency_ms"])]
    titles = {name: title for name, (title, _) in serving.METRICS.items()} | {"sent_late_ms": "sent late"}
    for name, title in titles.items():
        cells = ["-" if value is None else f"{value:.1f}" for value in found[name].values()]
        lines.append(f"{title:<24}" + "".join(f"{cell:>10}" for cell in cells))
    if found["without_usage"]:
        lines += ["", f"{found['without_usage']} answers without usage: each of their events was counted as a token"]
    if found["errors"]:
        lines += ["", *(f"failed {error['count']}x: {error['message']}" for error in found["errors"])]
    return "\n".join(lines)


def _percentiles(text: str) -> list[float]:
    shares = [float(part) for part in text.split(",")]
    if not all(0 < share < 100 for share in shares):
        raise ParameterError(f"percentiles must be above 0 and below 100, got {text}")
    return shares
