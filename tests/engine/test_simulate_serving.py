"""The simulation of a device against what can be worked out by hand."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_serving.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_serving", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_stream_takes_the_time_of_its_steps(script: ModuleType) -> None:
    device = script.Device(step=10e-3, token=0.0, cached=0.0)
    found = script.Simulation(device, script.Load(1, 1, host_seconds=0.0)).run()
    assert found["output tokens per second"] == pytest.approx(100, rel=0.01)  # one prompt, 191 decodes
    assert found["device busy"] == pytest.approx(1, abs=0.01)
    assert found["gaps ms, median and p99"] == [10.0, 10.0]
    assert found["first token ms, median and p99"] == [10.0, 10.0]


def test_prompts_take_the_time_of_their_program(script: ModuleType) -> None:
    device = script.Device(step=0.0, token=1e-5, cached=0.0)
    found = script.Simulation(device, script.Load(1, 1, host_seconds=0.0)).run()
    assert found["first token ms, median and p99"][0] == pytest.approx(2.6, abs=0.1)  # 256 tokens


def test_a_slow_host_bounds_one_decode_a_launch(script: ModuleType) -> None:
    """And not several: then it has less to do."""
    load = script.Load(512, 128, host_seconds=20e-3)
    slow = script.Simulation(script.Device(5e-3, 0.0, 0.0, decode_steps=1), load).run()
    assert slow["output tokens per second"] <= 128 / 20e-3
    assert slow["device busy"] < 0.3
    several = script.Simulation(script.Device(5e-3, 0.0, 0.0, decode_steps=8), load).run()
    assert several["device busy"] > 0.75
    assert several["output tokens per second"] > 3 * slow["output tokens per second"]


def test_the_command(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--requests", "60", "--streams", "20", "--lengths", "random", "--host-ms", "1", "2"]) == 0
    assert script.main(["--requests", "60", "--offline"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["host_seconds"] for line in lines] == [0.001, 0.002, 0.0035]
    assert [line["streams"] for line in lines] == [20, 20, None]
    assert all(line["steps"] > line["with prompts"] > 0 for line in lines)
