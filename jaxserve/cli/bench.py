"""`jaxserve bench offline`: throughput and latency on random prompts."""

import argparse
import datetime
import importlib.util
import json
import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jaxserve.bench.workload import Workload
from jaxserve.checks import ParameterError
from jaxserve.cli import flags
from jaxserve.sampling_params import SamplingParams
from jaxserve.version import __version__

if TYPE_CHECKING:
    from jaxserve.engine.engine import LLMEngine

DESCRIPTION = """Run random prompts at several batch sizes and print a table.

Every request generates exactly its output length (the end of sequence is ignored). Prompts differ from each other, and
the prefix cache is emptied before each run. One run of each size is not timed; the fastest of --repeat runs counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("workload")
    number = flags.reader(int)
    load.add_argument(
        "--batch-sizes",
        type=flags.reader(_sizes),
        default=[1, 2, 4, 8],
        metavar="N,...",
        help="requests kept in flight, one run for each (default: 1,2,4,8)",
    )
    load.add_argument("--num-prompts", type=number, metavar="N", help="requests per run (default: the batch size)")
    load.add_argument("--input-len", type=number, default=64, metavar="N", help="prompt tokens (default: 64)")
    load.add_argument("--output-len", type=number, default=64, metavar="N", help="generated tokens (default: 64)")
    load.add_argument(
        "--random-range-ratio",
        type=flags.reader(float),
        default=0.0,
        metavar="X",
        help="spread both lengths uniformly by this share, 0 <= X < 1 (default: 0)",
    )
    load.add_argument("--repeat", type=number, default=1, metavar="N", help="timed runs of each size (default: 1)")
    load.add_argument("--temperature", type=flags.reader(float), default=0.0, metavar="X", help="default: 0, greedy")
    result = parser.add_argument_group("results")
    result.add_argument("--output-json", metavar="FILE", help="write everything as JSON; - is standard output")
    result.add_argument("--plot", metavar="FILE", help="draw throughput against batch size (.png, .svg or .pdf)")
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files."""
    if args.repeat < 1:
        raise ParameterError(f"--repeat must be 1 or more, got {args.repeat}.")
    quiet = {} if sys.stderr.isatty() else {"use_tqdm_on_load": False}
    # No warm-up: the run that is not timed compiles what is needed, and nothing compiles beside the timed ones.
    fixed = {"max_num_seqs": max(args.batch_sizes), "skip_tokenizer_init": True, "warmup": "none"}
    engine_args = flags.engine_args(args, **(fixed | quiet))
    seed = engine_args.seed
    workload = Workload(args.input_len, args.output_len, args.random_range_ratio, args.num_prompts, seed)
    sampling = SamplingParams(temperature=args.temperature, detokenize=False)
    if args.plot is not None:
        check_plotting()
    from jaxserve.bench import offline, plot
    from jaxserve.engine.engine import LLMEngine

    table = sys.stderr if args.output_json == "-" else sys.stdout
    engine = LLMEngine.from_engine_args(engine_args)
    try:
        about = facts(engine)
        print(f"{about['model']}, {about['dtype']}, {about['device']}", file=table)
        print(offline.table_header(), file=table, flush=True)
        results = []
        for size in args.batch_sizes:
            results.append(offline.run(engine, workload, size, repeat=args.repeat, sampling=sampling))
            print(offline.table_row(results[-1]), file=table, flush=True)
    finally:
        engine.close()
    if late := sum(result.compilations_after_warmup for result in results):
        print(f"warning: {late} programs were compiled during timed runs, whose times include that", file=sys.stderr)
    if args.output_json is not None:
        write_json(args.output_json, offline.report(workload, results, about))
    if args.plot is not None:
        plot.plot(results, f"{about['model']}, {about['dtype']}, {about['device']}", args.plot)
    return 0


def check_plotting() -> None:
    """Say before the run that the picture cannot be drawn.

    Raises:
        ImportError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--plot needs matplotlib; run: pip install "jaxserve[plot]"')


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ParameterError(f"batch sizes must be 1 or more, got {text}")
    return sizes


def facts(engine: "LLMEngine") -> dict[str, Any]:
    """What the numbers were measured on and with."""
    import jax

    config, device = engine.config, jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else processor()
    return {
        "date": datetime.date.today().isoformat(),
        "model": config.served_model_names[0],
        "dtype": config.dtype,
        "device": f"{kind} ({device.platform}, {platform.machine()})",
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "versions": {"jaxserve": __version__} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "CPU"


def write_json(target: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
