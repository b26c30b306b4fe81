"""The checkpoint readers: what they return, and how they refuse damaged or unsafe files."""

import json
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import HEADS, KV_HEADS, interleave, write_folder, write_gguf

from jaxserve.checkpoints import (
    CheckpointError,
    GGUFFile,
    open_checkpoint,
    read_generation_config,
    read_hf_config,
)
from jaxserve.checkpoints.gguf import unpermute
from jaxserve.checkpoints.gguf_file import QUANTISED, dequantise


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_are_read_as_written(tmp_path, tensors, shards):
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, shards))
    assert checkpoint.names() == set(tensors)
    for name, value in tensors.items():
        assert checkpoint.shape(name) == value.shape
        assert checkpoint.nbytes(name) == value.nbytes
        np.testing.assert_array_equal(checkpoint.read(name), value)
    files = {checkpoint.file(name).name for name in tensors}
    assert len(files) == shards


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_safetensors_of_half_precision(tmp_path, tensors, dtype):
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors))
    for name, value in tensors.items():
        assert checkpoint.read(name).dtype == dtype
        np.testing.assert_array_equal(checkpoint.read(name), value)


def test_gguf_equals_the_tensors_it_was_made_from(gguf_file, tensors):
    checkpoint = open_checkpoint(gguf_file)
    assert checkpoint.names() == set(tensors)
    for name, value in tensors.items():
        assert checkpoint.shape(name) == value.shape
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_types(tmp_path, tensors, kind):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, {"*": kind}))
    steps = {"F16": 2e-3, "BF16": 0.02, "Q8_0": 0.03, "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.4, "Q4_1": 0.4}
    for name, value in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == (value.dtype if value.ndim == 1 or kind.startswith("Q") else
                              {"F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])  # fmt: skip
        assert np.abs(read.astype(np.float32) - value).max() < steps[kind], name


@pytest.mark.parametrize("kind", QUANTISED)
def test_dequantise_agrees_with_the_gguf_package(kind):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (700_000 // block, size), dtype=np.uint8)
    raw[:, -4:] = raw[:, :4] = 0x2A  # scales, wherever they are, stay finite
    with np.errstate(all="ignore"):
        expected, found = gguf.dequantize(raw, kind), dequantise(raw.reshape(-1), kind)
    np.testing.assert_array_equal(found, expected.reshape(-1))


def test_unpermute_inverts_llama_cpp_row_order():
    rows = np.arange(HEADS * 16 * 3).reshape(-1, 3)
    np.testing.assert_array_equal(unpermute(interleave(rows, HEADS), HEADS), rows)
    bias = np.arange(KV_HEADS * 16)
    np.testing.assert_array_equal(unpermute(interleave(bias, KV_HEADS), KV_HEADS), bias)
    np.testing.assert_array_equal(unpermute(np.array([0, 2, 1, 3]), 1), [0, 1, 2, 3])
    with pytest.raises(CheckpointError, match="10 rows cannot be split into 4 heads"):
        unpermute(np.zeros((10, 3)), 4)


def test_gguf_metadata_agrees_with_the_gguf_package(gguf_file):
    fields = gguf.GGUFReader(gguf_file).fields
    expected = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert GGUFFile(gguf_file).metadata == expected


def test_gguf_arrays_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {"s": ["ä", "", "x" * 300], "i": [-1, 2], "f": [0.5, 1.5], "b": [True, False], "big": list(range(70000))}
    for key, value in values.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert {key: metadata[key] for key in values} == values


def damage(file, how):
    data = file.read_bytes()
    file.write_bytes(how(data))
    return file


SAFETENSORS_DAMAGE = {
    "header size": (lambda data: b"\xff" * 8 + data[8:], "header too large"),
    "header text": (lambda data: data[:8] + b"?" * 20 + data[28:], "invalid JSON"),
    "truncated data": (lambda data: data[: len(data) // 2], "not fully covered"),
    "truncated header": (lambda data: data[:40], "header"),
    "empty": (lambda data: b"", "0 bytes"),
}


@pytest.mark.parametrize("name", SAFETENSORS_DAMAGE)
def test_damaged_safetensors(folder, name):
    how, words = SAFETENSORS_DAMAGE[name]
    damage(folder / "model.safetensors", how)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is damaged.*{words}"):
        open_checkpoint(folder)


GGUF_DAMAGE = {
    "magic": (lambda data: b"XXXX" + data[4:], "starts with b'XXXX' instead of b'GGUF'"),
    "version": (lambda data: data[:4] + struct.pack("<I", 99) + data[8:], "version 99"),
    "half": (lambda data: data[: len(data) // 2], r"cut short: tensor .* ends at byte .* but the file has"),
    "header cut": (lambda data: data[:200], "ends inside its header"),
    "huge string": (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "ends inside its header"),
    "huge count": (lambda data: data[:8] + struct.pack("<Q", 1 << 62) + data[16:], "GGUF|header"),
    "unknown value type": (lambda data: data[:52] + b"\x77" + data[53:], "malformed"),
    "empty": (lambda data: b"", "empty"),
}


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_damaged_gguf(gguf_file, name):
    how, words = GGUF_DAMAGE[name]
    damage(gguf_file, how)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(gguf_file)
    assert str(gguf_file) in str(caught.value)


def test_gguf_of_another_architecture_or_a_part(tmp_path):
    for arch, split, words in (("mamba", 1, "'mamba'; GGUF files are supported for llama"), ("llama", 2, "--merge")):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
        writer.add_uint16("split.count", split)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / "m.gguf")


def test_unsupported_tensor_types(tmp_path, folder, tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: np.zeros((4, 4), ml_dtypes.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight \[4, 4\] is stored as F8_E4M3"):
        open_checkpoint(folder).read(name)
    file = write_gguf(tmp_path / "q.gguf", {name: np.ones((2, 256), np.float32)}, {name: "TQ1_0"})
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight has type TQ1_0"):
        open_checkpoint(file).read(name)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../x.safetensors", "x.bin"]
)
def test_index_stays_in_its_folder(tmp_path, tensors, file):
    folder = write_folder(tmp_path / "m", tensors, shards=2)
    save_file({"model.norm.weight": np.ones(3, np.float32)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(folder)


def test_index_that_disagrees_with_its_files(tmp_path, tensors):
    folder = write_folder(tmp_path / "m", tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"ghost": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="lists tensors that its files lack: ghost"):
        open_checkpoint(folder)
    index.write_text(json.dumps(listed))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002.safetensors"):
        open_checkpoint(folder)
    index.write_text("{not json")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        open_checkpoint(folder)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(folder)


def test_the_same_tensor_twice_without_an_index(folder):
    save_file({"model.norm.weight": np.ones(3, np.float32)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight is both in .*model-2.safetensors and in"):
        open_checkpoint(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle checkpoint.*refused.*safetensors"):
        open_checkpoint(folder)


def test_empty_folder_and_wrong_format(tmp_path, folder, gguf_file):
    with pytest.raises(CheckpointError, match=r"no .safetensors files"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a gguf model, but load_format='safetensors'"):
        open_checkpoint(gguf_file, "safetensors")
    with pytest.raises(CheckpointError, match="is a safetensors model, but load_format='gguf'"):
        open_checkpoint(folder, "gguf")


def test_configs_of_a_folder(tmp_path, folder):
    assert read_hf_config(folder)["hidden_size"] == 64
    assert read_generation_config(folder) == {"eos_token_id": [2, 3]}
    (folder / "generation_config.json").unlink()
    assert read_generation_config(folder) == {}
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json must hold a JSON object, not list"):
        read_hf_config(folder)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        read_hf_config(tmp_path)
