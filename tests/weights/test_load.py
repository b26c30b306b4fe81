"""Loading into placed arrays, from every format, and the errors of checkpoints that do not fit."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIG, write_folder, write_gguf

from jaxserve import models
from jaxserve.checkpoints import CheckpointError
from jaxserve.weights import load_model, resolve_dtype
from sharding.mesh import make_mesh


def load(path, **options):
    return load_model(path, show_progress=False, **options)


def expected_parameters(tensors):
    """Every parameter built straight from the tensors by the family's rules, without the loader."""
    family = models.resolve(CONFIG)
    config = family.config(CONFIG)
    made = {}
    for rule in family.rules(config):
        for i in range(config.num_layers if "{i}" in rule.target else 1):
            values = [tensors[name.replace("{i}", str(i))] for name in rule.sources]
            made[rule.target.replace("{i}", str(i))] = rule.build(values)
    return made


def assert_loaded(loaded, tensors, **tolerance):
    expected = expected_parameters(tensors)
    assert set(loaded.names) == set(expected)
    for name, leaf in zip(loaded.names, loaded.leaves, strict=True):
        np.testing.assert_allclose(np.asarray(leaf, np.float32), expected[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("shards", [1, 4])
def test_safetensors(tmp_path, tensors, shards):
    loaded = load(write_folder(tmp_path / "m", tensors, shards))
    assert loaded.dtype == jnp.float32  # on CPU
    assert loaded.family == "llama"
    assert_loaded(loaded, tensors, rtol=0)


def test_gguf(gguf_file, tensors):
    assert_loaded(load(gguf_file), tensors, rtol=0)


def test_quantised_gguf_is_near(tmp_path, tensors):
    assert_loaded(load(write_gguf(tmp_path / "q.gguf", tensors, {"*": "Q8_0"})), tensors, atol=0.03)


def test_bfloat16_checkpoint_becomes_float32_exactly(tmp_path, tensors):
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    exact = {name: value.astype(np.float32) for name, value in half.items()}
    loaded = load(write_folder(tmp_path / "m", half))
    assert {leaf.dtype for leaf in loaded.leaves} == {jnp.dtype(jnp.float32)}
    assert_loaded(loaded, exact, rtol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 2**-8), ("half", 2**-11), ("float", 0)])
def test_dtypes(folder, tensors, dtype, rtol):
    loaded = load(folder, dtype=dtype)
    assert {leaf.dtype for leaf in loaded.leaves} == {loaded.dtype}
    assert_loaded(loaded, tensors, rtol=rtol, atol=1e-6)
    assert loaded.total_bytes == sum(value.size for value in tensors.values()) * loaded.dtype.itemsize


def test_loaded_arrays_do_not_alias_the_file(folder, tensors):
    loaded = load(folder)
    file = folder / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_loaded(loaded, tensors, rtol=0)


def test_merge_restores_the_module(folder):
    loaded = load(folder)
    module = loaded.merge(loaded.leaves)
    for leaf, again in zip(loaded.leaves, jax.tree.leaves(nnx.state(module)), strict=True):
        assert leaf is again

    def total(leaves):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(nnx.state(loaded.merge(leaves))))

    direct = sum(float(np.asarray(leaf, np.float64).sum()) for leaf in loaded.leaves)
    assert float(jax.jit(total)(loaded.leaves)) == pytest.approx(direct, rel=1e-3)


def test_parameters_are_placed_by_the_rules(folder, tensors):
    mesh = make_mesh(data=2, model=2)
    loaded = load(folder, mesh=mesh)
    assert_loaded(loaded, tensors, rtol=0)
    by_name = dict(zip(loaded.names, loaded.leaves, strict=True))
    embedding = by_name["embedding.table"]
    assert embedding.sharding.shard_shape(embedding.shape) == (20, 64)
    assert by_name["norm.scale"].sharding.is_fully_replicated
    qkv = by_name["layers.1.attention.qkv.kernel"]
    assert qkv.sharding.shard_shape(qkv.shape)[0] == 1  # two KV heads over two devices
    with pytest.raises(ValueError, match="size=3 does not deal out 4 query heads and 2 key/value heads"):
        load(folder, mesh=make_mesh(model=3))


