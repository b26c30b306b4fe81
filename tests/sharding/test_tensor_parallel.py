"""The model and the engine on several devices against the same checkpoint on one."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_families import BASE, FAMILIES, VOCAB, write_family

from jaxserve import LLM, SamplingParams
from jaxserve.batch import Level
from jaxserve.kv_cache import Chunks, KVCache
from jaxserve.types import RequestOutput
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
    cache_shape = KVCache.shape(config.num_layers, PAGES, config.num_kv_heads, PAGE, config.head_dim, platform="cpu")
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


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4, 8])
def test_logits_equal_those_of_one_device(family: tuple[Path, np.ndarray], parts: int) -> None:
    folder, expected = family
    plan = plan_model(folder, mesh=make_mesh(model=parts))
    found = logits_of(plan)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_of_no_token_make_a_vocabulary_even(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name, vocab_size=VOCAB + 3)
    expected = logits_of(plan_model(folder))
    plan = plan_model(folder, mesh=make_mesh(model=4))
    found = logits_of(plan)
    assert found.shape[1] == plan.model_config.vocab_rows == 4 * 128
    assert (found[:, VOCAB + 3 :] == -np.inf).all()
    found = found[:, : VOCAB + 3]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


LARGE = 4096  # of a vocabulary, so that its logits are far more than the candidates of a row
SEQS, LAYERS, PARTS = 4, 2, 4
PROMPTS = [np.random.default_rng(n).integers(0, LARGE, 3 + 4 * n).tolist() for n in range(6)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with two KV heads and all biases, and many tokens, one more than devices can share evenly."""
    folder = tmp_path_factory.mktemp("large")
    return write_family(folder, "llama", num_hidden_layers=LAYERS, vocab_size=LARGE + 1)


def build(folder: Path, cache: str, parts: int, **options: object) -> LLM:
    return LLM(
        str(folder), dtype="float32", tensor_parallel_size=parts, skip_tokenizer_init=True, max_model_len=48,
        max_num_seqs=SEQS, max_num_batched_tokens=16, block_size=4, num_gpu_blocks_override=48,
        compilation_cache_dir=cache, warmup="none", **options,
    )  # fmt: skip


GREEDY = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, "detokenize": False}
SCORED = SamplingParams(**GREEDY, logprobs=4, prompt_logprobs=2)


