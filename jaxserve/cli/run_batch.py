"""`jaxserve run-batch`: answer the requests of a file in OpenAI's batch format."""

import argparse
import sys
from typing import TYPE_CHECKING

from jaxserve.cli import flags
from jaxserve.config.options import parse_count

if TYPE_CHECKING:
    from jaxserve.server.batch import Outcome
    from jaxserve.server.batch_files import Output

DESCRIPTION = """Answer the requests of a file in OpenAI's batch format.

A line of the input is {"custom_id", "method": "POST", "url", "body"}, with /v1/chat/completions or /v1/completions as
the url. Results are appended to the output as they finish, in any order: tell them by their custom_id. A line that
cannot be served gets its error there, the others go on, and the exit code is 1.

A run that was stopped or killed is continued by the same command: what the output holds is not done again. Results on
standard output, or requests from standard input, cannot be continued."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="folder, GGUF file or hub id; as --model")
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input-file", required=True, metavar="JSONL", help="requests; - is standard input")
    files.add_argument("-o", "--output-file", required=True, metavar="JSONL", help="results; - is standard output")
    files.add_argument("--overwrite", action="store_true", help="delete what the output holds, instead of going on")
    run = parser.add_argument_group("run")
    run.add_argument("--max-concurrency", type=flags.reader(parse_count), metavar="N",
                     help="requests in flight (default: twice --max-num-seqs)")  # fmt: skip
    run.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the file; the exit code is 1 when the output holds errors, 128 + N after signal N."""
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise flags.UsageError("--max-concurrency must be at least 1")
    if args.model_tag is not None:
        setattr(args, flags.ENGINE + "model", args.model_tag)
    show = sys.stderr.isatty() and not args.no_progress
    engine = flags.engine_args(args, **({} if show else {"use_tqdm_on_load": False}))
    from jaxserve.server.batch import run_batch
    from jaxserve.server.batch_files import open_files

    with open_files(args.input_file, args.output_file, overwrite=args.overwrite) as files:
        outcome = run_batch(engine, files, max_concurrency=args.max_concurrency, show_progress=show)
        print(summary(outcome, files.output), file=sys.stderr)
        if outcome.stopped_by is not None:
            return 128 + outcome.stopped_by
        return 1 if outcome.failed + files.output.written.failed else 0


def summary(outcome: "Outcome", output: "Output") -> str:
    """How many requests were answered and how fast."""
    before, tokens = output.written, outcome.completion_tokens
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    text = f"{outcome.done} requests{failed}: {tokens} tokens in {outcome.seconds:.1f} s"
    if tokens:
        text += f" ({tokens / outcome.seconds:.1f} tokens/s)"
    if before.total:
        failed = f", {before.failed} of them failed" if before.failed else ""
        text += f"; {before.total} were done before{failed}"
    if outcome.stopped_by is not None:
        text += f"; stopped by {outcome.stopped_by.name}"
        text += ", the same command goes on" if output.is_file else ""
    return text
