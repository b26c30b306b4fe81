"""Where the time of one engine step goes: its kernels, their times and what they achieve.

    python scripts/profile_step.py --model qwen3-0.6b --batch 1 --context 1024 [--prefill] [--layers 4] [--hlo]

The step is the engine's own (embedding, layers, logits, greedy sampling) with dummy weights. On a GPU a profiler trace
gives one row per kernel and scope, layers merged. "GB/s" counts every operand and result of a kernel once and whole,
but not the cache: it means nothing where a kernel gathers from a table or reads the cache. Kernels are launched one by
one for the trace; the wall time is measured as the engine runs them, inside CUDA graphs. On other devices only the wall
time is measured.
"""

import argparse
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.batch import Bucket, Limits, State, layout, packed_size
from jaxserve.engine.blueprint import COMPILER_OPTIONS
from jaxserve.engine.step import ScoreMode, step
from jaxserve.kv_cache import KVCache
from jaxserve.weights import LoadedModel, load_model, read_hf_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
MODELS = {
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
PAGE_SIZE = 64
WARM_UP = 3  # steps before the clock starts
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


@dataclass(frozen=True)
class Instruction:
    """One line of an optimized program: its result type, operand names, and the scope it came from."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    scope: str


@dataclass
class Row:
    """The launches of one kernel in one place of the model, over all layers and traced steps."""

    name: str
    scope: str
    bytes: int
    seconds: float = 0.0
    count: int = 0


def load(name: str, layers: int | None) -> LoadedModel:
    """A known model, or one with a local config, with dummy weights and perhaps fewer layers."""
    config: dict[str, Any] = dict(MODELS[name] if name in MODELS else read_hf_config(Path(name)))
    config |= {} if layers is None else {"num_hidden_layers": layers}
    return load_model(name, hf_config=config, load_format="dummy")


def make_shapes(batch: int, context: int, prefill: bool) -> tuple[Bucket, Limits]:
    """The step's bucket and a cache that just holds it."""
    pages = -(-context // PAGE_SIZE)
    limits = Limits(batch, pages, PAGE_SIZE, batch * pages, 1)
    if not prefill:
        return Bucket(batch, batch), limits
    return Bucket(batch * context, batch), limits


def make_buffer(bucket: Bucket, limits: Limits, context: int) -> np.ndarray:
    """Random tokens of `seqs` equally long sequences, as the engine packs them; pages in random order."""
    rng = np.random.default_rng(0)
    per_seq = bucket.tokens // bucket.seqs
    values = {
        "token_ids": rng.integers(0, 1000, bucket.tokens),
        "row_ids": np.repeat(np.arange(bucket.seqs), per_seq),
        "slots": np.arange(bucket.seqs),
        "cu_q_lens": np.arange(bucket.seqs + 1) * per_seq,
        "kv_lens": np.full(bucket.seqs, context),
        "capacity": np.full(bucket.seqs, limits.pages_per_seq * limits.page_size),
        "page_table": rng.permutation(limits.num_pages).reshape(bucket.seqs, limits.pages_per_seq),
    }
    buffer = np.zeros(packed_size(bucket, limits), np.int32)
    for name, (place, shape) in layout(bucket, limits).items():
        buffer[place] = values[name].reshape(shape).ravel()
    return buffer


def make_state(loaded: LoadedModel, limits: Limits) -> State:
    """An empty cache and token memory."""
    config = loaded.model_config
    sizes = (config.num_layers, limits.num_pages, config.num_kv_heads, limits.page_size, config.head_dim)
    shape = KVCache.shape(*sizes, platform=jax.default_backend())
    tokens = jnp.zeros((limits.num_pages, limits.page_size), jnp.int32)
    return State(KVCache(jnp.zeros(shape, loaded.dtype)), tokens, jnp.zeros(limits.max_num_seqs, jnp.int32))


def compile_step(
    loaded: LoadedModel, state: State, bucket: Bucket, limits: Limits, options: Mapping[str, Any]
) -> jax.stages.Compiled:
    """The engine's step for this bucket, compiled as the engine does it apart from `options`."""

    def program(leaves: tuple[jax.Array, ...], state: State, buffer: jax.Array) -> tuple[State, jax.Array]:
        return step(loaded.merge(leaves), state, buffer, bucket, limits, ScoreMode.parse("raw_logprobs"))

    buffer = jax.ShapeDtypeStruct((packed_size(bucket, limits),), jnp.int32)
    options = COMPILER_OPTIONS.get(jax.default_backend(), {}) | options
    return jax.jit(program, donate_argnums=1).lower(loaded.leaves, state, buffer).compile(options)


def wall_time(
    program: jax.stages.Compiled, loaded: LoadedModel, state: State, buffer: jax.Array, repeats: int
) -> tuple[float, State]:
    """Seconds per step of steps launched one after another, after `WARM_UP` others; and the state."""
    for _ in range(WARM_UP):
        state, packed = program(loaded.leaves, state, buffer)
    packed.block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        state, packed = program(loaded.leaves, state, buffer)
    packed.block_until_ready()
    return (time.perf_counter() - start) / repeats, state


def parse_instructions(text: str) -> dict[str, Instruction]:
    """The instructions of an optimized program by name."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
    found = {}
    for line in text.splitlines():
        match = pattern.match(line)
        if match:
            name, result, opcode, rest = match.groups()
            scope = re.search(r'op_name="([^"]*)"', rest)
            operands = tuple(re.findall(r"%([\w.-]+)", rest.partition("), ")[0]))
            found[name] = Instruction(name, result, opcode, operands, scope.group(1) if scope else "")
    return found


def type_bytes(text: str, cache: tuple[int, ...]) -> int:
    """Bytes of a type as programs print it; an array shaped like the cache counts nothing."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text):
        shape = tuple(int(d) for d in dims.split(",") if d)
        total += 0 if shape == cache else ITEM_BYTES.get(dtype, 0) * math.prod(shape)
    return total


def instruction_bytes(name: str, instructions: Mapping[str, Instruction], cache: tuple[int, ...]) -> int:
    """Bytes of the operands and results of one instruction."""
    if name not in instructions:
        return 0
    this = instructions[name]
    types = [this.result, *(instructions[o].result for o in this.operands if o in instructions)]
    return sum(type_bytes(text, cache) for text in types)


def short_scope(op_name: str) -> str:
    """The scopes of an operation without those of the program itself, layers merged."""
    parts = [part for part in op_name.split("/") if not part.startswith("jit(")]
    return re.sub(r"layer_\d+", "layer", "/".join(parts))


def kernel_events(folder: str) -> Iterator[tuple[str, str, float]]:
    """(kernel, instruction, seconds) of every kernel in a trace, in order of their start."""
    path = next(Path(folder).rglob("*.xplane.pb"))
    data = jax.profiler.ProfileData.from_file(str(path))
    events = []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                events += list(line.events)
    for event in sorted(events, key=lambda e: e.start_ns):
        yield event.name, str(dict(event.stats).get("hlo_op", "")), event.duration_ns * 1e-9


def collect(folder: str, text: str, cache: tuple[int, ...]) -> list[Row]:
    """The trace's kernels, one row for each kernel of each scope, in the order of a step."""
    instructions = parse_instructions(text)
    rows: dict[tuple[str, str], Row] = {}
    for kernel, op, seconds in kernel_events(folder):
        scope = short_scope(instructions[op].scope) if op in instructions else ""
        name = re.sub(r"[_.]\d+(?=$|_)", "", kernel)
        row = rows.setdefault((name, scope), Row(name, scope, instruction_bytes(op, instructions, cache)))
        row.seconds += seconds
        row.count += 1
    return list(rows.values())


def print_rows(rows: list[Row], repeats: int) -> None:
    """The table, and the sum of all kernels."""
    print(f"{'scope':44} {'kernel':44} {'n':>4} {'us each':>8} {'us':>8} {'GB/s':>6}")
    for row in rows:
        each, count = row.seconds / row.count, row.count / repeats
        times = f"{count:4.0f} {each * 1e6:8.2f} {each * count * 1e6:8.1f} {row.bytes / each / 1e9:6.0f}"
        print(f"{row.scope[-44:]:44} {row.name[:44]:44} {times}")
    total = sum(row.seconds for row in rows) / repeats
    print(f"kernels: {sum(row.count for row in rows) / repeats:.0f} a step, {total * 1e6:.0f} us")


def summary(loaded: LoadedModel, bucket: Bucket, seconds: float) -> str:
    """A step's time, and what its weights and the products of its layers (attention apart) make of it."""
    named = zip(loaded.names, loaded.leaves, strict=True)
    products = sum(leaf.size for name, leaf in named if name.startswith("layers.") and leaf.ndim > 1)
    rates = f"weights at {loaded.total_bytes / seconds / 1e9:.0f} GB/s"
    rates += f", layers' products at {2 * products * bucket.tokens / seconds / 1e12:.1f} TFLOP/s"
    return f"{bucket}, {loaded.model_config.num_layers} layers: {seconds * 1e6:.0f} us a step; {rates}"


def profile(args: argparse.Namespace) -> None:
    """Everything for one step shape."""
    loaded = load(args.model, args.layers)
    bucket, limits = make_shapes(args.batch, args.context, args.prefill)
    state = make_state(loaded, limits)
    buffer = jax.device_put(make_buffer(bucket, limits, args.context))
    seconds, state = wall_time(compile_step(loaded, state, bucket, limits, {}), loaded, state, buffer, args.repeats)
    print(summary(loaded, bucket, seconds))
    if jax.default_backend() != "gpu":
        print(f"No kernel table: it needs an NVIDIA GPU, and jax runs on {jax.default_backend()!r}.")
        return
    program = compile_step(loaded, state, bucket, limits, NO_GRAPHS)
    seconds, state = wall_time(program, loaded, state, buffer, args.repeats)
    print(f"without CUDA graphs: {seconds * 1e6:.0f} us a step")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, state = wall_time(program, loaded, state, buffer, args.repeats)
        rows = collect(folder, program.as_text() or "", state.cache.kv.shape)
    print_rows(rows, args.repeats + WARM_UP)
    if args.hlo:
        print(program.as_text())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="qwen3-0.6b", help=f"one of {', '.join(MODELS)}, or a folder with config.json"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--prefill", action="store_true", help="all tokens of the context at once, not one more")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are traced")
    parser.add_argument("--hlo", action="store_true", help="also print the optimized program")
    profile(parser.parse_args())


if __name__ == "__main__":
    main()
