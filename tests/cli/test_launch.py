"""`jaxserve launch`: what it refuses, what a dry run prints, and real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.cli.flags import UsageError
from jaxserve.cli.jobs import engine_words, local_ranks, rank_variables, read_job
from sharding.config import MeshConfigError, parse
from sharding.launch import LaunchError, Rank

ROOT = Path(__file__).parents[2]
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def written(folder: Path, **values: object) -> str:
    path = folder / "mesh.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to launch"),
        (["srve"], "no command 'srve'. Did you mean 'serve'?"),
        (["chat"], "'chat' cannot be launched; use serve, run-batch, generate"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["serve", "m", "--prot", "1"], "unknown option '--prot'. Did you mean '--port'?"),
        (["serve", "m", "--tensor-parallel-size", "3"], "--tensor-parallel-size 3 differs from axes.model=4"),
    ],
)
def test_wrong_commands_are_refused_before_anything_starts(words, message, tmp_path, capsys):
    mesh = written(tmp_path, axes={"model": 4}, platform="cpu")
    assert main(["launch", "--mesh", mesh, "--", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"max_modle_len": 4}}, "no option 'max_modle_len'. Did you mean 'max_model_len'?"),
        ({"engine": {"dtype": "int3"}}, "mesh config: engine: dtype must be one of"),
    ],
)
def test_wrong_engine_options_name_the_file(values, message):
    with pytest.raises(MeshConfigError, match=re.escape(message)):
        read_job(parse({"axes": {"model": 4}, **values}), ["serve", "m"])


def test_engines_of_their_own_are_for_scripts():
    config = parse({"axes": {"data": 2}, "processes_per_host": 2, "independent": True})
    with pytest.raises(UsageError, match=r"independent: true, which is for scripts .* leave it out for generate"):
        read_job(config, ["generate", "Hello"])


def test_the_file_becomes_flags():
    engine = {"dtype": "bfloat16", "enable_prefix_caching": False, "hf_overrides": {"a": 1}, "max_model_len": None}
    config = parse({"axes": {"data": 2, "model": 4}, "engine": engine | {"served_model_name": ["a", "b"]}})
    assert engine_words(config) == [
        "--tensor-parallel-size", "4", "--data-parallel-size", "2", "--dtype=bfloat16", "--no-enable-prefix-caching",
        '--hf-overrides={"a": 1}', "--served-model-name=a,b",
    ]  # fmt: skip
    job = read_job(config, ["generate", "--model", "m", "--dtype", "float32", "--", "--x"])
    assert job.args is not None
    given = vars(job.args)
    assert given["engine.dtype"] == "float32"  # the command line counts more than the file
    assert given["engine.hf_overrides"] == {"a": 1}
    assert given["prompts"] == ["--x"]


TWO_BY_TWO = {"axes": {"model": 8}, "hosts": 2, "processes_per_host": 2, "coordinator": {"address": "h"}}
OPEN_MPI = {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}


def test_ranks_of_this_machine():
    config = parse(TWO_BY_TWO)
    assert [(rank.rank, rank.local_rank) for rank in local_ranks(config, {}, 1)] == [(2, 0), (3, 1)]
    each = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    assert [rank.rank for rank in local_ranks(config, each, None)] == [3]
    host = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    found = local_ranks(config, host, None)
    assert [(rank.rank, rank.size, rank.coordinator) for rank in found] == [(2, 4, "h:29501"), (3, 4, "h:29501")]
    pod = {"JOB_COMPLETION_INDEX": "1", "JAXSERVE_COORDINATOR": "set-workers-0-0.set"}
    found = local_ranks(parse({"axes": {"data": 4}, "hosts": 2, "processes_per_host": 2}), pod, None)
    assert [(rank.rank, rank.coordinator) for rank in found] == [(n, "set-workers-0-0.set:29501") for n in (2, 3)]
    alone = parse({"axes": {"model": 8}})
    assert [rank.size for rank in local_ranks(alone, {}, None)] == [1]
    assert len(local_ranks(parse({"axes": {"model": 8}, "processes_per_host": 4}), {}, None)) == 4


def test_processes_that_do_not_fit():
    config = parse(TWO_BY_TWO)
    three = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
    with pytest.raises(LaunchError, match=r"3 processes, but .* hosts=2 x processes_per_host=2; start 4 tasks, or 2"):
        local_ranks(config, three, None)
    with pytest.raises(LaunchError, match="has hosts=2, but nothing tells which of them this is; give --node-rank"):
        local_ranks(config, {}, None)
    with pytest.raises(UsageError, match="--node-rank 2 is not in 0 to 1"):
        local_ranks(config, {}, 2)


def test_environment_of_a_rank():
    config = parse(
        {"axes": {"data": 4, "model": 2}, "processes_per_host": 2, "independent": True, "engine": {"seed": 1}}
    )
    found = rank_variables(config, Rank(1, 2, 1, "h", 9, "test"), {}, "secret")
    assert found == {
        "JAXSERVE_RANK": "1", "JAXSERVE_WORLD_SIZE": "2", "JAXSERVE_LOCAL_RANK": "1", "JAXSERVE_COORDINATOR": "h:9",
        "JAXSERVE_TENSOR_PARALLEL_SIZE": "2", "JAXSERVE_DATA_PARALLEL_SIZE": "2", "JAXSERVE_ENGINE_ARGS": '{"seed": 1}',
        "JAXSERVE_DP_RANK": "1", "JAXSERVE_DP_RANK_LOCAL": "1", "JAXSERVE_DP_SIZE": "2", "JAXSERVE_DP_MASTER_IP": "h",
        "JAXSERVE_DP_MASTER_PORT": "9", "JAXSERVE_DP_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "4,5,6,7",
    }  # fmt: skip


def launch(mesh: str, *words: str, **variables: str) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "CUDA"))}
    argv = [sys.executable, "-m", "jaxserve", "launch", "--mesh", mesh, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env={**clean, **variables})


def test_dry_run_against_bytes_worked_out_by_hand(tmp_path: Path):
    """Qwen3-8B in bfloat16 over model=4: 2 bytes a parameter, norms whole, the rest in quarters."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    mesh = written(tmp_path, axes={"data": 2, "model": 4}, processes_per_host=2, coordinator={"port": 4321})
    out, err = launch(mesh, "--dry-run", "--", "serve", str(tmp_path), "--port", "8001").communicate(timeout=60)
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    width, inner, vocabulary, heads, kv_heads, head = 4096, 12288, 151936, 32, 8, 128
    expected = {
        "embedding.table": (1, vocabulary * width / 4),
        "lm_head.kernel": (1, vocabulary * width / 4),
        "layers.*.attention.qkv.kernel": (36, (heads + 2 * kv_heads) * head * width / 4),
        "layers.*.attention.out.kernel": (36, heads * head * width / 4),
        "layers.*.mlp.gate_up.kernel": (36, 2 * inner * width / 4),
        "layers.*.mlp.down.kernel": (36, inner * width / 4),
        "layers.*.attention.q_norm.scale": (36, head),
        "layers.*.attention.k_norm.scale": (36, head),
        "layers.*.attention_norm.scale": (36, width),
        "layers.*.mlp_norm.scale": (36, width),
        "norm.scale": (1, width),
    }
    shown = {line[0]: line[-1] for line in lines if line and line[0] in expected}
    assert shown == {name: f"{int(2 * count * size):,}" for name, (count, size) in expected.items()}
    total = sum(2 * count * size for count, size in expected.values())
    assert f"on each device: {int(total):,} bytes" in out
    assert "all parameters: 16,381,470,720 bytes (15.26 GiB)" in out
    assert "rank 1, host 0: devices 4 to 7" in out
    assert "CUDA_VISIBLE_DEVICES=4,5,6,7 JAXSERVE_COORDINATOR=127.0.0.1:4321" in out
    assert out.count(f"jaxserve serve --tensor-parallel-size 4 --data-parallel-size 2 {tmp_path} --port 8001") == 2


