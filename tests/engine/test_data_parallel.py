"""Several copies of the model in one program: the same tokens, balanced pools, none left waiting."""

from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, ParallelConfig, SamplingParams
from jaxserve.engine.balancer import Balancer
from jaxserve.engine.pages import Pages
from jaxserve.engine.scheduler import Scheduler
from jaxserve.types import Request, Sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [{"prompt_token_ids": np.random.default_rng(n).integers(1, 90, 3 + 6 * n).tolist()} for n in range(7)]
BASE = {"max_tokens": 10, "ignore_eos": True, "detokenize": False}
KINDS = {
    "greedy": SamplingParams(temperature=0.0, **BASE),
    "random": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=4, **BASE),
    "constrained": SamplingParams(temperature=0.0, repetition_penalty=1.5, logit_bias={5: 2.0}, logprobs=2, **BASE),
    "siblings": SamplingParams(temperature=1.0, n=3, seed=1, **BASE),
}


def run(model: Path, cache: str, **options: object) -> tuple[dict[str, list], list[int]]:
    """Tokens of every kind of request, and the prompt tokens that each pool admitted."""
    llm = LLM(
        str(model), load_format="dummy", skip_tokenizer_init=True, max_model_len=96, max_num_seqs=4,
        max_num_batched_tokens=32, block_size=4, compilation_cache_dir=cache, warmup="none", use_tqdm_on_load=False,
        **options,
    )  # fmt: skip
    tokens = {
        name: [[c.token_ids for c in output.outputs] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        for name, params in KINDS.items()
    }
    scheduler = llm.llm_engine.scheduler
    scheduler.check_integrity()
    assert scheduler.usage == 0
    admitted = [pool.pages.queried_tokens for pool in scheduler.pools]
    assert llm.reset_prefix_cache()
    llm.close()
    return tokens, admitted


@pytest.fixture(scope="module")
def alone(quick_compilation: None, tiny_model: Path, compilation_cache: str) -> dict[str, list]:
    return run(tiny_model, compilation_cache)[0]


@pytest.mark.parametrize(
    ("copies", "options"),
    [
        pytest.param(2, {}, id="two", marks=pytest.mark.slow),
        pytest.param(2, {"decode_steps": 4}, id="several decodes"),
        pytest.param(4, {"num_gpu_blocks_override": 26}, id="four, cramped"),
    ],
)
def test_copies_give_what_one_gives(alone, tiny_model: Path, compilation_cache: str, copies: int, options: dict):
    tokens, admitted = run(tiny_model, compilation_cache, data_parallel_size=copies, **options)
    assert tokens == alone
    assert len(admitted) == copies
    assert min(admitted) > max(admitted) / 4


def test_copies_of_shared_models(alone, tiny_model: Path, compilation_cache: str):
    tokens, _ = run(tiny_model, compilation_cache, data_parallel_size=2, tensor_parallel_size=2)
    assert tokens["greedy"] == alone["greedy"]
    assert tokens["constrained"] == alone["constrained"]


def sequence(name: str, prompt: int = 4) -> Sequence:
    tokens = np.zeros(prompt + 5, np.int32)
    request = Request(name, tokens[:prompt], SamplingParams(max_tokens=5))
    return Sequence(request, 0, 0, tokens, prompt, prompt, frozenset(), frozenset())


def test_requests_go_where_least_is_to_do():
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 16}
    balancer = Balancer([Scheduler(pages=Pages(16, 4, False), **limits) for _ in range(3)])
    siblings = [sequence("a"), sequence("a"), sequence("b"), sequence("c"), sequence("d")]
    for one in siblings:
        balancer.add(one)
    assert [one.pool for one in siblings] == [0, 0, 1, 2, 1]  # the first of equals; siblings stay together
    plan = balancer.schedule()
    assert plan is not None
    assert [len(work.sequences) for work in plan if work is not None] == [2, 2, 1]
    assert balancer.num_running == 5
    balancer.finish(siblings[3], "abort")
    last = sequence("e")
    balancer.add(last)
    assert last.pool == 2
    balancer.check_integrity()


def test_more_devices_than_there_are(tiny_model: Path):
    with pytest.raises(ValueError, match=r"must be at most 8, the number of devices .* 4 devices for each of 3 copies"):
        LLM(str(tiny_model), load_format="dummy", tensor_parallel_size=4, data_parallel_size=3)
    with pytest.raises(ValueError, match="data_parallel_size must be 1 or more, got 0"):
        ParallelConfig(data_parallel_size=0)
    assert ParallelConfig(4, 2).world_size_across_dp == 8
