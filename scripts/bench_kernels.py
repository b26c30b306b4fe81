"""Check and time the attention kernels on a Hopper GPU, and write the figures.

    python scripts/bench_kernels.py [--output benchmarks/results/FILE.json] [--only NAME ...]

Each timed program chains as many calls as a model has layers, over a cache that is far larger than the L2 cache, with
scattered pages; the plan of a step is made once per program, as in the engine, and is in the time of a call. The
checks compare with float32 softmax over gathered pages, into memory recycled from NaN-filled arrays.
"""

import argparse
import functools
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import paged_attention

LAYERS, PAGES, KEY_HEADS, PAGE, WIDTH = 4, 8200, 8, 64, 128
CALLS = 32  # of a program, as many as a model has layers
SOME_LENGTHS = tuple(np.random.default_rng(0).integers(100, 2049, 256).tolist())


@dataclass(frozen=True)
class Workload:
    """Rows and cached positions of each sequence; `limit` is the most microseconds, or the least TFLOP/s, wanted."""

    name: str
    rows: tuple[int, ...]
    lens: tuple[int, ...]
    heads: int = 32
    limit: str = ""

    @property
    def flops(self) -> int:
        """Multiplications and additions of the visible (row, column) pairs."""
        pairs = sum(n * (2 * k - n + 1) // 2 for n, k in zip(self.rows, self.lens, strict=True))
        return 4 * WIDTH * self.heads * pairs

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all sequences."""
        return sum(self.lens) * KEY_HEADS * WIDTH * 2 * 2


def decode(name: str, lens: tuple[int, ...], **options: object) -> Workload:
    return Workload(f"decode {name}", (1,) * len(lens), lens, **options)  # pyright: ignore[reportArgumentType]


WORKLOADS = (
    decode("1 x 8192", (8192,), limit="20 us"),
    decode("64 x 1024", (1024,) * 64, limit="100 us"),
    decode("256 x 1024", (1024,) * 256, limit="380 us"),
    decode("64 x 8192", (8192,) * 64, limit="720 us"),
    decode("256 x 100..2048", SOME_LENGTHS, limit="5 % of the equal-length rate"),
    decode("64 x 1024, 16 heads", (1024,) * 64, heads=16),
    Workload("32 rows, 64 x 1024", (32,) * 64, (1024,) * 64, limit="1.5 x a decode"),
    Workload("32 rows, 1 x 8192", (32,), (8192,), limit="1.5 x a decode"),
    Workload("prefill 4096", (4096,), (4096,), limit="600 TFLOP/s"),
    Workload("prefill 2 x 4096", (4096,) * 2, (4096,) * 2, limit="600 TFLOP/s"),
    Workload("prefill 8192", (8192,), (8192,), limit="600 TFLOP/s"),
    Workload("prefill 2048 on 6144", (2048,), (8192,), limit="620 TFLOP/s"),
    Workload("mixed", (1,) * 5 + (40, 300, 1, 20, 700), (3000, 10, 64, 65, 500, 400, 1000, 1, 20, 700)),
)


def inputs(work: Workload) -> list[jax.Array]:
    """Queries, page table, row bounds and lengths; pages are distinct and scattered."""
    counts = [-(-n // PAGE) for n in work.lens]
    ids = iter(np.random.default_rng(1).permutation(PAGES)[: sum(counts)])
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    bounds = np.cumsum([0, *work.rows]).astype(np.int32)
    q = 2 * jax.random.normal(jax.random.key(2), (sum(work.rows), work.heads, WIDTH), jnp.bfloat16)
    return [q, *map(jnp.asarray, (table, bounds, np.array(work.lens, np.int32)))]


def build(work: Workload, calls: int, kv: jax.Array) -> jax.stages.Compiled:
    """A program of that many calls, each on the result of the one before; the kernels are lowered once."""
    attend = jax.jit(functools.partial(paged_attention, scale=WIDTH**-0.5))

    def chain(kv, q, *rest):
        for i in range(calls):
            q = attend(q, kv, jnp.int32((LAYERS - 1 - i) % LAYERS), *rest)
        return q

    return jax.jit(chain).lower(kv, *inputs(work)).compile()


def seconds(call, repeat: int = 8) -> float:
    """Median of three groups of calls, per call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(repeat)][-1])
        times.append((time.perf_counter() - start) / repeat)
    return sorted(times)[1]


@jax.jit
def plain(kv: jax.Array, q: jax.Array, table: jax.Array, bounds: jax.Array, lens: jax.Array) -> jax.Array:
    """Row by row in float32 over gathered pages of the last layer."""
    row = jnp.arange(q.shape[0])
    seq = jnp.sum(bounds[1:] <= row[:, None], axis=1)

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, s, position = inputs
        keys, values = (kv[-1, table[s], i].astype(jnp.float32).swapaxes(0, 1) for i in (0, 1))
        keys, values = (x.reshape(KEY_HEADS, -1, WIDTH) for x in (keys, values))
        grouped = query.astype(jnp.float32).reshape(KEY_HEADS, -1, WIDTH)
        scores = jnp.einsum("kgd,knd->kgn", grouped, keys, precision="highest") * WIDTH**-0.5
        scores = jnp.where(jnp.arange(keys.shape[1]) <= position, scores, -jnp.inf)
        return jnp.einsum("kgn,knd->kgd", jax.nn.softmax(scores), values, precision="highest").reshape(query.shape)

    return lax.map(one, (q, seq, lens[seq] - bounds[seq + 1] + row))


def measure(work: Workload, kv: jax.Array) -> dict[str, object]:
    """Time per call, rates, and the relative error of a single call."""
    arrays = inputs(work)
    single, chained = build(work, 1, kv), build(work, CALLS, kv)
    poison = [jnp.full(1 << 27, jnp.nan, jnp.float32).block_until_ready() for _ in range(4)]
    del poison
    got, rows = np.asarray(single(kv, *arrays), np.float32), np.arange(0, sum(work.rows), max(sum(work.rows) // 64, 1))
    expected = np.asarray(plain(kv, *arrays), np.float32) if len(got) <= 2048 else got
    error = np.linalg.norm(got[rows] - expected[rows]) / np.linalg.norm(expected[rows])
    taken = seconds(lambda: chained(kv, *arrays)) / CALLS
    return {
        "name": work.name,
        "us": round(taken * 1e6, 1),
        "TB/s": round(work.cache_bytes / taken / 1e12, 2),
        "TFLOP/s": round(work.flops / taken / 1e12),
        "wanted": work.limit,
        "relative_error": float(f"{error:.1e}") if expected is not got else None,
    }


def commit() -> str:
    """What is measured; empty outside a clone."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="workloads whose names contain one of these")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"the kernels need an NVIDIA GPU, the platform is {device.platform!r}")
    layer = jax.jit(lambda key: jax.random.normal(key, (PAGES, 2, KEY_HEADS, PAGE, WIDTH), jnp.bfloat16))
    kv = jnp.stack([layer(key) for key in jax.random.split(jax.random.key(7), LAYERS)])
    results = []
    for work in WORKLOADS:
        if args.only is None or any(part in work.name for part in args.only):
            results.append(measure(work, kv))
            print(json.dumps(results[-1]), flush=True)
    if args.output is not None:
        head = {"device": device.device_kind, "jax": jax.__version__, "commit": commit()}
        args.output.write_text(json.dumps(head | {"attention": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
