"""The TPU kernel of `paged_attention`, interpreted on the CPU, against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUICK, Arrays, Case, attention, make
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu import TpuConfig, tpu_attention

SCALE = 0.3
CONFIG = TpuConfig(
    short_rows=8, long_rows=64, block_tokens=64, unrolled_rows=0, cores=1, vmem_bytes=64 << 20, smem_bytes=1 << 19
)


def run(case: Case, arrays: Arrays, config: TpuConfig, *, detect_races: bool = False) -> np.ndarray:
    dtype = jnp.dtype(case.dtype)
    options = {"scale": SCALE, "window": case.window, "soft_cap": case.soft_cap}
    interpret = pltpu.InterpretParams(detect_races=detect_races)

    @jax.jit(compiler_options=QUICK)
    def call(q, kv, *rest):
        return tpu_attention(q, kv, arrays.layer, *rest, **options, config=config, interpret=interpret)

    inputs = [jnp.asarray(x) for x in (arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)]
    out = call(jnp.asarray(arrays.q, dtype), jnp.asarray(arrays.kv, dtype), *inputs)
    assert out.dtype == dtype
    return np.asarray(out, np.float64)


def rounded(case: Case) -> Arrays:
    """The arrays of a case as its dtype holds them."""
    arrays = make(case)
    q, kv = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in (arrays.q, arrays.kv))
    return dataclasses.replace(arrays, q=q, kv=kv)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(case: Case):
    arrays = rounded(case)
    out = run(case, arrays, CONFIG)
    expected = attention(arrays, SCALE, case.window, case.soft_cap)
    assert np.abs(out - expected).max(initial=0) < (2e-6 if case.dtype == "float32" else 1e-2)
    assert not out[arrays.cu_q_lens[-1] :].any()
