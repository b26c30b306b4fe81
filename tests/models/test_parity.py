"""Every family against logits that Hugging Face transformers computed for the same tiny weights.

A new family adds one file to goldens/ (scripts/make_goldens.py) and one row here.
"""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import models
from jaxserve.kv_cache import Chunks, KVCache
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import CausalLM
from jaxserve.models.table import expand

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDENS = Path(__file__).parent / "goldens"
PAGE = 4
NUM_PAGES = 40
PAGES_PER_SEQUENCE = 8
NUM_ROWS = 24
NUM_SEQUENCES = 3
TOLERANCE = 1e-5  # float32; measured: below 3e-6

# golden -> the longest sequence to be served, None for the config's own limit
CASES = {
    "llama": None,
    "llama_llama3": None,
    "llama_linear_biased": None,
    "llama_dynamic": None,
    "mistral": None,
    "qwen2": None,
    "qwen2_window": None,
    "qwen3": None,
    "qwen3_yarn": None,
    "gemma2": None,
    "gemma3": None,
    "phi3": None,
    "phi3_longrope_short": 32,
    "phi3_longrope_long": None,
}


class Golden(NamedTuple):
    hf_config: dict
    saved_config: dict
    weights: dict[str, np.ndarray]
    token_ids: np.ndarray
    logits: np.ndarray


def read_golden(name: str) -> Golden:
    with np.load(GOLDENS / f"{name}.npz") as file:
        weights = {
            key.removeprefix("weight:"): file[key].astype(np.float32)
            * 2.0 ** float(file[key.replace("weight", "exponent", 1)])
            for key in file.files
            if key.startswith("weight:")
        }
        configs = (json.loads(str(file[key])) for key in ("config", "saved_config"))
        return Golden(*configs, weights, file["token_ids"], file["logits"])


def load(golden: Golden, max_model_len: int | None, dtype: jnp.dtype) -> tuple[ModelConfig, CausalLM]:
    family = models.resolve(golden.hf_config)
    config = family.config(golden.hf_config, max_model_len)
    graphdef, state = models.abstract(family, config, dtype)
    rules = {rule.target: rule for rule in expand(family.rules(config), config.num_layers)}
    flat = []
    for path, parameter in nnx.to_flat_state(state):
        rule = rules.pop(".".join(map(str, path)))
        value = rule.build([golden.weights[source] for source in rule.sources])
        assert value.shape == parameter.shape, rule.target
        flat.append((path, parameter.replace(jnp.asarray(value, dtype))))
    assert not rules, f"rules without a parameter: {sorted(rules)}"
    return config, nnx.merge(graphdef, nnx.from_flat_state(flat))


class Part(NamedTuple):
    """Tokens `start:stop` of sequence `row`."""

    row: int
    start: int
    stop: int


