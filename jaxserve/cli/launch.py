"""`jaxserve launch`: run a command or script on the devices, processes and hosts of a mesh config."""

import argparse
import contextlib
import os
import runpy
import secrets
import signal
import sys
import traceback

from jaxserve.cli import flags, report
from jaxserve.cli.jobs import LAUNCHABLE, Job, command_of, local_ranks, rank_variables, read_job
from sharding import launch, processes
from sharding.config import MeshConfig, load
from sharding.launch import Rank

DESCRIPTION = """Run a jaxserve command or a Python script on all devices that a mesh config names.

  jaxserve launch --mesh mesh.yaml -- serve MODEL --port 8000
  jaxserve launch --mesh mesh.yaml -- generate --model MODEL "Hello"
  jaxserve launch --mesh mesh.yaml -- script.py ARGUMENTS

On one machine it starts the processes itself: their lines begin with [rank N], and when one fails all end and its
error is shown last. Under SLURM, Open MPI, Kubernetes (JobSet, LeaderWorkerSet), torchrun or on a TPU pod it joins as
the rank that the environment gives; without any of them, start it on each host with --node-rank. Commands get the
sizes of the mesh as --tensor-parallel-size and --data-parallel-size and the engine options of the file as flags;
scripts find them in jaxserve.distributed.engine_options(). docs/distributed.md describes the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "jaxserve launch [OPTIONS] --mesh FILE -- COMMAND ..."
    parser.add_argument("command", nargs="*", metavar="COMMAND", help=f"{', '.join(LAUNCHABLE)}, or a file.py")
    parser.add_argument("--mesh", required=True, metavar="FILE", help="YAML file with axes, processes and options")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would run where and how each parameter is split; start nothing")  # fmt: skip
    parser.add_argument("--node-rank", type=int, metavar="N",
                        help="number of this host, from 0, where no scheduler tells it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the plan, be one rank, or start the ranks of this machine."""
    config = load(args.mesh)
    job = read_job(config, args.command)
    if args.dry_run:
        from jaxserve.cli.dry_run import describe

        for line in describe(config, job, launch.environment()):
            print(line)
        return 0
    variables = launch.environment()
    ranks = local_ranks(config, variables, args.node_rank)
    if len(ranks) == 1:
        return run_rank(config, ranks[0], job, args.debug)
    token = variables.get("JAXSERVE_DP_TOKEN") or (secrets.token_hex(16) if config.hosts == 1 else "")
    commands = [command_of(config, rank, args.mesh, job, variables, token) for rank in ranks]
    limit = None if config.independent else float(config.timeouts.shutdown)
    stop = config.timeouts.stop + (vars(job.args).get("shutdown_timeout", 0.0) if job.args is not None else 0.0)
    return processes.run(commands, stop_seconds=stop, shutdown_seconds=limit)


def run_rank(config: MeshConfig, rank: Rank, job: Job, debug: bool) -> int:
    """Be this rank: join the others, then run the job; returns the exit code."""
    variables = launch.environment()
    own = rank_variables(config, rank, variables, variables.get("JAXSERVE_DP_TOKEN", ""))
    launch.set_environment(own)
    from jaxserve.distributed import join
    from jaxserve.server.ending import EarlyEnd

    serves = job.words[:1] == ("serve",)
    with EarlyEnd("all ranks had come") if serves else contextlib.nullcontext():
        join(rank, config)
    try:
        if job.args is not None and rank.rank > 0:
            code = follow(job.args)
        else:
            code = run_script(job.words) if job.args is None else job.args.run(job.args)
    except Exception as error:
        code = report(error, debug)
    if code != 0 and rank.size > 1 and not config.independent:
        # jax would wait for the others, which wait for this rank: leave at once, so that they notice.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def follow(args: argparse.Namespace) -> int:
    """Be the hands of rank 0, which runs the command, until it closes its engine; returns the exit code.

    While it loads a signal ends this process; later rank 0, which gets it, too, may have requests to finish.
    """
    from jaxserve.server.ending import EarlyEnd

    if getattr(args, "model_tag", None) is not None:  # of serve
        setattr(args, flags.ENGINE + "model", args.model_tag)
    with EarlyEnd("the model was loaded") as ending:
        from jaxserve.engine.cache_writes import CacheWrites
        from jaxserve.engine.setup import build_parts

        with CacheWrites() as writes:
            ending.first(writes.close)
            try:
                build_parts(flags.engine_args(args), when_following=lambda: ending.release(signal.SIG_IGN))
            except SystemExit as end:
                return int(end.code or 0)
    raise RuntimeError("a follower's engine came back without a leader")


def run_script(words: tuple[str, ...]) -> int:
    """Run a Python script as `python SCRIPT ARGUMENTS` does; returns the exit code."""
    script, *rest = words
    sys.argv = [script, *rest]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
