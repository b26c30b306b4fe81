"""Whole offline workloads with dummy weights: decoding alone and in crowds, prefill, mixtures, long prompts.

    python scripts/bench_workloads.py --model qwen3-8b [--only NAME ...] [--repeat 2] [--output FILE.json]

All programs are compiled before the first run. Printed is the best of `--repeat` runs of each workload; every request
decodes its whole length. `late` counts programs that a step had to wait for: it should be 0.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from profile_step import MODELS
from tqdm import tqdm

from jaxserve import LLM, SamplingParams
from jaxserve.version import __version__


@dataclass(frozen=True)
class Workload:
    """Tokens in and out of each request, and how they are sampled."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def same(count: int, tokens_in: int, tokens_out: int, **options: Any) -> Workload:
    return Workload((tokens_in,) * count, (tokens_out,) * count, options)


def mixture(count: int) -> Workload:
    """Lengths from 100 to 1,024, drawn as public mini engines' benchmarks do."""
    rng = random.Random(1)
    lengths = [tuple(rng.randint(100, 1024) for _ in range(count)) for _ in range(2)]
    return Workload(*lengths, {"temperature": 0.6})


WORKLOADS = {
    "b1": same(1, 128, 256),
    "b32": same(32, 128, 256),
    "thr256": same(256, 1024, 256),
    "nano256": mixture(256),
    "prefill64": same(64, 4096, 1),
    "b128 sampled": same(128, 128, 256, temperature=0.8, top_p=0.95, top_k=50),
    "long 1 x 32768": same(1, 32768, 256),
    "long 8 x 16384": same(8, 16384, 256),
}


def run(llm: LLM, work: Workload, repeat: int, rng: random.Random) -> dict[str, float]:
    """Seconds of the best run, its rates, and the time until the last request had its first token."""
    best: dict[str, float] = {}
    for _ in range(repeat):
        prompts = [{"prompt_token_ids": [rng.randint(0, 10000) for _ in range(n)]} for n in work.inputs]
        base = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**(base | work.options), max_tokens=n) for n in work.outputs]
        start = time.perf_counter()
        results = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        made = sum(len(result.outputs[0].token_ids) for result in results)
        if made != sum(work.outputs):
            raise RuntimeError(f"{made} tokens instead of {sum(work.outputs)}")
        first = max(result.metrics.first_token_latency for result in results if result.metrics is not None)
        if not best or seconds < best["seconds"]:
            steps = max(work.outputs) - 1
            best = {
                "seconds": round(seconds, 3),
                "output tokens/s": round(made / seconds, 1),
                "tokens/s": round((made + sum(work.inputs)) / seconds, 1),
                "last first token, s": round(first, 3),
                "ms/token after it": round((seconds - first) / steps * 1e3, 2) if steps else 0.0,
            }
    return best


def start_engine(config: dict[str, Any], folder: Path, max_model_len: int) -> LLM:
    """The engine, when all its programs are compiled."""
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=max_model_len,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    programs = llm.llm_engine.runner.programs
    with tqdm(desc="Compiling the other programs", unit="program") as bar:
        while llm.llm_engine.config.warmup != "none" and not programs.counts.warm:
            time.sleep(0.2)
            bar.update(programs.counts.total - bar.n)
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    chosen = args.only or [name for name in WORKLOADS if not name.startswith("long")]
    lengths = [zip(WORKLOADS[name].inputs, WORKLOADS[name].outputs, strict=True) for name in chosen]
    longest = max(sum(pair) for pairs in lengths for pair in pairs)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = MODELS[args.model] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
        llm = start_engine(config, Path(folder), max(8192, longest))
        rng = random.Random(0)
        run(llm, same(4, 64, 16), args.repeat, rng)
        for name in chosen:
            rows[name] = run(llm, WORKLOADS[name], args.repeat, rng)
            print(json.dumps({"workload": name} | rows[name]), flush=True)
        late = llm.llm_engine.runner.programs.counts.after_warmup
        print(f"late: {late}")
        device = jax.devices()[0].device_kind
        llm.close()
    if args.output is not None:
        report = {"model": args.model, "device": device, "jax": jax.__version__, "jaxserve": __version__}
        args.output.write_text(json.dumps(report | {"late": late, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
