"""The examples run as they are, with a tiny model, and stay short."""

import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tiny_model: Path, compilation_cache: str, monkeypatch: pytest.MonkeyPatch):
    """Run an example as a program; the model is its last argument."""
    monkeypatch.setenv("HOME", compilation_cache)  # where compiled programs go

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [name, *arguments, str(tiny_model)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_offline(run, capsys: pytest.CaptureFixture[str]):
    run("offline.py")
    assert capsys.readouterr().out.count(" -> ") == 3


def test_chat(run, capsys: pytest.CaptureFixture[str]):
    run("chat.py")
    shown = capsys.readouterr().out
    assert shown.count("user: ") == shown.count("assistant: ") == 2
    second = shown.splitlines()[-1]
    assert not second.strip().startswith("(0 of")  # the second turn found the first in the cache


def test_batch_jsonl(run, tmp_path: Path):
    rows = [{"prompt": "One", "max_tokens": 3}, {"prompt": ""}, {"prompt": "Three", "max_tokens": 2}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("batch_jsonl.py", str(source), str(target))
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["prompt"] for row in results] == ["One", "", "Three"]
    assert ["error" in row for row in results] == [False, True, False]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path):
    assert path.read_text().count("\n") < 40