SCRIPT = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxserve.distributed import engine_options
from sharding.agreement import agree
from sharding.channel import open_program_channel
from sharding.launch import key_value_client

rank, size = jax.process_index(), jax.process_count()
mesh = Mesh(np.array(jax.devices()), ("x",))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, PartitionSpec("x")), lambda i: np.arange(4.0)[i])
print("sum", float(jax.jit(jnp.sum)(x)), engine_options(), sys.argv[1:], flush=True)
agree(key_value_client(), rank, size, "pages", "7", 10.0)
channel = open_program_channel("steps", 10.0)
for step in range(50):
    if rank == 0:
        channel.send({"step": step, "tokens": np.arange(step, dtype=np.int32)})
    else:
        message = channel.receive(10.0)
        assert message["step"] == step and message["tokens"].tolist() == list(range(step))
print("stepped", flush=True)
while sys.argv[1] == "wait":
    time.sleep(0.1)
channel.close()
"""


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """A mesh of two processes with two CPU devices each, and a script."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    timeouts = {"start": 30, "heartbeat": 10, "shutdown": 10, "stop": 3}
    return written(tmp_path, axes={"model": 4}, platform="cpu", processes_per_host=2, timeouts=timeouts), str(script)


def test_two_processes_compute_together(two: tuple[str, str]):
    mesh, script = two
    process = launch(mesh, "--", script, "go", "--flag")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for rank in range(2):
        options = "{'tensor_parallel_size': 4, 'data_parallel_size': 1}"
        assert f"[rank {rank}] sum 6.0 {options} ['go', '--flag']" in out
        assert f"[rank {rank}] stepped" in out


