"""The `jaxserve` command: a table of sub-commands, and what all of them share.

A sub-command is a module of this package with `DESCRIPTION`, `add_arguments(parser)` and `run(args) -> exit code`, and
one row in `COMMANDS`. Modules are imported when they are called, and the engine only when a command really starts, so
that `--help` and a misspelled flag answer at once.

Exit codes: 0 done, 1 something failed, 2 the command line was wrong, 130 interrupted.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jaxserve.checks import ParameterError, suggest
from jaxserve.cli.flags import Parser, UsageError, dashes
from jaxserve.version import __version__

# Words of the command -> module of this package, and its line in the overview.
COMMANDS = {
    "serve": ("serve", "answer HTTP requests as OpenAI's API does"),
    "router": ("router", "one endpoint in front of several servers"),
    "run-batch": ("run_batch", "answer the requests of a file in OpenAI's batch format"),
    "generate": ("generate", "continue prompts given as arguments, on standard input or in a JSONL file"),
    "chat": ("chat", "talk to a model in the terminal"),
    "bench offline": ("bench", "measure throughput and latency on random prompts"),
    "bench serve": ("bench_serve", "measure a running server under load"),
    "convert": ("convert", "write a model as an engine-ready checkpoint that loads faster"),
    "compile": ("compile", "compile ahead of time, also for a TPU slice that is not there, and say whether it fits"),
    "launch": ("launch", "run a command or script on many devices, processes and hosts"),
}
# Where libtpu is installed on a machine without a TPU, jax loads it to find that out: it would complain about each of
# these, and a second process about the first.
WITHOUT_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
OVERVIEW = """usage: jaxserve COMMAND [OPTIONS]

LLM inference on CPUs, NVIDIA GPUs and TPUs.

commands:
{commands}

options:
  -h, --help     this text; `jaxserve COMMAND --help` lists the options of a command
  --version      the version
"""


def overview() -> str:
    """The text of `jaxserve --help`."""
    width = max(map(len, COMMANDS))
    return OVERVIEW.format(commands="\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()))


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name and the arguments after it.

    Raises:
        UsageError: there is no such command.
    """
    for name in COMMANDS:
        words = name.split()
        if list(argv[: len(words)]) == words:
            return name, list(argv[len(words) :])
    partial = [name for name in COMMANDS if name.split()[0] == argv[0]]
    if partial:
        raise UsageError(f"{argv[0]!r} is not complete; there is: {', '.join(partial)}")
    raise UsageError(f"there is no command {argv[0]!r}.{suggest(argv[0], COMMANDS)} See jaxserve --help.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command that `argv` names; `args.run` is what to call.

    Raises:
        UsageError: the command line is wrong.
    """
    name, rest = find_command(argv)
    module = importlib.import_module(f"jaxserve.cli.{COMMANDS[name][0]}")
    parser = Parser(prog=f"jaxserve {name}", description=module.DESCRIPTION)
    module.add_arguments(parser)
    common = parser.add_argument_group("output")
    common.add_argument("-v", "--verbose", action="store_true", help="say what the engine does (memory, compilation)")
    common.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    end = rest.index("--") if "--" in rest else len(rest)
    args, unknown = parser.parse_known_intermixed_args(dashes(rest[:end]))
    # After "--" everything is a prompt (or the command to launch), whatever it begins with.
    if "prompts" in args:
        args.prompts += rest[end + 1 :]
    elif "command" in args:
        args.command += rest[end + 1 :]
    else:
        unknown += rest[end + 1 :]
    if unknown:
        known = [flag for action in parser.listed_actions() for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        kind = "option" if word.startswith("-") else "argument"
        raise UsageError(f"unknown {kind} {word!r}.{suggest(word, known)} See jaxserve {name} --help.")
    args.run, args.words = module.run, rest
    return args


def from_environment(*names: str) -> list[str]:
    """The value of the first of these variables that is set, if any is."""
    return [os.environ[name] for name in names if os.environ.get(name)][:1]


def environment() -> dict[str, str]:
    """A copy of all variables, for processes that are started from here."""
    return dict(os.environ)


def set_up_output(verbose: bool) -> None:
    """Log lines on standard error, and no advice from libraries about packages that are not needed here."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jaxserve").setLevel(logging.INFO if verbose else logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not has_tpu():
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


def has_tpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine shows TPU chips, as their drivers do."""
    return any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))


def report(error: BaseException, debug: bool) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    text = " ".join(str(error).split()) or type(error).__name__
    if expected:
        print(f"error: {text}", file=sys.stderr)
    else:
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {type(error).__name__}: {text}{hint}", file=sys.stderr)
    return 2 if isinstance(error, ParameterError | UsageError | TypeError) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--version"]:
        print(f"jaxserve {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if words else 2
    debug = "--debug" in words
    try:
        args = parse(words)
        set_up_output(args.verbose)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has left
        return 141
    except Exception as error:
        return report(error, debug)
