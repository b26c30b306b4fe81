"""`jaxserve convert`: write a model as an engine-ready checkpoint."""

import argparse
import sys
import time

from jaxserve.cli import flags

DESCRIPTION = """Write a model as a folder that loads faster: weights already fused and cast (Orbax), the tokenizer
and the configuration. Give the folder as --model afterwards."""

USED = ("revision", "hf_token", "download_dir", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at OUT")
    flags.add_engine_flags(parser, only=USED)


def run(args: argparse.Namespace) -> int:
    """Convert and say where the result is."""
    options = flags.engine_args(args, model=args.model)
    from jaxserve.convert import convert
    from jaxserve.text import load_tokenizer

    start = time.perf_counter()
    out = convert(
        options.model,
        args.out,
        load_tokenizer=lambda path: load_tokenizer(path).hf,
        dtype=options.dtype,
        revision=options.revision,
        token=options.hf_token,
        download_dir=options.download_dir,
        overwrite=args.overwrite,
        show_progress=sys.stderr.isatty(),
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 2**20:.0f} MiB in {time.perf_counter() - start:.1f} s")
    return 0
