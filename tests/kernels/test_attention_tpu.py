"""The TPU kernel of `paged_attention`, interpreted on the CPU, against brute force."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUICK, Arrays, Case, attention, make
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import OP
from pallas_kernels.attention.mosaic_tpu import TpuConfig, fit, pack_pages, plan, tpu_attention
from pallas_kernels.attention.mosaic_tpu_kernel import COLUMNS, Sizes
from pallas_kernels.platform import require_tpu

SCALE = 0.3
CONFIG = TpuConfig(
    short_rows=8, long_rows=64, block_tokens=64, unrolled_rows=0, cores=1, vmem_bytes=64 << 20, smem_bytes=1 << 19
)


@functools.cache
def program(config: TpuConfig, window: int | None, soft_cap: float | None) -> Callable[..., jax.Array]:
    interpret = pltpu.InterpretParams(detect_races=config.cores > 1, num_cores_or_threads=config.cores)
    options = {"scale": SCALE, "window": window, "soft_cap": soft_cap, "config": config, "interpret": interpret}
    return jax.jit(functools.partial(tpu_attention, **options), compiler_options=QUICK)


def run(case: Case, arrays: Arrays, config: TpuConfig) -> np.ndarray:
    dtype = jnp.dtype(case.dtype)
    inputs = [jnp.asarray(x) for x in (arrays.page_table, arrays.cu_q_lens, arrays.kv_lens)]
    q, kv = jnp.asarray(arrays.q, dtype), jnp.asarray(arrays.kv, dtype)
    out = program(config, case.window, case.soft_cap)(q, kv, jnp.int32(arrays.layer), *inputs)
    assert out.dtype == dtype
    return np.asarray(out, np.float64)


def rounded(case: Case) -> Arrays:
    """The arrays of a case as its dtype holds them."""
    arrays = make(case)
    q, kv = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in (arrays.q, arrays.kv))
    return dataclasses.replace(arrays, q=q, kv=kv)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(case: Case):
    arrays = rounded(case)
    out = run(case, arrays, CONFIG)
    expected = attention(arrays, SCALE, case.window, case.soft_cap)
    assert np.abs(out - expected).max(initial=0) < (2e-6 if case.dtype == "float32" else 1e-2)
    assert not out[arrays.cu_q_lens[-1] :].any()


@pytest.mark.usefixtures("quick_programs")
def test_two_cores_with_heads_side_by_side(capsys: pytest.CaptureFixture[str]):
    """As on chips whose two cores are one device; the copies of a core never meet."""
    case = next(case for case in CASES if case.name == "mixed")
    arrays = rounded(case)
    config = dataclasses.replace(CONFIG, cores=2, unrolled_rows=64, block_tokens=16)
    out = run(case, arrays, config)
    assert np.abs(out - attention(arrays, SCALE, case.window, case.soft_cap)).max() < 2e-6
    assert not out[arrays.cu_q_lens[-1] :].any()
    assert "RACE" not in capsys.readouterr().out  # that is all the interpreter does about one


@pytest.mark.parametrize(("num_pages", "paired"), [(65_536, True), (65_537, False)])
def test_page_tables_take_half_the_words_where_pages_are_few(num_pages: int, paired: bool):
    pages = np.random.default_rng(0).integers(0, num_pages, 7).astype(np.int32)
    pages[3] = num_pages - 1
    words, found = pack_pages(jnp.asarray(pages), num_pages)
    assert found is paired
    read = [int(words[i % 4]) >> (16 * (i // 4)) & 0xFFFF if paired else int(words[i]) for i in range(7)]
    assert read == pages.tolist()
    assert len(words) == (4 if paired else 7)


def test_tiles_cover_every_row_once():
    """Short sequences are a tile each, long ones are cut; a window leaves out blocks before it."""
    sizes = Sizes(8, 16, 4, 4, 2, 2, 2, 128, 0)
    rows, lens = np.array([1, 0, 40, 8, 9], np.int32), np.array([100, 0, 50, 8, 300], np.int32)
    bounds = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    table, count = plan(jnp.asarray(bounds), jnp.asarray(lens), 64, sizes, 20)
    tiles = [dict(zip(COLUMNS, row, strict=True)) for row in np.asarray(table)[:count].tolist()]
    assert [(tile["seq"], tile["count"]) for tile in tiles] == [(0, 1), (2, 16), (2, 16), (2, 8), (3, 8), (4, 9)]
    covered = [row for tile in tiles for row in range(tile["first"], tile["first"] + tile["count"])]
    assert covered == list(range(58))
    for tile in tiles:
        seq, block = tile["seq"], sizes.block_tokens
        assert tile["position"] == lens[seq] - bounds[seq + 1] + tile["first"]
        assert tile["low"] == max(tile["position"] - 19, 0) // block
        assert tile["high"] == -(-(tile["position"] + tile["count"]) // block)


def test_what_does_not_fit_is_refused_with_the_numbers():
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 8, 128), (2, 70_000, 2, 4, 128, 128)))

    def call(config: TpuConfig, q=q, kv=kv, seqs: int = 16, pages: int = 8) -> None:
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((seqs, pages), (seqs + 1,), (seqs,))]
        jax.eval_shape(lambda *args: tpu_attention(*args[:2], 0, *args[2:], scale=1.0, config=config), q, kv, *ints)

    big = dataclasses.replace(CONFIG, block_tokens=512)
    call(big)
    with pytest.raises(NotImplementedError, match=r"16 sequences x 65536 pages need 4,19\d,\d+ bytes of scalar memory"):
        call(big, pages=65_536)
    with pytest.raises(NotImplementedError, match=r"4 key heads .* bytes of vector memory, there are 100,000"):
        call(dataclasses.replace(big, vmem_bytes=100_000))
    with pytest.raises(NotImplementedError, match="float16"):
        call(big, q=jax.ShapeDtypeStruct(q.shape, jnp.float16))
    with pytest.raises(NotImplementedError, match="pages of 8 x 128"):
        call(big, kv=jax.ShapeDtypeStruct((2, 9, 2, 4, 8, 128), jnp.bfloat16))


def test_smaller_blocks_where_memory_is_small():
    kv = jax.ShapeDtypeStruct((2, 100, 2, 8, 128, 128), jnp.bfloat16)
    config = dataclasses.replace(CONFIG, long_rows=128, block_tokens=512)
    found = []
    for size in (96, 12, 6):
        smaller = dataclasses.replace(config, vmem_bytes=size << 20)
        jax.eval_shape(lambda kv, smaller=smaller: found.append(fit(2048, 64, 32, kv, smaller)), kv)
        assert found[-1].vmem_bytes(2) <= size << 20
    assert (found[0].long_rows, found[0].pages) == (128, 4)
    assert found[0].vmem_bytes(2) > found[1].vmem_bytes(2) > found[2].vmem_bytes(2)


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="needs a TPU, the platform is 'cpu'"):
        OP("mosaic_tpu", *(None,) * 6)
    for kind, words in (("TPU v3", "'TPU v3' is not one of TPU v4"), ("NVIDIA H100", "'NVIDIA H100'")):
        mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "tpu"))
        with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=words):
            require_tpu()
