"""`jaxserve bench offline`: the workload, and the command with a tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench import offline
from jaxserve.bench.offline import quantile
from jaxserve.bench.workload import Workload
from jaxserve.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@given(length=st.integers(1, 300), ratio=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_lengths_stay_within_the_ratio(length: int, ratio: float, seed: int):
    workload = Workload(length, length, ratio, seed=seed)
    requests = workload.requests(20, vocab_size=50)
    assert requests == workload.requests(20, vocab_size=50)
    low, high = max(1, round(length * (1 - ratio))), round(length * (1 + ratio))
    for prompt, output_len in requests:
        assert low <= len(prompt["prompt_token_ids"]) <= high
        assert low <= output_len <= high
        assert set(prompt["prompt_token_ids"]) <= set(range(50))
        assert len(prompt["prompt_token_ids"]) + output_len <= workload.longest


def test_quantile():
    assert quantile([], 0.5) == 0.0
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([float(i) for i in range(100)], 0.5) == 50.0
    assert quantile([float(i) for i in range(100)], 0.99) == 99.0


def test_the_command(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]):
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    sizes = ["--batch-sizes", "1,3", "--num-prompts", "4", "--input-len", "9", "--output-len", "5"]
    words = ["bench", "offline", *sizes, "--random-range-ratio", "0.5", "--output-json", str(report), *small]
    if importlib.util.find_spec("matplotlib"):
        words += ["--plot", str(picture)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "output tok/s" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [["1", "4"], ["3", "4"]]
    found = json.loads(report.read_text())
    expected = Workload(9, 5, 0.5, 4, seed=0).requests(4, 49152)
    for result in found["results"]:
        assert result["output_tokens"] == sum(length for _, length in expected)
        assert result["input_tokens"] == sum(len(prompt["prompt_token_ids"]) for prompt, _ in expected)
        assert result["output_tokens_per_second"] > 0
        assert 0 < result["time_to_first_token_median"] <= result["time_to_first_token_p99"] < result["seconds"]
        assert result["compilations_after_warmup"] == 0
    assert found["workload"]["range_ratio"] == 0.5
    assert found["compilations_after_warmup"] == 0
    assert found["dtype"] == "float32"
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_compilations_in_timed_runs_are_flagged(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compiled = iter([7, 9])  # after the run that is not timed, and at the end
    monkeypatch.setattr(offline, "count", lambda engine, name: next(compiled))
    sizes = ["--batch-sizes", "1", "--input-len", "9", "--output-len", "5"]
    assert main(["bench", "offline", *sizes, "--output-json", "-", *small]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["compilations_after_warmup"] == 2
    assert "2 programs were compiled during timed runs" in captured.err


def test_a_request_that_does_not_fit_is_said(small: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "offline", "--input-len", "300", "--batch-sizes", "1", *small]) != 0
    assert "256" in capsys.readouterr().err
    assert main(["bench", "offline", "--output-len", "250", "--batch-sizes", "1", *small]) != 0
    assert "256" in capsys.readouterr().err


def test_plotting_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "offline", "--plot", "x.png"]) == 1
    assert 'pip install "jaxserve[plot]"' in capsys.readouterr().err