def answers(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(PROMPTS, params, use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(quick_compilation: None, large: Path, compilation_cache: str) -> list[RequestOutput]:
    """What one device says."""
    return answers(build(large, compilation_cache, 1), SCORED)


@pytest.fixture(scope="module")
def four(quick_compilation: None, large: Path, compilation_cache: str) -> Iterator[LLM]:
    """An engine on four devices, with fewer KV heads than that."""
    llm = build(large, compilation_cache, PARTS)
    yield llm
    llm.llm_engine.close()


def same_scores(mine: list, theirs: list) -> None:
    """Two lists of `{token: Logprob}`."""
    for here, there in zip(mine, theirs, strict=True):
        assert (here is None) == (there is None)
        if here is None:
            continue
        assert here.keys() == there.keys()
        for token, entry in here.items():
            assert entry.logprob == pytest.approx(there[token].logprob, abs=1e-5)
            assert entry.rank == pytest.approx(there[token].rank, rel=0.005)  # far down, neighbours are all but equal


@pytest.mark.slow
def test_an_engine_on_two_devices_says_what_one_says(
    large: Path, compilation_cache: str, expected: list[RequestOutput]
) -> None:
    """Plain greedy requests, whose programs compile fastest."""
    found = answers(build(large, compilation_cache, 2), SamplingParams(**GREEDY))
    assert tokens(found) == tokens(expected)


def test_an_engine_on_four_devices_says_what_one_says(four: LLM, expected: list[RequestOutput]) -> None:
    found = answers(four, SCORED)
    assert tokens(found) == tokens(expected)
    for mine, theirs in zip(found, expected, strict=True):
        same_scores(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
        same_scores(mine.prompt_logprobs, theirs.prompt_logprobs)


def test_a_seed_gives_the_same_draws_again(four: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_k=50, seed=3, max_tokens=8, ignore_eos=True, detokenize=False)
    first, again, other = (tokens(answers(four, one)) for one in (params, params, replace(params, seed=4)))
    assert first == again != other


def collectives(program: str) -> dict[str, list[tuple[int, str]]]:
    """Kind of each collective operation in compiled HLO -> size of the result and the scope it comes from."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found: dict[str, list[tuple[int, str]]] = {}
    for line in program.splitlines():
        if match := re.search(rf" = (.*?)\s({kinds})(?:-start)?\(", line):
            sizes = (
                math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", match[1])
            )
            scope = re.search(r'op_name="([^"]*)"', line)
            found.setdefault(match[2], []).append((max(sizes), scope[1] if scope else ""))
    return found


@pytest.mark.parametrize("level", [Level.GREEDY, Level.SAMPLE])
def test_a_decode_sums_once_a_block_and_gathers_no_logits(four: LLM, level: Level) -> None:
    runner = four.llm_engine.runner
    compiled = runner.programs.get(runner.buckets.choose(SEQS, SEQS, level, 0))
    found = collectives(compiled.as_text())
    assert set(found) <= {"all-reduce", "all-gather"}
    hidden = [scope for size, scope in found["all-reduce"] if size >= SEQS * BASE["hidden_size"]]
    places = {"embedding/all_reduce": 1} | {f"layer_{layer}/jit(run_block)/all_reduce": 2 for layer in range(LAYERS)}
    for place, count in places.items():
        assert sum(place in scope for scope in hidden) == count, place
    assert len(hidden) == sum(places.values())
    rounds = 16 * SEQS  # sums above a few thresholds of each row
    assert all(size == SEQS * BASE["hidden_size"] or size <= rounds for size, _ in found["all-reduce"])
    assert rounds < SEQS * BASE["hidden_size"]
    candidates = 128 * PARTS * SEQS
    assert all(size <= candidates for size, _ in found["all-gather"])
    assert candidates < SEQS * LARGE / 4


@pytest.mark.parametrize("level", [Level.GREEDY, Level.SAMPLE])
def test_each_device_writes_its_cache_in_place(four: LLM, level: Level) -> None:
    runner = four.llm_engine.runner
    compiled = runner.programs.get(runner.buckets.choose(SEQS, SEQS, level, 0))
    state = jax.tree.leaves(runner._state)
    assert [part.data.shape[3] for part in state[0].addressable_shards] == [1] * PARTS  # two heads, each copied
    own = [leaf.addressable_shards[0].data for leaf in state]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(part.nbytes for part in own)
    shape = ",".join(map(str, own[0].shape))
    assert f"[{shape}]" in compiled.as_text()
    assert not re.search(rf"\[{shape}\]\S* (copy|copy-start)\(", compiled.as_text())


def config_only(folder: Path, **changes: object) -> Path:
    """A folder from which nothing can be loaded."""
    (folder / "config.json").write_text(json.dumps(BASE | FAMILIES["llama"] | changes))
    return folder


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (3, {}, r"tensor_parallel_size=3 .* 8 query heads and 2 key/value heads .*choose one of 1, 2, 4, 8$"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            r"=4 .* out 6 key/value heads .* one of 1, 2, 3, 6, 12$",
        ),
        (8, {"intermediate_size": 44}, r"=8 .* out 44 MLP columns \(intermediate_size\) .* one of 1, 2, 4$"),
        (
            16,
            {},
            "tensor_parallel_size .*must be at most 8, the number of devices there are; .*, got 16",
        ),
        (0, {}, "tensor_parallel_size must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_split_is_refused_at_once(tmp_path: Path, parts: int, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(config_only(tmp_path, **changes)), tensor_parallel_size=parts, skip_tokenizer_init=True)
