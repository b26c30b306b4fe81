"""`jaxserve compile`: plans, programs for this machine, and what cannot be."""

import json
import re
import runpy
from pathlib import Path

import jax
import pytest

from jaxserve.cli import compile as command
from jaxserve.cli import has_tpu, main
from jaxserve.cli.compile_job import choose, prepare
from jaxserve.config import EngineArgs
from jaxserve.engine.blueprint import buckets_of
from sharding import launch

LARGE = {  # as many bytes as Llama-3.1-70B in few layers
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 272 * 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "eos_token_id": 1,
}
TINY = LARGE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch):
    """The command must not change the variables of the other tests."""
    monkeypatch.setattr(launch, "set_environment", lambda variables: None)


@pytest.fixture
def large(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LARGE))
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)  # a folder without weights


def test_what_fits(large: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compile", large, "--target", "v6e-8", "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "target v6e-8: 8 chips of TPU v6e, topology 2x4, 1 host" in out
    assert "each shared by 8 devices" in out  # nobody said how to use the slice
    assert re.search(r"weights +16\.78 GiB", out)
    assert re.search(r"FITS: [\d,]+ pages, max_model_len 131,072", out)
    assert "upper bounds" in out


def test_what_does_not_fit_and_what_would(large: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compile", large, "--target", "v5e-8", "--plan-only", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert "no room for the cache (weights 16.78 GiB" in found["problems"][0]
    assert found["remedies"] == ["--tensor-parallel-size 16 would fit, such as on v5e-16"]


def test_a_shorter_context_would_fit(large: str, capsys: pytest.CaptureFixture[str]):
    options = ["--max-model-len", "131072", "--gpu-memory-utilization", "0.6"]
    assert main(["compile", large, "--target", "v5e-16", "--plan-only", *options]) == 1
    assert re.search(r"--max-model-len \d+ fits on these 16 device", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v9-8"], "generations are v4, v5e, v5p, v6e"),
        (["--target", "v5e-8", "--tensor-parallel-size", "3"], "v5e-8 has 8 chips"),
        (["--target", "v5e-8", "--tensor-parallel-size", "4", "--data-parallel-size", "1"], "are 4 devices"),
        (["--target", "v5e-8", "--programs", "some"], "'some' is not a number or one of essential, all"),
        (["--target", "v5e-8", "--jobs", "0"], "--jobs must be 1 or more"),
        (["--tensor-parallel-size", "64"], "be at most 8, the number of devices there are"),
    ],
)
def test_what_cannot_be(large: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compile", large, "--plan-only", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_the_mesh_file_counts(large: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("platform: tpu\naxes: {data: 2, model: 8}\nhosts: 4\nengine: {max_model_len: 4096}\n")
    assert main(["compile", large, "--target", "v6e-16", "--mesh", str(mesh), "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "in 2 copies, each shared by 8 devices" in out
    assert "max_model_len 4,096" in out


def test_programs_for_this_machine_are_kept(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    kept = tmp_path / "programs"
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the compilation cache
    arguments = ["compile", tiny, "--out", str(kept), "--programs", "4", "--max-num-seqs", "4", "--json"]
    assert main([*arguments, "--num-gpu-blocks-override", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    (program,) = found["programs"]
    assert program["bucket"] == {"tokens": 4, "seqs": 4, "level": "greedy", "edits": 0, "steps": 1}
    assert program["arguments"] >= found["plan"]["weights"] + found["plan"]["cache"]
    assert len(list((kept / "steps").glob("*.zlib"))) == 1


def test_words_choose_programs(tiny: str):
    buckets = buckets_of(prepare(EngineArgs(tiny, max_num_seqs=8), None, plan_only=True).config)
    everything = choose(buckets, ["all"])
    assert set(choose(buckets, ["decode", "prefill"])) == set(everything)
    assert set(choose(buckets, ["essential"])) == set(buckets.essential())
    assert {one.seqs for one in choose(buckets, ["greedy"])} == {1, 2, 4, 8}
    with pytest.raises(ValueError, match="no program for 3 decodes; there are 1, 2, 4, 8"):
        choose(buckets, ["3"])
    assert choose(buckets, ["largest"]) == [buckets.largest]
    assert all(choose(buckets, [word]) for word in command.CHOICES)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_programs")
def test_the_example_for_tpu_machines(tiny_model: Path, compilation_cache: str, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]):  # fmt: skip
    monkeypatch.setenv("HOME", compilation_cache)
    monkeypatch.setenv("JAXSERVE_TENSOR_PARALLEL_SIZE", "1")
    monkeypatch.setattr("sys.argv", ["tpu_vm.py", str(tiny_model)])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "tpu_vm.py"), run_name="__main__")
    assert capsys.readouterr().out.count(" -> ") == 4


def test_a_machine_without_a_tpu_is_told_by_its_devices(tmp_path: Path):
    assert not has_tpu(tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # there without any chip
    assert not has_tpu(tmp_path)
    (tmp_path / "vfio" / "0").touch()
    assert has_tpu(tmp_path)
