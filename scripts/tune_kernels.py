"""Measure on a Hopper GPU where its kernels are faster than XLA, and with which sizes, and write what was found.

    python scripts/tune_kernels.py --model qwen3-8b [FOLDER ...] [--tensor-parallel-size 2] [--only matmul]
        [--tokens 4 16 32 64 128 192 256 384 512] [--keep] [--output benchmarks/results/FILE.json]

Ops: "matmul", "gated_mlp" and "block_tail", whose kernels serve only shapes and numbers of tokens that were measured,
with the shapes of the named models (or of the models in folders with a config.json); "paged_attention", whose sizes are
tried one after the other. The files are those that the kernels read (pallas_kernels/tuned/hopper); --keep leaves them
alone.

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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_kernels
import jax
import jax.numpy as jnp
import numpy as np
from profile_step import MODELS
from tqdm import tqdm

from jaxserve.engine.blueprint import COMPILER_OPTIONS
from jaxserve.layers.linear import contract
from jaxserve.models import ModelConfig, resolve
from jaxserve.weights import read_hf_config
from pallas_kernels import matmul, tuning
from pallas_kernels.block_tail import mosaic_gpu as block_tail_mosaic_gpu
from pallas_kernels.block_tail import reference as block_tail_reference
from pallas_kernels.gated_mlp import hopper_tiled, reference
from pallas_kernels.gated_mlp import mosaic_gpu as gated_mosaic_gpu
from pallas_kernels.matmul import mosaic_gpu
from pallas_kernels.platform import require_hopper

DEVICE = "hopper"
OPS = ("matmul", "gated_mlp", "block_tail", "paged_attention")
TOKENS = (4, 16, 32, 64, 128, 192, 256, 384, 512)  # as decodes have
COLD_BYTES = 400 << 20  # of weights in a program: eight times the L2 cache of an H100
MOST_CALLS = 32  # of a program
ROUNDS, SECONDS = 7, 0.01  # of each candidate, and of a round
# A kernel's time over XLA's from which on it is used. One that spares launches gains more in a step than in a chain:
# 32 sequences of Qwen3-8B took 6.58 ms a step with a kernel for the feed-forward layer and 6.79 without, a tie here.
GAINS = {"matmul": 0.98, "gated_mlp": 1.0, "block_tail": 1.0}
EPS = 1e-6  # of norms
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
UNFIT = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)  # of kernels and their compiler

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Contest:
    """A call that several candidates can make.

    Attributes:
        op: its name.
        key: what the file of the op calls the shapes.
        tokens: rows of the left operands.
        inputs: features of each of these.
        weights: their shapes.
        candidates: by name: `(*left operands, *weights) -> result`; one is called "xla".
    """

    op: str
    key: dict[str, Any]
    tokens: int
    inputs: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    candidates: dict[str, Callable[..., jax.Array]]

    @property
    def calls(self) -> int:
        """Of a program, so that no weights stay in the cache."""
        each = 2 * sum(math.prod(shape) for shape in self.weights)
        return min(max(-(-COLD_BYTES // each), 2), MOST_CALLS)

    @property
    def shapes(self) -> list[tuple[Shape, ...]]:
        """Of the operands of each call; with tokens in common, XLA would join weights to one product."""
        sizes = *((self.tokens, features) for features in self.inputs), *self.weights
        return [tuple(Shape(shape, jnp.bfloat16) for shape in sizes)] * self.calls

    def compile(self, name: str) -> jax.stages.Compiled | Exception:
        """The program of a candidate, or why there is none."""
        call = self.candidates[name]

        def chain(operands: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
            return [call(*some) for some in operands]

        try:
            return jax.jit(chain).lower(self.shapes).compile(dict(COMPILER_OPTIONS["gpu"]))
        except UNFIT as error:
            return error


def read_config(name: str) -> ModelConfig:
    """Of a known model, or of one in a folder."""
    found: dict[str, Any] = dict(MODELS[name] if name in MODELS else read_hf_config(Path(name)))
    return resolve(found).read_config(found, None)


def products(config: ModelConfig, shards: int) -> set[tuple[int, int, str]]:
    """Outputs, inputs and the result's type of a dense model's products on one of some devices."""
    heads, kv = config.num_heads // shards, max(config.num_kv_heads // shards, 1)
    width, inner = config.hidden_size, config.intermediate_size // shards
    return {
        ((heads + 2 * kv) * config.head_dim, width, "bfloat16"),
        (width, heads * config.head_dim, "bfloat16"),
        (2 * inner, width, "bfloat16"),
        (width, inner, "bfloat16"),
        (config.vocab_rows // shards, width, "float32"),
    }


def matmul_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the products of all models."""
    ctas, contests = require_hopper(), []
    for outputs, inputs, result in sorted(set().union(*(products(config, shards) for config in configs))):
        candidates: dict[str, Callable[..., jax.Array]] = {
            "xla": functools.partial(matmul.matmul, out_dtype=result, implementation="xla"),
            "mosaic_gpu": functools.partial(mosaic_gpu.call, out_dtype=jnp.dtype(result), ctas=ctas),
        }
        key = {"outputs": outputs, "inputs": inputs, "result": result}
        contests += [Contest("matmul", key, count, (inputs,), ((outputs, inputs),), candidates) for count in tokens]
    return contests


def gated_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the gated feed-forward layers of all models; products outside the kernels use what was found for them."""
    sms, contests = require_hopper(), []

    def tiled(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return contract(hopper_tiled.call(x, gate_up), down)

    def plain(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return reference.gated_mlp(x, gate_up, down, jax.nn.silu, contract)

    def stream(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        gated_mosaic_gpu.require_room(len(down), sms)
        return gated_mosaic_gpu.call(x, gate_up, down)

    candidates = {"xla": plain, "stream": stream, "tiled": tiled}
    sizes = {
        (config.hidden_size, config.intermediate_size // shards) for config in configs if config.activation == "silu"
    }
    for width, inner in sorted(sizes):
        key, weights = {"width": width, "inner": inner, "outputs": width}, ((inner, 2, width), (width, inner))
        contests += [Contest("gated_mlp", key, count, (width,), weights, candidates) for count in tokens]
    return contests


def tail_contests(configs: Iterable[ModelConfig], tokens: Sequence[int]) -> list[Contest]:
    """Of the second halves of the layers of all models, against the best that was found for their parts."""
    sms, contests = require_hopper(), []

    def plain(*operands: jax.Array) -> jax.Array:
        return block_tail_reference.block_tail(*operands, jax.nn.silu, contract, norm_eps=EPS)

    def fused(*operands: jax.Array) -> jax.Array:
        gated_mosaic_gpu.require_room(operands[0].shape[1], sms)
        return block_tail_mosaic_gpu.call(*operands, norm_eps=EPS)

    candidates = {"xla": plain, "mosaic_gpu": fused}
    sizes = {
        (config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size)
        for config in configs
        if config.activation == "silu"
    }
    for heads, width, inner in sorted(sizes):
        key = {"heads": heads, "width": width, "inner": inner}
        weights = (width, heads), (width,), (inner, 2, width), (width, inner)
        contests += [Contest("block_tail", key, count, (width, heads), weights, candidates) for count in tokens]
    return contests


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
    if op == "block_tail":
        contests = tail_contests(configs, args.tokens)
    else:
        find = matmul_contests if op == "matmul" else gated_contests
        contests = find(configs, args.tensor_parallel_size, args.tokens)
    results = hold(contests)
    lists = {"stream": "stream", "tiled": "tiled"} if op == "gated_mlp" else {"mosaic_gpu": "tokens"}
    return merge(known, results, lists), results


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
