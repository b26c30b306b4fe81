"""Every implementation of `write_kv` against assignments one by one, and that it works in place."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import QUICK
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import paged_attention
from pallas_kernels.kv_layout import as_cells
from pallas_kernels.kv_write import write_kv
from pallas_kernels.kv_write.mosaic_tpu import find_runs, tpu_write

SHAPE = (3, 7, 2, 3, 4, 8)  # L pages 2 K p H


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("on_tpu", [False, True])
def test_matches_assignments(dtype: str, tokens: int, traced: bool, on_tpu: bool, capsys: pytest.CaptureFixture[str]):
    cores = 1 + traced
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    rng = np.random.default_rng(tokens)
    kv = np.asarray(jnp.asarray(rng.standard_normal(SHAPE), dtype))
    k, v = (np.asarray(jnp.asarray(rng.standard_normal((tokens, 3, 8)), dtype)) for _ in range(2))
    cells = np.sort(rng.permutation(SHAPE[1] * SHAPE[4])[:tokens])
    pages, offsets = (cells // SHAPE[4]).astype(np.int32), (cells % SHAPE[4]).astype(np.int32)
    pages[tokens // 2 :: 3] = [SHAPE[1], SHAPE[1] + 9, -1][tokens % 3]  # padding rows

    expected = kv.copy()
    for t in range(tokens):
        if 0 <= pages[t] < SHAPE[1]:
            expected[1, pages[t], 0, :, offsets[t]] = k[t]
            expected[1, pages[t], 1, :, offsets[t]] = v[t]

    def call(kv, layer, *rest):
        if on_tpu:
            cells = as_cells(*rest[:2], 2, SHAPE[5])
            return tpu_write(kv, jnp.int32(layer), cells, *rest[2:], rows=2, cores=cores, interpret=interpret)
        return write_kv(kv, layer if traced else 1, *rest, implementation="xla")

    got = jax.jit(call, compiler_options=QUICK)(*(jnp.asarray(x) for x in (kv, np.int32(1), k, v, pages, offsets)))
    np.testing.assert_array_equal(np.asarray(got), expected)
    assert "RACE" not in capsys.readouterr().out  # that is all the interpreter does about one


def test_runs_end_with_tiles_pages_and_gaps():
    pages, offsets = [3, 3, 3, 3, 5, 9, -1, 5, 5, 5], [6, 7, 8, 9, 0, 0, 1, 2, 3, 5]
    starts, ends, count = find_runs(jnp.asarray(pages), jnp.asarray(offsets), 9, 8)
    runs = list(zip(starts[:count].tolist(), ends[:count].tolist(), strict=True))
    assert runs == [(0, 2), (2, 4), (4, 5), (7, 9), (9, 10)]


def test_rejects_another_dtype():
    k = jnp.zeros((1, 3, 8), jnp.bfloat16)
    index = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="bfloat16"):
        write_kv(jnp.zeros(SHAPE), 0, k, k, index, index)


CHAINED = (4, 600, 2, 2, 4, 8)  # L pages 2 K p H, float32


def compile_chained(tokens: int, seqs: int) -> tuple[int, int, str]:
    """Bytes of arguments that results take over, of working memory, and the program: all layers, one after another."""

    def step(kv, x, pages, offsets, *rest):
        for layer in range(CHAINED[0]):
            kv = write_kv(kv, layer, x[:, :2], x[:, 2:4], pages, offsets)
            x = x + paged_attention(x, kv, layer, *rest, scale=1.0)
        return kv, x

    ints = [(tokens,), (tokens,), (seqs, 8), (seqs + 1,), (seqs,)]
    args = [jax.ShapeDtypeStruct(CHAINED, "float32"), jax.ShapeDtypeStruct((tokens, 4, 8), "float32")]
    args += [jax.ShapeDtypeStruct(shape, "int32") for shape in ints]
    program = jax.jit(step, donate_argnums=0).lower(*args).compile()
    memory = program.memory_analysis()
    return memory.alias_size_in_bytes, memory.temp_size_in_bytes, program.as_text()


def test_chained_layers_never_copy_the_donated_cache(processes_of_users: None):
    """Writing and attending in every layer of one program leaves the cache where it is."""
    cache_bytes = np.prod(CHAINED) * 4
    cache_type = f"f32[{','.join(map(str, CHAINED))}]"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        for aliased, temporary, text in process.map(compile_chained, (4, 16), (4, 2)):
            assert aliased == cache_bytes
            assert temporary < cache_bytes / 10
            assert cache_type in text
            assert not re.search(rf"= {re.escape(cache_type)}\S* copy\(", text)
