"""What holds for every family without running it: rule tables, configs, registry."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import models
from jaxserve.models.config import SLIDING
from jaxserve.models.rope_scaling import build_rope
from jaxserve.models.table import expand

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))


def hf_config_of(path: Path) -> dict:
    with np.load(path) as file:
        return json.loads(str(file["config"]))


LLAMA = hf_config_of(Path(__file__).parent / "goldens" / "llama.npz")


def test_every_family_has_a_golden() -> None:
    assert {hf_config_of(path)["architectures"][0] for path in GOLDENS} == set(models.FAMILIES)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_rules_make_every_parameter_once_and_use_every_tensor_once(path: Path) -> None:
    hf_config = hf_config_of(path)
    family = models.resolve(hf_config)
    config = family.config(hf_config)
    _, state = models.abstract(family, config, jnp.dtype(jnp.bfloat16))
    flat = {".".join(map(str, at)): parameter for at, parameter in nnx.to_flat_state(state)}
    rules = expand(family.rules(config), config.num_layers)
    assert sorted(rule.target for rule in rules) == sorted(flat)
    sources = [source for rule in rules for source in rule.sources]
    with np.load(path) as file:
        weights = {key.removeprefix("weight:"): file[key] for key in file.files if key.startswith("weight:")}
    assert sorted(sources) == sorted(weights)
    for rule in rules:
        built = rule.build([weights[source].astype(jnp.bfloat16) for source in rule.sources])
        assert built.shape == flat[rule.target].shape
        assert built.dtype == jnp.bfloat16


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_parameters_name_an_axis_per_dimension(path: Path) -> None:
    hf_config = hf_config_of(path)
    family = models.resolve(hf_config)
    _, state = models.abstract(family, family.config(hf_config), jnp.dtype(jnp.float32))
    for at, parameter in nnx.to_flat_state(state):
        axes = parameter.get_metadata("axes")
        assert len(axes) == len(parameter.shape), at
        assert set(axes) <= {"V", "D", "K", "G", "H", "N", "F", None}, at


@pytest.mark.parametrize("path", [p for p in GOLDENS if p.stem in ("llama", "gemma3")], ids=lambda path: path.stem)
def test_random_weights_keep_activations_finite(path: Path) -> None:
    hf_config = hf_config_of(path)
    family = models.resolve(hf_config)
    config = family.config(hf_config)
    model = family.build(config, dtype=jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0))
    hidden = model.norm(model.embedding(jnp.arange(8)))
    logits = np.asarray(model.logits(hidden))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 50


def test_unknown_architecture_lists_the_supported_ones() -> None:
    for architectures in (["MambaForCausalLM"], [], None):
        with pytest.raises(ValueError, match=r"not supported; supported are LlamaForCausalLM, .*Phi3ForCausalLM"):
            models.resolve({"architectures": architectures})


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_unhandled_attribute_is_named(path: Path) -> None:
    hf_config = hf_config_of(path)
    family = models.resolve(hf_config)
    harmless = {"torch_dtype": "bfloat16", "use_cache": True, "some_new_feature": False, "other_feature": None}
    assert family.config(hf_config | harmless) == family.config(hf_config)
    with pytest.raises(ValueError, match="attention_sink=4"):
        family.config(hf_config | {"attention_sink": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is no multiple of num_key_value_heads=4"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "mystery"}}, "rope_type 'mystery'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast=3"),
    ],
)
def test_bad_llama_config_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.resolve(LLAMA).config(LLAMA | change)


def test_gemma_refuses_what_it_does_not_compute() -> None:
    config = next(hf_config_of(path) for path in GOLDENS if path.stem == "gemma3")
    for change in ({"attn_logit_softcapping": 50.0}, {"use_bidirectional_attention": True}):
        with pytest.raises(ValueError, match=next(iter(change))):
            models.resolve(config).config(config | change)


def test_dynamic_scaling_is_refused_past_the_trained_length() -> None:
    config = LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    family = models.resolve(config)
    assert family.config(config, 64).rope == family.config(LLAMA).rope
    with pytest.raises(ValueError, match="max_model_len <= 64"):
        family.config(config, 65)


def test_longrope_chooses_by_the_longest_sequence_served() -> None:
    settings = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0],
        "long_factor": [4.0, 8.0],
        "original_max_position_embeddings": 32,
    }

    def frequencies(max_model_len: int | None) -> list[float]:
        rope = build_rope(settings, head_dim=4, max_position_embeddings=128, max_model_len=max_model_len, theta=16.0)
        return list(rope.inv_freq)

    assert frequencies(32) == [1.0, 0.25]
    assert frequencies(33) == frequencies(None) == [0.25, 0.25 / 8]


def test_qwen_window_counts_from_the_upper_layers() -> None:
    config = next(hf_config_of(path) for path in GOLDENS if path.stem == "qwen2_window")
    family = models.resolve(config)
    read = family.config(config)
    assert [kind == SLIDING for kind in read.layer_types] == [False, True, True]
    assert read.window == 5
    off = family.config(config | {"use_sliding_window": False})
    assert off.window is None
    assert SLIDING not in off.layer_types
