"""One engine over two processes on this machine's CPU: the tokens of one process, and an end when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.setup import facts

pytestmark = pytest.mark.usefixtures("quick_compilation")
ENGINE = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "load_format": "dummy"}
PROMPTS = [np.random.default_rng(n).integers(1, 90, 3 + 6 * n).tolist() for n in range(6)]
SCRIPT = """
import json, os, sys
from jaxserve import LLM, SamplingParams
from jaxserve.distributed import engine_options
print("PID", os.getpid(), flush=True)
llm = LLM(sys.argv[1], skip_tokenizer_init=True, use_tqdm_on_load=False, warmup="none", compilation_cache_dir="",
          **engine_options())
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
print("READY", flush=True)
while True:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print("TOKENS", json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
    if sys.argv[4] == "once":
        break
"""


def start(folder: Path, model: Path, axes: str, often: str) -> subprocess.Popen:
    """The launcher of two processes."""
    (folder / "script.py").write_text(SCRIPT)
    sizes = f"platform: cpu\naxes: {axes}\nprocesses_per_host: 2\ntimeouts: {{heartbeat: 10}}\n"
    (folder / "mesh.yaml").write_text(sizes + f"engine: {json.dumps(ENGINE)}\n")
    words = [str(folder / "script.py"), str(model), json.dumps(PROMPTS), "8", often]
    argv = [sys.executable, "-m", "jaxserve", "launch", "--mesh", str(folder / "mesh.yaml"), "--", *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen, text: str, seconds: float = 60.0) -> list[str]:
    """The launcher's lines up to the first that holds the text."""
    assert process.stdout is not None
    lines, deadline = [], time.monotonic() + seconds
    for line in process.stdout:
        lines.append(line)
        if text in line or time.monotonic() > deadline:
            break
    assert text in lines[-1], "".join(lines)
    return lines


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param("{data: 1, model: 2}", id="shared"),
        pytest.param("{data: 2, model: 1}", id="copies", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path: Path, tiny_model: Path, compilation_cache: str, axes: str):
    with start(tmp_path, tiny_model, axes, "once") as process:
        lines = read_until(process, "TOKENS")
        assert process.wait(30) == 0
    assert sum("READY" in line for line in lines) == 1  # the other process follows
    alone = LLM(
        str(tiny_model), skip_tokenizer_init=True, warmup="none", compilation_cache_dir=compilation_cache, **ENGINE
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = alone.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    alone.close()
    assert json.loads(lines[-1].partition("TOKENS")[2]) == [output.outputs[0].token_ids for output in outputs]


def test_a_dead_process_ends_the_others(tmp_path: Path, tiny_model: Path):
    with start(tmp_path, tiny_model, "{data: 1, model: 2}", "forever") as process:
        lines = read_until(process, "TOKENS")
        pids = {line.split()[1].strip("]"): int(line.split()[-1]) for line in lines if " PID " in line}
        os.kill(pids["1"], signal.SIGKILL)
        begun = time.monotonic()
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(30) != 0
    assert time.monotonic() - begun < 30
    assert "rank 1 was killed" in rest or "rank 1 failed" in rest or "rank 1 is gone" in rest, rest
    with pytest.raises(ProcessLookupError):
        os.kill(pids["0"], 0)


def test_what_processes_must_agree_on(tiny_model: Path, compilation_cache: str):
    one, other = (
        LLM(
            str(tiny_model), skip_tokenizer_init=True, warmup="none", compilation_cache_dir=folder, seed=seed, **ENGINE
        ).llm_engine.config
        for folder, seed in ((compilation_cache, 0), ("", 1))
    )
    first, second = facts(one, {"a": 1}), facts(other, {"a": 2})
    assert {name for name in first if first[name] != second[name]} == {"seed", "config.json"}
