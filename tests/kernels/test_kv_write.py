"""Every implementation of `write_kv` against assignments one by one, and that it works in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import QUICK

from pallas_kernels.attention import paged_attention
from pallas_kernels.kv_write import OP, write_kv

SHAPE = (3, 7, 2, 3, 4, 8)  # L pages 2 K p H


@pytest.mark.parametrize("implementation", OP.table)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("traced", [False, True])
def test_matches_assignments(implementation: str, dtype: str, tokens: int, traced: bool):
    rng = np.random.default_rng(tokens)
    kv = np.asarray(jnp.asarray(rng.standard_normal(SHAPE), dtype))
    k, v = (np.asarray(jnp.asarray(rng.standard_normal((tokens, 3, 8)), dtype)) for _ in range(2))
    cells = rng.permutation(SHAPE[1] * SHAPE[4])[:tokens]
    pages, offsets = (cells // SHAPE[4]).astype(np.int32), (cells % SHAPE[4]).astype(np.int32)
    pages[tokens // 2 :: 3] = [SHAPE[1], SHAPE[1] + 9, -1][tokens % 3]  # padding rows

    expected = kv.copy()
    for t in range(tokens):
        if 0 <= pages[t] < SHAPE[1]:
            expected[1, pages[t], 0, :, offsets[t]] = k[t]
            expected[1, pages[t], 1, :, offsets[t]] = v[t]

    def call(kv, layer, *rest):
        return write_kv(kv, layer if traced else 1, *rest, implementation=implementation)

    got = jax.jit(call, compiler_options=QUICK)(*(jnp.asarray(x) for x in (kv, np.int32(1), k, v, pages, offsets)))
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_rejects_another_dtype():
    k = jnp.zeros((1, 3, 8), jnp.bfloat16)
    index = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="bfloat16"):
        write_kv(jnp.zeros(SHAPE), 0, k, k, index, index)


@pytest.mark.parametrize(("tokens", "seqs"), [(4, 4), (16, 2)])
def test_chained_layers_never_copy_the_donated_cache(tokens: int, seqs: int):
    """Writing and attending in every layer of one program leaves the cache where it is."""
    shape = (4, 600, 2, 2, 4, 8)

    def step(kv, x, pages, offsets, *rest):
        for layer in range(shape[0]):
            kv = write_kv(kv, layer, x[:, :2], x[:, 2:4], pages, offsets)
            x = x + paged_attention(x, kv, layer, *rest, scale=1.0)
        return kv, x

    ints = [(tokens,), (tokens,), (seqs, 8), (seqs + 1,), (seqs,)]
    args = [jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct((tokens, 4, 8), "float32")]
    args += [jax.ShapeDtypeStruct(shape, "int32") for shape in ints]
    program = jax.jit(step, donate_argnums=0).lower(*args).compile()
    memory = program.memory_analysis()
    cache_bytes = np.prod(shape) * 4
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 10
    cache_type = re.escape(f"f32[{','.join(map(str, shape))}]")
    assert not re.search(rf"= {cache_type}\S* copy\(", program.as_text())
