"""Measure on a Hopper GPU where its kernels are faster than XLA, and with which sizes, and write what was found.

    python scripts/tune_kernels.py --model qwen3-8b [FOLDER ...] [--tensor-parallel-size 2] [--only matmul]
        [--tokens 1 4 16 32 64 128 192 256 384 512] [--keep] [--output benchmarks/results/FILE.json]

Ops: "matmul", "norm_matmul", "gated_mlp" and "block_tail", whose kernels serve only shapes and numbers of tokens that
were measured, with the shapes of the named models (or of the models in folders with a config.json); "paged_attention",
whose sizes are tried one after the other. The files are those that the kernels read (pallas_kernels/tuned/hopper);
--keep leaves them alone.

Every program chains calls over weights that are far larger than the L2 cache, compiled as the engine's programs are.
Candidates take turns, and the best of some rounds counts. A kernel must agree with XLA and win to be used, by 2 % where
it spares no launches.
"""

import argparse
import contextvars
import copy
import functools
import json
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench_kernels
import jax
import jax.numpy as jnp
import numpy as np
from kernel_contests import CONTESTS, LISTS, UNFIT, Contest, Shape, read_config
from profile_step import MODELS
from tqdm import tqdm

from jaxserve.models import ModelConfig
from pallas_kernels import tuning
from pallas_kernels.platform import require_hopper

DEVICE = "hopper"
OPS = (*CONTESTS, "paged_attention")
TOKENS = (1, 4, 16, 32, 64, 128, 192, 256, 384, 512)  # as decodes have
ROUNDS, SECONDS = 7, 0.01  # of each candidate, and of a round
# A kernel's time over XLA's from which on it is used. One that spares launches gains more in a step than in a chain:
# 32 sequences of Qwen3-8B took 6.58 ms a step with a kernel for the feed-forward layer and 6.79 without, a tie here.
GAINS = {"matmul": 0.98, "norm_matmul": 1.0, "gated_mlp": 1.0, "block_tail": 1.0}
MOST_ERROR = 2e-2  # relative, of bfloat16 results against each other
COMPILERS = 8  # threads
DECODES = ("decode 64 x 1024", "decode 256 x 1024", "decode 256 x 100..2048")
PREFILLS = ("prefill 4096", "prefill 2048 on 6144")
KNOBS = (  # of attention: where the number is, what is tried, and by which workloads of bench_kernels
    (("stages",), (2, 3, 4, 5, 6), DECODES),
    (("sharing_pages",), (4, 8, 16, 32), DECODES),
    (("long", "block"), (64, 128, 192), PREFILLS),
    (("long", "stages"), (1, 2, 3), PREFILLS),
)