@pytest.mark.slow
def test_a_killed_process_ends_the_other_without_a_launcher(two: tuple[str, str]):
    """As under a scheduler: each rank is started by someone else, and nobody watches them."""
    mesh, script = two
    from sharding.processes import free_port

    common = {"JAXSERVE_WORLD_SIZE": "2", "JAXSERVE_COORDINATOR": f"127.0.0.1:{free_port()}"}
    ranks = [
        launch(mesh, "--", script, "wait", JAXSERVE_RANK=str(rank), JAXSERVE_LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    for process in ranks:
        assert process.stdout is not None
        while "stepped" not in process.stdout.readline():
            assert process.poll() is None
    begun = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate(timeout=10)
    _, err = ranks[0].communicate(timeout=30)
    assert time.monotonic() - begun < 30
    assert ranks[0].returncode != 0
    assert "another task died" in err


def test_ranks_with_different_files_do_not_start(two: tuple[str, str], tmp_path: Path):
    from sharding.processes import free_port

    mesh, script = two
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads(Path(mesh).read_text()) | {"engine": {"seed": 1}}
    common = {"JAXSERVE_WORLD_SIZE": "2", "JAXSERVE_COORDINATOR": f"127.0.0.1:{free_port()}"}
    ranks = [
        launch(path, "--", script, "go", JAXSERVE_RANK=str(rank), **common)
        for rank, path in enumerate([mesh, written(other, **values)])
    ]
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "the ranks differ in their mesh config, engine.seed (rank 0: none; rank 1: 1)" in err


def test_ranks_of_their_own_share_a_list(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxserve.distributed import current_rank, engine_options, gather, partition\n"
        "print(current_rank().rank, engine_options(), gather(partition([*range(7)])), flush=True)\n"
    )
    mesh = written(tmp_path, axes={"data": 2}, platform="cpu", processes_per_host=2, independent=True)
    out, err = launch(mesh, "--", str(script)).communicate(timeout=60)
    options = "{'tensor_parallel_size': 1, 'data_parallel_size': 1}"
    assert sorted(out.splitlines()) == [f"[rank {r}] {r} {options} [0, 1, 2, 3, 4, 5, 6]" for r in range(2)], err


@pytest.mark.slow
def test_offline_data_parallelism_by_rank(tiny_model: Path, tmp_path: Path, compilation_cache: str):
    """The example with two ranks, four prompts for one and three for the other."""
    mesh = written(tmp_path, axes={"data": 2}, platform="cpu", processes_per_host=2, independent=True,
                   engine={"compilation_cache_dir": compilation_cache})  # fmt: skip
    process = launch(mesh, "--", "examples/data_parallel.py", str(tiny_model), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert "[rank 0] rank 0 of 2: 4 prompts" in lines
    assert "[rank 1] rank 1 of 2: 3 prompts" in lines
    results = [line for line in lines if " -> " in line]
    assert [line.partition("' -> ")[0] for line in results] == [
        f"[rank 0] 'The number after {number} is" for number in range(7)
    ]
