"""The model on several devices against the same checkpoint on one."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_families import FAMILIES, VOCAB, write_family

from jaxserve.kv_cache import Chunks, KVCache
from jaxserve.weights import ModelPlan, load_weights, plan_model
from sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGE, PAGES, TABLE = 4, 8, np.array([[5, 0, 3], [2, 7, 1]], np.int32)
LENGTHS = (7, 5)  # of two prompts, each of which is then continued by one token
TOKENS = sum(LENGTHS)  # of a step
TOLERANCE = 2e-6  # of float32 logits, relative to the largest


def make_chunks(starts: tuple[int, ...], stops: tuple[int, ...]) -> Chunks:
    """Positions `starts[s]:stops[s]` of each sequence, padded to `TOKENS`, so that one program serves all."""
    spans = [np.arange(start, stop, dtype=np.int32) for start, stop in zip(starts, stops, strict=True)]
    positions = np.concatenate(spans)
    pages = np.concatenate([TABLE[row, span // PAGE] for row, span in enumerate(spans)])
    pad = (0, TOKENS - len(positions))
    positions, pages = np.pad(positions, pad), np.pad(pages, pad, constant_values=PAGES)
    bounds = np.cumsum([0, *map(len, spans)], dtype=np.int32)
    return Chunks(positions, pages, positions % PAGE, TABLE, bounds, np.array(stops, np.int32))


def logits_of(plan: ModelPlan) -> np.ndarray:
    """Of every position of the prompts, and of the decode after them: `[TOKENS + 2, V]`."""

    def forward(leaves: tuple[jax.Array, ...], ids: jax.Array, chunks: Chunks, cache: KVCache):
        model = plan.merge(leaves)
        hidden, cache = model(ids, chunks, cache)
        return model.logits(hidden), cache

    config, mesh = plan.model_config, plan.mesh
    cache_shape = KVCache.shape(config.num_layers, PAGES, config.num_kv_heads, PAGE, config.head_dim)
    cache_spec = P(None, None, None, "model")
    if mesh.size > 1:
        weight_specs = tuple(leaf.sharding.spec for leaf in plan.parameters.values())
        ins, outs = (weight_specs, P(), P(), cache_spec), (P(None, "model"), cache_spec)
        forward = jax.shard_map(forward, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    step, leaves = jax.jit(forward), load_weights(plan, show_progress=False)
    cache = KVCache(jax.device_put(np.zeros(cache_shape, plan.dtype), NamedSharding(mesh, cache_spec)))
    ids = np.random.default_rng(0).integers(0, VOCAB, TOKENS + 2, np.int32)
    prefilled, cache = step(leaves, ids[:TOKENS], make_chunks((0, 0), LENGTHS), cache)
    longer = tuple(length + 1 for length in LENGTHS)
    decoded, _ = step(leaves, np.pad(ids[TOKENS:], (0, TOKENS - 2)), make_chunks(LENGTHS, longer), cache)
    return np.concatenate([prefilled, decoded[:2]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A checkpoint of a family, and its logits on one device."""
    folder = write_family(tmp_path_factory.mktemp(request.param), request.param)
    return folder, logits_of(plan_model(folder))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_logits_equal_those_of_one_device(family: tuple[Path, np.ndarray], parts: int) -> None:
    folder, expected = family
    plan = plan_model(folder, mesh=make_mesh(model=parts))
    found = logits_of(plan)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