def fill(contest: Contest) -> list[tuple[jax.Array, ...]]:
    """Random tokens and weights of each call that give numbers of about 1."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(scale, jnp.bfloat16)

    def operands(key: jax.Array, *shapes: Shape) -> tuple[jax.Array, ...]:
        lefts = len(contest.inputs)
        scales = [1.0 if i < lefts or one.ndim == 1 else one.shape[-1] ** -0.5 for i, one in enumerate(shapes)]
        keys = jax.random.split(key, len(shapes))
        return tuple(draw(key, one.shape, scale) for key, one, scale in zip(keys, shapes, scales, strict=True))

    keys = jax.random.split(jax.random.key(0), contest.calls)
    return [operands(key, *shapes) for key, shapes in zip(keys, contest.shapes, strict=True)]


def race(programs: dict[str, jax.stages.Compiled], operands: Sequence[tuple[jax.Array, ...]]) -> dict[str, float]:
    """Microseconds of a call by candidate: the best of rounds in which all take their turn."""
    best = dict.fromkeys(programs, math.inf)
    repeats = dict.fromkeys(programs, 1)
    for number in range(ROUNDS + 1):
        for name, program in programs.items():
            jax.block_until_ready(program(operands))
            start = time.perf_counter()
            jax.block_until_ready([program(operands) for _ in range(repeats[name])][-1])
            taken = (time.perf_counter() - start) / repeats[name]
            if number:
                best[name] = min(best[name], taken)
            else:
                repeats[name] = max(1, round(SECONDS / taken))
    return {name: seconds / len(operands) * 1e6 for name, seconds in best.items()}


def decide(contest: Contest, futures: dict[str, Future]) -> dict[str, Any]:
    """Who won, and by how much; candidates that differ from XLA in what they compute are out."""
    compiled = {name: future.result() for name, future in futures.items()}
    out: dict[str, Any] = {name: str(found) for name, found in compiled.items() if isinstance(found, Exception)}
    programs = {name: found for name, found in compiled.items() if not isinstance(found, Exception)}
    operands = fill(contest)
    expected = np.asarray(programs["xla"](operands)[-1], np.float32)
    for name in [name for name in programs if name != "xla"]:
        got = np.asarray(programs[name](operands)[-1], np.float32)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        if not error < MOST_ERROR:
            out[name] = f"relative error {error:.1e}"
            del programs[name]
    times = race(programs, operands)
    rivals = {name: us for name, us in times.items() if name != "xla" and us < GAINS[contest.op] * times["xla"]}
    winner = min(rivals, key=rivals.__getitem__, default="xla")
    us = {name: round(value, 1) for name, value in times.items()}
    return {"op": contest.op, **contest.key, "tokens": contest.tokens, "us": us, "out": out, "winner": winner}


def hold(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    """All contests, compiled by several threads meanwhile."""
    results = []
    with ThreadPoolExecutor(COMPILERS) as pool:
        futures = [
            {name: pool.submit(contextvars.copy_context().run, one.compile, name) for name in one.candidates}
            for one in contests
        ]
        for future in tqdm([one for some in futures for one in some.values()], "Compiling", unit=" programs"):
            future.exception()  # threads that still compile would hold up the launches
        for contest, some in zip(tqdm(contests, "Racing", unit=" contests"), futures, strict=True):
            results.append(decide(contest, some))
            some.clear()  # programs hold memory
            tqdm.write(json.dumps(results[-1]))
    return results


def merge(known: dict[str, Any], results: Iterable[dict[str, Any]], lists: dict[str, str]) -> dict[str, Any]:
    """A file of tuned sizes with these results in it; `lists` tells which list a winner's tokens go to.

    What was found earlier for other shapes and other numbers of tokens stays.
    """
    new = copy.deepcopy(known)
    rows: list[dict[str, Any]] = new["faster"]
    for result in results:
        key = {name: result[name] for name in result if name not in ("op", "tokens", "us", "out", "winner")}
        row = next((one for one in rows if key.items() <= one.items()), None)
        if row is None:
            row = {**key, **{name: [] for name in dict.fromkeys(lists.values())}}
            rows.append(row)
        for winner, name in lists.items():
            tokens = set(row[name]) - {result["tokens"]}
            row[name] = sorted(tokens | ({result["tokens"]} if result["winner"] == winner else set()))
    new["faster"] = [row for row in rows if any(row[name] for name in lists.values())]
    return new


def tune_attention(sizes: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sizes that are best one after the other, and what was measured."""
    pages = (
        bench_kernels.LAYERS,
        bench_kernels.PAGES,
        2,
        bench_kernels.KEY_HEADS,
        bench_kernels.PAGE,
        bench_kernels.WIDTH,
    )
    kv = jax.jit(lambda: jnp.full(pages, 0.5, jnp.bfloat16))()
    best, results = copy.deepcopy(sizes), []
    for path, values, names in KNOBS:
        works = [work for work in bench_kernels.WORKLOADS if work.name in names]
        found = {}
        for value in values:
            trial = with_value(best, path, value)
            with tuning.trying(DEVICE, "paged_attention", trial):
                try:
                    times = [attention_seconds(work, kv) for work in works]
                except UNFIT as error:
                    tqdm.write(f"{'.'.join(path)} = {value}: {str(error).splitlines()[0]}")
                    continue
            found[value] = float(np.exp(np.mean(np.log(times))))
            us = {work.name: round(seconds * 1e6, 1) for work, seconds in zip(works, times, strict=True)}
            results.append({"op": "paged_attention", "size": ".".join(path), "value": value, "us": us})
            tqdm.write(json.dumps(results[-1]))
        best = with_value(best, path, min(found, key=found.__getitem__))
    return best, results


def with_value(sizes: dict[str, Any], path: Sequence[str], value: int) -> dict[str, Any]:
    """The sizes with one changed."""
    first, *rest = path
    return sizes | {first: with_value(sizes[first], rest, value) if rest else value}


def attention_seconds(work: bench_kernels.Workload, kv: jax.Array) -> float:
    program, arrays = bench_kernels.build(work, bench_kernels.CALLS, kv), bench_kernels.inputs(work)
    return bench_kernels.seconds(lambda: program(kv, *arrays)) / bench_kernels.CALLS


def shown(sizes: dict[str, Any]) -> str:
    """JSON with a line for each row of a list of measured shapes."""
    parts = []
    for name, value in sizes.items():
        rows = isinstance(value, list)
        text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{" + ",\n ".join(parts) + "}\n"


def tune(
    op: str, configs: Sequence[ModelConfig], args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The new file of an op, and what was measured."""
    known = tuning.tuned(DEVICE, op)
    if op == "paged_attention":
        return tune_attention(known)
    results = hold(CONTESTS[op](configs, args.tensor_parallel_size, args.tokens))
    return merge(known, results, LISTS[op]), results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3-8b"], help=f"{', '.join(MODELS)}, or folders")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="devices that share a copy of a model")
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="rows of a step (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not write the files that the kernels read")
    parser.add_argument("--output", type=Path, help="a JSON file of everything measured")
    args = parser.parse_args()
    device = jax.devices()[0]
    try:
        require_hopper()
    except NotImplementedError as error:
        parser.error(str(error))
    configs, measured = [read_config(name) for name in args.model], []
    with ExitStack() as stack:
        for op in [op for op in OPS if op in args.only]:
            new, results = tune(op, configs, args)
            measured += results
            stack.enter_context(tuning.trying(DEVICE, op, new))  # for the ops after this one
            if not args.keep:
                tuning.path(DEVICE, op).write_text(shown(new))
    if args.output is not None:
        head = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "models": args.model,
            "commit": bench_kernels.commit(),
        }
        args.output.write_text(json.dumps(head | {"results": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
