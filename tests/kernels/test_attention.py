"""Every implementation of `paged_attention` against brute force."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUICK, Arrays, Case, attention, make

from pallas_kernels.attention import paged_attention

SCALE = 0.3


@functools.cache
def program(
    layer: int | None, window: int | None, soft_cap: float | None, implementation: str
) -> Callable[..., jax.Array]:
    """With a layer that is traced, the last argument, or known."""

    @jax.jit(compiler_options=QUICK)
    def call(q, kv, page_table, cu_q_lens, kv_lens, traced):
        options = {"scale": SCALE, "window": window, "soft_cap": soft_cap, "implementation": implementation}
        return paged_attention(q, kv, traced if layer is None else layer, page_table, cu_q_lens, kv_lens, **options)

    return call


def run(case: Case, arrays: Arrays, layer, implementation: str) -> np.ndarray:
    dtype = jnp.dtype(case.dtype)
    known, traced = (layer, 0) if isinstance(layer, int) else (None, layer)
    inputs = [jnp.asarray(x) for x in (arrays.page_table, arrays.cu_q_lens, arrays.kv_lens, traced)]
    call = program(known, case.window, case.soft_cap, implementation)
    out = call(jnp.asarray(arrays.q, dtype), jnp.asarray(arrays.kv, dtype), *inputs)
    assert out.dtype == dtype
    return np.asarray(out, np.float64)


def rounded(case: Case, arrays: Arrays) -> Arrays:
    """The arrays as the case's dtype holds them."""
    q, kv = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in (arrays.q, arrays.kv))
    return Arrays(q, kv, arrays.layer, arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(case: Case):
    arrays = rounded(case, make(case))
    expected = attention(arrays, SCALE, case.window, case.soft_cap)
    error = np.abs(run(case, arrays, arrays.layer, "xla") - expected)
    assert error.max(initial=0) < (2e-6 if case.dtype == "float32" else 1e-2)


def test_padding_rows_are_zero():
    case = next(case for case in CASES if case.name == "mixed")
    arrays = make(case)
    out = run(case, arrays, 1, "xla")
    assert not out[arrays.cu_q_lens[-1] :].any()
    assert np.abs(out[: arrays.cu_q_lens[-1]]).min() > 0


def test_traced_layer_selects_the_layer():
    case = next(case for case in CASES if case.name == "mixed")
    arrays = make(case)
    first, second = (run(case, arrays, layer, "xla") for layer in (0, 1))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(run(case, arrays, jnp.int32(0), "xla"), first)
    np.testing.assert_array_equal(run(case, arrays, jnp.int32(1), "xla"), second)


def test_a_batch_around_a_sequence_does_not_change_it():
    alone, mixed = Case("alone", (13,), (13,)), Case("mixed", (13, 1, 30), (13, 40, 47), pad_rows=20)
    arrays = make(mixed)
    single = Arrays(
        arrays.q[:13], arrays.kv, 1, arrays.page_table[:1], arrays.cu_q_lens[:2], arrays.kv_lens[:1]
    )  # fmt: skip
    together = run(mixed, arrays, 1, "xla")[:13]
    np.testing.assert_allclose(run(alone, single, 1, "xla"), together, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"implementation": "abacus"}, "abacus"),
    ],
)
def test_rejects_what_no_implementation_can_mean(change: dict, message: str):
    arrays = make(CASES[0])
    inputs = (arrays.q, arrays.kv, 0, arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)
    inputs = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
    with pytest.raises(ValueError, match=message):
        paged_attention(*inputs, scale=1.0, **change)
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4"):
        paged_attention(inputs[0], jnp.zeros((1, 2, 2, 4, 4, 16)), *inputs[2:], scale=1.0)
