"""Engine-ready checkpoints: round trip, and everything that must be refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, write_folder

from jaxserve.checkpoints import CheckpointError, read_generation_config, read_hf_config
from jaxserve.checkpoints.orbax import MANIFEST
from jaxserve.convert import convert
from jaxserve.weights import load_model
from sharding.mesh import make_mesh


class FakeTokenizer:
    """Stands for a transformers tokenizer: writes one file."""

    def __init__(self, path):
        self.path = path

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text(json.dumps(str(self.path)))


def run(model, out, **options):
    return convert(model, out, load_tokenizer=FakeTokenizer, show_progress=False, **options)


def load(path, **options):
    return load_model(path, show_progress=False, **options)


def assert_same(loaded, other):
    assert loaded.names == other.names
    for name, ours, theirs in zip(loaded.names, loaded.leaves, other.leaves, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), err_msg=name)


@pytest.fixture
def converted(tmp_path, folder):
    return run(folder, tmp_path / "out", dtype="bfloat16")


def test_round_trip_of_a_folder(folder, converted):
    loaded, direct = load(converted), load(folder, dtype="bfloat16")
    assert loaded.dtype == jax.numpy.bfloat16  # as stored, also on CPU
    assert loaded.family == direct.family
    assert loaded.model_config == direct.model_config
    assert_same(loaded, direct)
    assert read_hf_config(converted)["dtype"] == "bfloat16"
    assert "torch_dtype" not in read_hf_config(converted)
    assert read_generation_config(converted) == {"eos_token_id": [2, 3]}
    assert (converted / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert not list(converted.parent.glob(".*"))


def test_round_trip_of_a_gguf_file(tmp_path, gguf_file):
    out = run(gguf_file, tmp_path / "deep" / "out")
    assert_same(load(out, load_format="orbax"), load(gguf_file))
    assert json.loads((out / "tokenizer.json").read_text()) == str(gguf_file)
    assert read_generation_config(out) == read_generation_config(gguf_file)


def test_restored_onto_a_mesh_and_cast(folder, converted):
    mesh = make_mesh(data=2, model=2)
    loaded, direct = load(converted, mesh=mesh, dtype="float32"), load(folder, dtype="bfloat16", mesh=mesh)
    for ours, theirs in zip(loaded.leaves, direct.leaves, strict=True):
        assert ours.sharding == theirs.sharding
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs, np.float32))


def test_converting_twice(folder, converted, tmp_path):
    assert_same(load(run(converted, tmp_path / "again")), load(converted))


def test_existing_output_is_kept_unless_told(folder, converted, tmp_path):
    with pytest.raises(CheckpointError, match="already holds a converted model"):
        run(folder, converted)
    assert load(run(folder, converted, dtype="float32", overwrite=True)).dtype == np.float32
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds something other than a converted model"):
        run(folder, precious, overwrite=True)
    assert (precious / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="is the model itself"):
        run(converted, converted, overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert load(run(folder, empty)).family == "llama"


def test_failed_conversion_leaves_nothing(tmp_path, folder, tensors):
    class NoTokenizer(FakeTokenizer):
        def save_pretrained(self, folder):
            raise OSError("disk full")

    del tensors["model.norm.weight"]
    broken = write_folder(tmp_path / "broken", tensors)
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        run(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_incomplete_or_foreign_checkpoints(folder, converted, tmp_path):
    def copy(name):
        return shutil.copytree(converted, tmp_path / name)

    with pytest.raises(CheckpointError, match=r"has no jaxserve.json: it is not a complete checkpoint"):
        load(folder, load_format="orbax")

    broken = copy("no weights")
    shutil.rmtree(broken / "weights")
    with pytest.raises(CheckpointError, match="weights is incomplete, it lacks "):
        load(broken)

    broken = copy("cut short")
    largest = max((broken / "weights").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{largest.name} has [\d,]+ bytes instead of [\d,]+"):
        load(broken)

    broken = copy("no longer what Orbax wrote")
    metadata = broken / "weights" / "_METADATA"
    metadata.write_bytes(b"?" * metadata.stat().st_size)
    with pytest.raises(CheckpointError, match="weights is damaged"):
        load(broken)

    broken = copy("other family")
    (broken / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"family 'llama', but its config.json describes 'qwen3'"):
        load(broken)

    broken = copy("other size")
    (broken / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 41, "num_hidden_layers": 1}))
    words = r"also has layers.1.*and has embedding.table with shape \[40, 64\] where the model needs \[41, 64\]"
    with pytest.raises(CheckpointError, match=words):
        load(broken)

    broken = copy("other version")
    manifest = json.loads((broken / MANIFEST).read_text())
    (broken / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, not 1; convert the model again"):
        load(broken)
    (broken / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="lacks family, dtype, parameters, files"):
        load(broken)
