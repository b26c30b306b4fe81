"""The memory plan, without any device."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import models
from jaxserve.batch import Bucket
from jaxserve.config import EngineArgs, EngineConfig, resolve
from jaxserve.engine.memory import GIB, MemoryPlan, estimate_working, page_bytes, plan_memory

HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 2,
}  # fmt: skip
MODEL = models.resolve(HF).config(HF)
DTYPE = np.dtype(np.float16)
PAGE = page_bytes(MODEL, 64, DTYPE, "gpu")


def configure(**options: int | str | None) -> EngineConfig:
    return resolve(EngineArgs(**options), HF, {}, "gpu")


def plan(config: EngineConfig, limit: int | None, weights: int = GIB, working: int = GIB) -> MemoryPlan:
    return plan_memory(config, MODEL, limit, weights=weights, working=working, dtype=DTYPE)


@given(room=st.integers(64 * PAGE, 60 * GIB))
def test_the_cache_takes_what_is_left_but_one_percent(room: int):
    made = plan(configure(), 2 * GIB + room)
    assert room * 0.99 - PAGE <= made.cache <= room
    assert made.weights + made.working + made.cache <= made.limit == 2 * GIB + room
    assert f"{made.num_pages:,} pages" in made.table()


def test_a_little_memory_more_or_less_gives_the_same_pages():
    limits = [40 * GIB + n * (1 << 20) for n in range(20)]
    assert len({plan(configure(), limit).num_pages for limit in limits}) <= 2


def test_options_fix_the_size():
    assert plan(configure(num_gpu_blocks_override=77), 40 * GIB).num_pages == 77
    assert plan(configure(kv_cache_memory_bytes=GIB), 40 * GIB).num_pages == GIB // PAGE
    assert plan(configure(num_gpu_blocks_override=77), None).limit == 2 * GIB + 77 * PAGE


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="one request of max_model_len=4,096 tokens needs 64 pages"):
        plan(configure(max_model_len=4096), 2 * GIB + 63 * PAGE)
    assert plan(configure(), 2 * GIB + 63 * PAGE).max_model_len == 63 * 64  # nobody asked for 4,096
    with pytest.raises(ValueError, match="raise gpu_memory_utilization"):
        plan(configure(), GIB)
    assert plan(replace(configure(), fit_max_model_len=False), 2 * GIB + 64 * PAGE).max_model_len == 4096


def test_the_smallest_step_of_a_gpu_has_room_for_plain_attention():
    """Which took 62 MiB for 32 tokens of SmolLM2 in float32; nothing corrects the guess without a warm-up."""
    small = estimate_working(MODEL, Bucket(32, 8), DTYPE, "gpu")
    assert 100 << 20 < small < 200 << 20
    assert estimate_working(MODEL, Bucket(32, 8), DTYPE, "cpu") < 10 << 20
    assert estimate_working(MODEL, Bucket(1 << 20, 8), DTYPE, "gpu") > 1 << 30
