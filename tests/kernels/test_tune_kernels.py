"""The script that finds sizes of kernels: what it compares, who wins, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    found = pytest.importorskip("tune_kernels")
    monkeypatch.setattr("kernel_contests.COLD_BYTES", 1 << 16)
    monkeypatch.setattr(found, "ROUNDS", 3)
    monkeypatch.setattr(found, "SECONDS", 0.001)
    return found


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return pytest.importorskip("kernel_contests")


def test_the_products_of_a_model(script, contests):
    assert contests.products(script.read_config("qwen3-8b"), 1) == {
        (6144, 4096, "bfloat16"),
        (4096, 4096, "bfloat16"),
        (24576, 4096, "bfloat16"),
        (4096, 12288, "bfloat16"),
        (151936, 4096, "float32"),
    }
    assert (12288, 4096, "bfloat16") in contests.products(script.read_config("qwen3-8b"), 2)


def slow(x: jax.Array, weights: jax.Array) -> jax.Array:
    again = jax.lax.fori_loop(0, 30, lambda _, y: jnp.tanh(y @ weights.T @ weights), x)
    return x @ weights.T + (0 * jnp.sum(again)).astype(x.dtype)


def quick(x: jax.Array, weights: jax.Array) -> jax.Array:
    return x @ weights.T


def unfit(x: jax.Array, weights: jax.Array) -> jax.Array:
    raise NotImplementedError(f"{len(x)} tokens are not for me")


def test_the_fastest_wins_unless_it_is_wrong(script):
    candidates = {"xla": slow, "right": quick, "wrong": lambda x, weights: 0 * quick(x, weights), "unfit": unfit}
    key = {"outputs": 256, "inputs": 128}
    contest = script.Contest("matmul", key, 64, (128,), ((256, 128),), candidates)
    (result,) = script.hold([contest])
    assert result["winner"] == "right"
    assert set(result["us"]) == {"xla", "right"}
    assert result["out"] == {"wrong": "relative error 1.0e+00", "unfit": "64 tokens are not for me"}
    (result,) = script.hold([script.Contest("matmul", key, 64, (128,), ((256, 128),), {"xla": quick, "right": slow})])
    assert result["winner"] == "xla"


def test_results_join_what_is_known(script):
    known = {"limit": 64, "faster": [{"outputs": 8, "tokens": [4, 32]}, {"outputs": 16, "tokens": [4]}]}
    rows = [(8, 4, "xla"), (8, 16, "mosaic_gpu"), (16, 4, "xla"), (24, 4, "mosaic_gpu"), (32, 4, "xla")]
    results = [
        {"op": "matmul", "outputs": outputs, "tokens": tokens, "us": {}, "out": {}, "winner": winner}
        for outputs, tokens, winner in rows
    ]
    assert script.merge(known, results, {"mosaic_gpu": "tokens"}) == {
        "limit": 64,
        "faster": [{"outputs": 8, "tokens": [16, 32]}, {"outputs": 24, "tokens": [4]}],
    }
    assert known["faster"][0]["tokens"] == [4, 32]


@pytest.mark.parametrize("op", ["matmul", "gated_mlp", "paged_attention"])
def test_files_are_written_as_they_are(script, op: str):
    text = tuning.path("hopper", op).read_text()
    assert json.loads(script.shown(json.loads(text))) == json.loads(text)
    assert script.shown(json.loads(text)) == text


def test_a_size_is_changed_in_its_place(script):
    sizes = {"stages": 4, "long": {"block": 128, "stages": 2}}
    assert script.with_value(sizes, ("long", "stages"), 3) == {"stages": 4, "long": {"block": 128, "stages": 3}}
    assert sizes["long"]["stages"] == 2


def test_sizes_on_trial_hold_inside_only():
    before = tuning.tuned("hopper", "matmul")
    with tuning.trying("hopper", "matmul", {"faster": []}), tuning.trying("hopper", "gated_mlp", {"faster": [1]}):
        assert tuning.tuned("hopper", "matmul") == {"faster": []}
        assert tuning.tuned("hopper", "gated_mlp") == {"faster": [1]}
    assert tuning.tuned("hopper", "matmul") is before
    with pytest.raises(NotImplementedError, match="sizes of matmul for tpu v4 are not known"):
        tuning.tuned("tpu_v4", "matmul")


def test_says_that_it_needs_a_gpu():
    command = [sys.executable, str(SCRIPTS / "tune_kernels.py")]
    root = {"PYTHONPATH": str(SCRIPTS.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=root, check=False)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
