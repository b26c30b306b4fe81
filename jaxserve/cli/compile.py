"""`jaxserve compile`: the programs of an engine ahead of time, for this machine's devices or a TPU slice elsewhere."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jaxserve.cli import flags
from jaxserve.config import EngineArgs
from sharding import launch
from sharding.config import load

DESCRIPTION = """Compile every program of an engine ahead of time, and say whether the model fits.

  jaxserve compile MODEL --target v5e-8 --tensor-parallel-size 8 --plan-only    # will it fit? answers at once
  jaxserve compile MODEL --target v5e-8 --tensor-parallel-size 8                # the TPU compiler's own figures
  jaxserve compile MODEL --out programs                                         # for the devices of this machine

MODEL is a folder, a config.json or a hub id, of which only config.json is fetched; weights are never needed. A TPU
slice need not be there: its compiler (pip install 'jaxserve[tpu]') runs on any x86-64 Linux machine. Estimated rates
are upper bounds worked out from published figures, not measurements. Exit code 1: it does not fit, or fails."""

CHOICES = ("essential", "all", "largest", "decode", "prefill", "greedy")
# What has no meaning without requests, weights or a tokenizer.
SKIPPED = ("model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "chat_template", "tokenizer_revision",
           "load_format", "use_tqdm_on_load", "seed", "served_model_name", "generation_config", "warmup",
           "override_generation_config", "compilation_cache_dir", "disable_log_stats")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, config.json or hub id")
    parser.add_argument("--target", metavar="SLICE", help="TPU slice such as v5e-8; this machine's devices if left out")
    parser.add_argument("--mesh", metavar="FILE", help="mesh config file with the sizes and engine options")
    parser.add_argument("--out", metavar="DIR", help="folder to keep programs in, for --compilation-cache-dir later")
    parser.add_argument("--programs", metavar="|".join(CHOICES), default=["essential"], type=flags.reader(_words),
                        help="which to compile, several with commas: essential (the largest of each kind), greedy "
                        "(plain decodes), a number (decodes of that size) ... (default: essential)")  # fmt: skip
    parser.add_argument("--plan-only", action="store_true", help="only the memory plan; compile nothing")
    parser.add_argument("--jobs", metavar="N", type=flags.reader(int), default=max(1, (os.cpu_count() or 2) // 2),
                        help="programs to compile at the same time (default: half of the cores)")  # fmt: skip
    parser.add_argument("--contexts", metavar="N,...", type=flags.reader(_numbers), default=[1024, 8192, 32768],
                        help="context lengths to estimate decode rates for (default: 1024,8192,32768)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    flags.add_engine_flags(parser, skip=SKIPPED)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in CHOICES and not word.isdigit()]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a number or one of {', '.join(CHOICES)}")
    return words


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Plan, compile and report; returns 1 if the model does not fit."""
    if args.jobs < 1:
        raise flags.UsageError(f"--jobs must be 1 or more, got {args.jobs}")
    options, given = engine_options(args)
    from sharding.topology import Slice

    target = None if args.target is None else Slice.parse(args.target)
    if target is not None:
        launch.set_environment({**target.variables, "JAX_PLATFORMS": "cpu"})  # nothing runs here
        # Its executables can be written, but only a machine with the chips can read them.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
    from jaxserve.cli.compile_job import prepare
    from jaxserve.cli.compile_report import Findings, facts, lines

    found = Findings(prepare(options, target, plan_only=args.plan_only, given=given))
    folder = None if args.out is None else Path(args.out)
    out = sys.stderr if args.json else sys.stdout
    for line in lines(found, args.programs, folder, args.jobs, args.contexts, plan_only=args.plan_only):
        print(line, file=out, flush=True)
    if args.json:
        print(json.dumps(facts(found), indent=2))
    return 1 if found.problems else 0


def engine_options(args: argparse.Namespace) -> tuple[EngineArgs, set[str]]:
    """The engine options of the command line, over those of the mesh file, and which were given.

    Raises:
        MeshConfigError, TypeError, ParameterError: a file or an option that cannot be used.
    """
    given: dict[str, Any] = flags.given(args, flags.ENGINE)
    if args.mesh is not None:
        config = load(args.mesh)
        axes = config.engine_axes
        sizes: dict[str, Any] = {"tensor_parallel_size": axes.model, "data_parallel_size": axes.data}
        known = {name: value for name, value in config.engine.items() if name not in SKIPPED}
        given = sizes | known | given
    return EngineArgs(**(given | {"model": args.model})), set(given)
