"""From the start of a process to its first token, with cold and with warm caches of compiled programs.

    python scripts/bench_startup.py --model qwen3-8b [--runs 2] [--output FILE.json]

Every run is a process of its own with dummy weights; all share one new cache folder, so the first is cold, others
warm. Printed are the seconds since the process was started: imports done, `LLM()` ready, first token of a prompt of
128 tokens; then how long 64 more tokens took at once, and again when everything that these wanted had been compiled;
and when the last program was ready.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from profile_step import MODELS

PROMPT_TOKENS, MORE_TOKENS = 128, 64

CHILD = """
import json, sys, time
start, folder, cache = float(sys.argv[1]), sys.argv[2], sys.argv[3]
marks = {}
def mark(name): marks[name] = round(time.time() - start, 2)
from jaxserve import LLM, SamplingParams
mark("imported")
llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=8192, enable_prefix_caching=False,
          compilation_cache_dir=cache, use_tqdm_on_load=False)
mark("ready")
prompt = [{"prompt_token_ids": list(range(100, 100 + int(sys.argv[4])))}]
def generate(tokens):
    before = time.time()
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
                 use_tqdm=False)
    return round(time.time() - before, 3)
generate(1)
mark("first token")
more = int(sys.argv[5])
marks["more tokens at once, s"] = generate(more)
times = [generate(more) for _ in range(3)]
while len(times) < 100 and min(times[-3:]) < 0.9 * min(times[:-3], default=1e9):
    times.append(generate(more))
marks["more tokens later, s"] = min(times)
while not llm.llm_engine.runner.programs.counts.warm:
    time.sleep(0.05)
mark("all programs ready")
print("MARKS " + json.dumps(marks), flush=True)
"""


def run(folder: Path, cache: Path) -> dict[str, float]:
    """One process from its start; raises `RuntimeError` with the end of its output if it fails."""
    arguments = [str(time.time()), str(folder), str(cache), str(PROMPT_TOKENS), str(MORE_TOKENS)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    found = [line.removeprefix("MARKS ") for line in done.stdout.splitlines() if line.startswith("MARKS ")]
    if not found:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = MODELS[args.model] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        results = []
        for number in range(args.runs):
            results.append({"caches": "warm" if number else "cold"} | run(Path(folder), Path(folder, "cache")))
            print(json.dumps(results[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"model": args.model, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