def make_chunks(parts: list[Part], table: np.ndarray) -> Chunks:
    """The parts in order, padded to `NUM_ROWS` tokens and `NUM_SEQUENCES` sequences, so that one program serves all."""
    positions = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    pages = np.concatenate([table[part.row, np.arange(part.start, part.stop) // PAGE] for part in parts])
    lengths = [part.stop - part.start for part in parts]
    spare, idle = NUM_ROWS - len(positions), NUM_SEQUENCES - len(parts)
    return Chunks(
        positions=jnp.asarray(np.pad(positions, (0, spare)), jnp.int32),
        pages=jnp.asarray(np.pad(pages, (0, spare), constant_values=NUM_PAGES), jnp.int32),
        offsets=jnp.asarray(np.pad(positions % PAGE, (0, spare)), jnp.int32),
        page_table=jnp.asarray(
            np.stack([table[part.row] for part in parts] + [np.zeros_like(table[0])] * idle), jnp.int32
        ),
        cu_q_lens=jnp.asarray(np.cumsum([0, *lengths, *[0] * idle]), jnp.int32),
        kv_lens=jnp.asarray([part.stop for part in parts] + [0] * idle, jnp.int32),
    )


@partial(jax.jit, static_argnums=0)
def forward(
    graphdef: nnx.GraphDef, state: nnx.State, token_ids: jax.Array, chunks: Chunks, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    model = nnx.merge(graphdef, state)
    hidden, cache = model(token_ids, chunks, cache)
    return model.logits(hidden), cache


def run(config: ModelConfig, model: CausalLM, token_ids: np.ndarray, schedule: list[list[Part]]) -> dict:
    """Logits of every (row, position) the schedule computes."""
    table = np.random.default_rng(0).permutation(NUM_PAGES)[: 2 * PAGES_PER_SEQUENCE].reshape(2, -1)
    shape = KVCache.shape(config.num_layers, NUM_PAGES, config.num_kv_heads, PAGE, config.head_dim, platform="cpu")
    cache = KVCache(jnp.zeros(shape, model.norm.scale.dtype))
    graphdef, state = nnx.split(model)
    found = {}
    for parts in schedule:
        ids = np.concatenate([token_ids[part.start : part.stop] for part in parts])
        ids = jnp.asarray(np.pad(ids, (0, NUM_ROWS - len(ids))), jnp.int32)
        logits, cache = forward(graphdef, state, ids, make_chunks(parts, table), cache)
        places = [(part.row, position) for part in parts for position in range(part.start, part.stop)]
        found |= dict(zip(places, np.asarray(logits), strict=False))
    return found


def worst_error(found: dict, golden: Golden) -> float:
    """Largest difference from the golden logits, relative to the largest of them."""
    differences = (np.abs(logits - golden.logits[position]).max() for (_, position), logits in found.items())
    return float(max(differences) / np.abs(golden.logits).max())


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Golden, ModelConfig, CausalLM]:
    golden = read_golden(request.param)
    return golden, *load(golden, CASES[request.param], jnp.dtype(jnp.float32))


def test_whole_prefill(case: tuple[Golden, ModelConfig, CausalLM]) -> None:
    golden, config, model = case
    total = len(golden.token_ids)
    found = run(config, model, golden.token_ids, [[Part(0, 0, total)]])
    assert len(found) == total
    assert worst_error(found, golden) < TOLERANCE


def test_mixed_batch_of_chunks_and_decodes(case: tuple[Golden, ModelConfig, CausalLM]) -> None:
    """Two sequences of the same tokens: one in uneven chunks, one in small chunks and then token by token."""
    golden, config, model = case
    total = len(golden.token_ids)
    coarse, fine = [0, 1, 6, 11, 12, total - 1, total], [0, 3, 5, *range(6, total + 1)]
    schedule = [[Part(1, *span)] for span in pairwise(fine)]
    for parts, span in zip(schedule, pairwise(coarse), strict=False):
        parts.insert(0, Part(0, *span))
    found = run(config, model, golden.token_ids, schedule)
    assert len(found) == 2 * total
    assert worst_error(found, golden) < TOLERANCE


def test_config_means_the_same_in_both_spellings(case: tuple[Golden, ModelConfig, CausalLM]) -> None:
    """The hub's spelling and what transformers 5 writes when it saves the model."""
    golden, config, _ = case
    family = models.resolve(golden.hf_config)
    longest = 32 if config.rope.scale > 1 and golden.hf_config.get("original_max_position_embeddings") == 32 else None
    assert family.config(golden.saved_config, longest) == config


@pytest.mark.parametrize("name", ["llama_linear_biased", "gemma3", "phi3_longrope_long"])
def test_bfloat16_stays_close(name: str) -> None:
    golden = read_golden(name)
    config, model = load(golden, CASES[name], jnp.dtype(jnp.bfloat16))
    total = len(golden.token_ids)
    found = run(config, model, golden.token_ids, [[Part(0, 0, total)]])
    assert all(logits.dtype == np.float32 for logits in found.values())
    assert worst_error(found, golden) < 0.06