def test_fewer_kv_heads_than_devices_are_copied(folder, tensors):
    loaded, whole = load(folder, mesh=make_mesh(model=4)), load(folder)
    name = "layers.1.attention.qkv.kernel"
    copied, qkv = (dict(zip(one.names, one.leaves, strict=True))[name] for one in (loaded, whole))
    heads, group = len(qkv), qkv.shape[1] - 2  # query heads per key head, then its key and its value
    for device in range(4):
        head, half = divmod(device, 2)
        queries = qkv[head, half * group // 2 : (half + 1) * group // 2]
        np.testing.assert_array_equal(copied[device], np.concatenate([queries, qkv[head, group:]]))
    assert heads == 2


def test_auto_dtype_on_an_accelerator():
    resolve = partial(resolve_dtype, platform="gpu")
    names = [resolve("auto", config).name for config in (
        {"dtype": "float32"}, {"torch_dtype": "float16"}, {"dtype": "bfloat16"}, {})]  # fmt: skip
    assert names == ["bfloat16", "float16", "bfloat16", "bfloat16"]
    assert resolve("auto", {}, stored="float32") == np.float32
    assert resolve_dtype("auto", {"dtype": "bfloat16"}, "cpu") == np.float32
    with pytest.raises(ValueError, match="'int8' is not one of auto, bfloat16"):
        resolve_dtype("int8", {}, "cpu")


def test_dummy_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    mesh = make_mesh(model=2)
    loaded = load(folder, load_format="dummy", dtype="bfloat16", seed=3, mesh=mesh)
    same, other = (load(folder, load_format="dummy", dtype="bfloat16", seed=seed) for seed in (3, 4))
    for name, leaf, again, another in zip(loaded.names, loaded.leaves, same.leaves, other.leaves, strict=True):
        values = np.asarray(leaf, np.float32)
        np.testing.assert_array_equal(values, np.asarray(again, np.float32))
        if name.endswith(".scale"):
            assert (values == 1).all()
        else:
            assert values.std() == pytest.approx(64**-0.5, rel=0.05)
            assert abs(values.mean()) < 0.01
            flat = values.reshape(-1) / values.std()
            assert max(abs((flat[lag:] * flat[:-lag]).mean()) for lag in (1, 2, 64)) < 0.1
            assert (values != np.asarray(another, np.float32)).mean() > 0.9
    assert len({np.asarray(leaf, np.float32).tobytes() for n, leaf in zip(loaded.names, loaded.leaves, strict=True)
                if n.endswith("kernel")}) == sum(n.endswith("kernel") for n in loaded.names)  # fmt: skip


def test_missing_and_extra_tensors_in_one_error(tmp_path, tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"], tensors["lm_head.weight"]
    tensors |= {"model.layers.2.mlp.up_proj.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError) as caught:
        load(write_folder(tmp_path / "m", tensors))
    message = str(caught.value)
    assert "lacks 2 of the model's tensors: lm_head.weight, model.layers.1.mlp.down_proj.weight" in message
    assert "has 1 tensors (in model.safetensors) that the model does not use: model.layers.2.mlp.up_proj" in message
    assert str(tmp_path / "m") in message


def test_tensors_that_carry_nothing_are_ignored(tmp_path, tensors):
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    loaded = load(write_folder(tmp_path / "m", tensors, config=tied))
    assert "lm_head.kernel" not in loaded.names


@pytest.mark.parametrize(
    ("name", "shape", "parameter"),
    [
        ("model.embed_tokens.weight", (41, 64), r"embedding.table \[40, 64\]"),
        ("model.layers.1.self_attn.k_proj.weight", (48, 64), r"layers.1.attention.qkv.kernel \[2, "),
        ("model.layers.1.self_attn.v_proj.weight", (31, 64), r"layers.1.attention.qkv.kernel \[2, "),
        ("model.layers.0.mlp.up_proj.weight", (95, 64), r"layers.0.mlp.gate_up.kernel"),
        ("model.layers.0.self_attn.o_proj.weight", (64, 60), r"layers.0.attention.out.kernel"),
        ("model.norm.weight", (1, 64), r"norm.scale \[64\]"),
    ],
)
def test_misshapen_tensors(tmp_path, tensors, name, shape, parameter):
    tensors[name] = np.ones(shape, np.float32)
    words = rf"model.safetensors: .*{name} \[{', '.join(map(str, shape))}\].* do not fit the model's {parameter}"
    with pytest.raises(CheckpointError, match=words):
        load(write_folder(tmp_path / "m", tensors))


def test_unknown_format_and_architecture(folder):
    with pytest.raises(ValueError, match="load_format='pickle' is not one of auto, safetensors"):
        load(folder, load_format="pickle")
    with pytest.raises(ValueError, match="'NoSuchModel' is not supported"):
        load(folder, hf_config={**CONFIG, "architectures": ["NoSuchModel"]})


def test_progress_counts_the_bytes(folder, tensors, capsys):
    load_model(folder)
    err = capsys.readouterr().err
    total = sum(value.nbytes for value in tensors.values())
    assert "Loading weights: 100%" in err
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in err
