"""The accelerator form of plain-jax attention against brute force, on CPU and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUICK, Case, attention, make

from pallas_kernels.attention import batched, paged_attention

PROGRAM = jax.jit(batched.paged_attention, static_argnames=("scale", "window", "soft_cap"), compiler_options=QUICK)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(case: Case) -> None:
    arrays = make(case)
    q, kv = (jnp.asarray(x, case.dtype) for x in (arrays.q, arrays.kv))
    arrays = dataclasses.replace(arrays, q=np.asarray(q, np.float32), kv=np.asarray(kv, np.float32))
    inputs = [jnp.asarray(x) for x in (arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)]
    options = {"scale": 0.3, "window": case.window, "soft_cap": case.soft_cap}
    out = PROGRAM(q, kv, jnp.int32(arrays.layer), *inputs, **options)
    expected = attention(arrays, 0.3, case.window, case.soft_cap)
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert error.max(initial=0) < (2e-6 if case.dtype == "float32" else 2e-2)


def test_cuda_programs_use_this_form() -> None:
    arrays = make(CASES[0])
    inputs = [jnp.asarray(x) for x in (arrays.q, arrays.kv, arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)]
    traced = jax.jit(lambda q, kv, *rest: paged_attention(q, kv, 0, *rest, scale=1.0)).trace(*inputs)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu")}
    assert texts["cuda"].count("stablehlo.while") < texts["cpu"].count("stablehlo.while")
