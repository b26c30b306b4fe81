"""Pages of any layout give the same attention; on TPUs they fill whole lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import QUICK
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import paged_attention
from pallas_kernels.attention.mosaic_tpu import TpuConfig, tpu_attention
from pallas_kernels.kv_layout import as_queries, from_values, page_layout
from pallas_kernels.kv_write import write_kv

CONFIG = TpuConfig(
    short_rows=2, long_rows=8, block_tokens=16, unrolled_rows=0, cores=1, vmem_bytes=64 << 20, smem_bytes=1 << 19
)


@pytest.mark.parametrize(
    ("head_width", "layout"), [(16, (1, 128)), (64, (1, 128)), (80, (2, 128)), (128, (2, 128)), (256, (2, 256))]
)
def test_layout_on_tpus(head_width: int, layout: tuple[int, int]):
    assert page_layout(head_width, lanes=128) == layout
    assert page_layout(head_width) == (2, head_width)


@pytest.mark.parametrize("layout", [(1, 16), (1, 32), (2, 12)])
@pytest.mark.parametrize("on_tpu", [False, True])
def test_attention_is_the_same(layout: tuple[int, int], on_tpu: bool):
    rng = np.random.default_rng(0)
    tokens, width, pages, page = 13, 8, 9, 4
    q, k, v = (jnp.asarray(rng.standard_normal((tokens, heads, width)), "float32") for heads in (6, 2, 2))
    lens = rows = np.array([5, 1, 7], np.int32)
    table = np.array([[3, 8], [1, 0], [2, 5]], np.int32)
    cell = np.concatenate([np.arange(n) for n in lens])
    place = table[np.repeat(np.arange(3), rows), cell // page], cell % page
    rest = table, np.concatenate([[0], np.cumsum(rows)]).astype(np.int32), lens

    def call(kinds: int, stored: int, on_tpu: bool) -> np.ndarray:
        @jax.jit(compiler_options=QUICK)
        def step(kv, q, k, v):
            kv = write_kv(kv, 1, k, v, *map(jnp.asarray, place))
            inputs = [jnp.asarray(x) for x in rest]
            if not on_tpu:
                return paged_attention(q, kv, 1, *inputs, scale=0.4)
            interpret = pltpu.InterpretParams()
            queries = as_queries(q, stored)
            out = tpu_attention(queries, kv, 1, *inputs, scale=0.4, config=CONFIG, interpret=interpret)
            return from_values(out, width, kinds)

        return np.asarray(step(jnp.zeros((2, pages, kinds, 2, page, stored)), q, k, v))

    np.testing.assert_allclose(call(*layout, on_tpu), call(2, width, False), atol=1e-6)
