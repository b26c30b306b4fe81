"""Every implementation of `top_k_top_p_floor` against a float64 sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.top_k_top_p import mosaic_gpu, mosaic_tpu, top_k_top_p_floor


def brute_force(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens of one row are kept."""
    x = logits.astype(np.float64)
    kept = x > -np.inf
    if not kept.any():
        return kept
    probs = np.exp(x - x.max())
    kept &= probs >= min_p
    if 0 < top_k < len(x):
        kept &= x >= np.sort(np.where(kept, x, -np.inf))[-top_k]
    if top_p < 1:
        probs = np.where(kept, probs, 0) / probs[kept].sum()
        order = np.sort(x)[::-1]
        above = np.append(0, np.cumsum(probs[np.argsort(-x)]))
        larger = above[np.searchsorted(-order, -x)]
        kept &= (larger < top_p) | (larger == 0)
    return kept


def as_arrays(logits, top_k, top_p, min_p) -> list[jax.Array]:
    types = (np.float32, np.int32, np.float32, np.float32)
    return [jnp.asarray(x, t) for x, t in zip((logits, top_k, top_p, min_p), types, strict=True)]


def run(logits, top_k, top_p, min_p, floor=top_k_top_p_floor, scale=None) -> np.ndarray:
    """Scaled logits, those under the floor masked."""
    args = as_arrays(logits, top_k, top_p, min_p)
    scale = jnp.ones(len(args[0])) if scale is None else jnp.asarray(scale)
    scaled = args[0] * scale[:, None]
    return np.where(scaled >= np.asarray(jax.jit(floor)(*args, scale))[:, None], scaled, -np.inf)


def check(logits, top_k, top_p, min_p, floor=top_k_top_p_floor) -> None:
    """With temperatures for which products are rounded."""
    logits = np.asarray(logits, np.float32)
    scale = np.resize(np.float32([1.0, 1 / 0.7, 0.31]), len(logits))
    out = run(logits, top_k, top_p, min_p, floor, scale)
    logits = logits * scale[:, None]
    for row in range(len(logits)):
        kept = brute_force(logits[row], top_k[row], np.float32(top_p[row]), np.float32(min_p[row]))
        np.testing.assert_array_equal(out[row], np.where(kept, logits[row], -np.inf), err_msg=f"{row=}")


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("small", [False, True])
def test_matches_sorting(spread: float, small: bool):
    """With `small`, every row's set is among its best few tokens, which the reference treats apart."""
    rng = np.random.default_rng(int(spread))
    logits = rng.standard_normal((24, 257)).astype(np.float32) * spread
    top_k = rng.choice([1, 2, 7, 100, 128] if small else [-1, 0, 1, 2, 7, 100, 129, 256, 257, 1000], 24)
    top_p = rng.choice([1.0, 1.5, 0.9137, 0.5211, 0.1, 1e-6], 24)
    min_p = rng.choice([0.0, 0.0, 0.0313, 0.21], 24)
    check(logits, top_k, top_p, min_p)


@pytest.mark.usefixtures("quick_programs")
def test_kernels_in_the_interpreter():
    """Lanes this short make some rows take the lists, some the whole row."""
    logits = np.random.default_rng(0).standard_normal((6, 400)) * 3
    logits[4] = np.round(logits[4])
    logits[5, 1:] = -np.inf
    top_k, top_p, min_p = [0, 5, 0, 300, 50, 3], [1.0, 1.0, 0.31, 0.93, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.01, 0.0]
    small = mosaic_gpu.Sizes(parts=2, keep=2, unroll=2, warpgroups=2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    check(logits, top_k, top_p, min_p, functools.partial(mosaic_gpu.floor, sizes=small, interpret=interpret))


@pytest.mark.parametrize("size", [128, 50_257, 151_936])
def test_kernels_lower_for_cuda(size: int):
    floats = jax.ShapeDtypeStruct((16,), jnp.float32)
    logits, ints = jax.ShapeDtypeStruct((16, size), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
    lowered = jax.jit(mosaic_gpu.floor).trace(logits, ints, floats, floats, floats).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_refuse_what_they_cannot_serve(name: str):
    args = as_arrays(np.zeros((1, 4)), [0], [1.0], [0.0])
    with pytest.raises(NotImplementedError, match=name):
        top_k_top_p_floor(*args, implementation=name)


# Lists this short make some blocks search the whole rows.
ON_TPU = functools.partial(
    mosaic_tpu.floor,
    vmem_bytes=1 << 24,
    sizes=mosaic_tpu.Sizes(groups=2, keep=2, paired=1, inserts=2, unroll=2),
    interpret=pltpu.InterpretParams(),
)


def assorted(rows: int, size: int) -> tuple[np.ndarray, ...]:
    """Logits with ties, long tails and few tokens, and every kind of filter."""
    rng = np.random.default_rng([rows, size])
    logits = rng.standard_normal((rows, size)) * rng.choice([0.3, 3.0, 30.0], (rows, 1))
    logits[1::5] = np.round(logits[1::5])
    logits[2::5, rng.integers(size, size=size // 2)] = -np.inf
    logits[3::5, 2:] = -np.inf
    if rows > 9:
        logits[9] = -np.inf
    top_k = rng.choice([-1, 0, 1, 2, 50, size // 2, size - 1, size, 2 * size], rows)
    top_p = rng.choice([1.0, 1.5, 0.9137, 0.99991, 0.5211, 1e-6, 0.0], rows)
    return logits, top_k, top_p, rng.choice([0.0, 0.0, 0.0313, 0.21, 1.0], rows)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (3, 4099), (17, 1000)])
def test_tpu_kernel_in_the_interpreter(rows: int, size: int):
    check(*assorted(rows, size), ON_TPU)


@pytest.mark.usefixtures("quick_programs")
def test_tpu_kernel_leaves_out_blocks_without_filters():
    """The first block and the last are not read; NaN, which a search would not end well with, shows it."""
    logits = np.random.default_rng(0).standard_normal((32, 40)).astype(np.float32)
    logits[:8] = logits[24:] = np.nan
    top_k, min_p = np.zeros(32, int), np.zeros(32)
    top_k[11], min_p[17] = 3, 0.5
    floors = np.asarray(jax.jit(ON_TPU)(*as_arrays(logits, top_k, np.ones(32), min_p), jnp.ones(32)))
    assert np.isneginf(floors[[0, 10, 12, 16, 24, 31]]).all()
    assert (logits[11] >= floors[11]).sum() == 3
    assert floors[17] == pytest.approx(logits[17].max() + np.log(0.5))


def test_tpu_kernel_needs_room_for_eight_rows():
    args = as_arrays(np.zeros((1, 300_000)), [0], [1.0], [0.0])
    with pytest.raises(NotImplementedError, match=r"300000 logits need \d+ bytes of VMEM of 8388608"):
        mosaic_tpu.floor(*args, jnp.ones(1), vmem_bytes=1 << 23)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [129, 32_003, 151_936])
@pytest.mark.parametrize("kind", ["peaked", "normal", "flat", "ties"])
def test_kernels_on_the_device(size: int, kind: str):
    """Fresh inputs every time; sums may be off by float32 rounding, so top-p has some room at its boundary."""
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    ranks = np.log(np.arange(1, size + 1))
    logits = {
        "peaked": lambda: rng.permuted(np.tile(-1.5 * ranks, (32, 1)), axis=1) + 0.2 * rng.standard_normal((32, size)),
        "normal": lambda: 3 * rng.standard_normal((32, size)),
        "flat": lambda: 0.01 * rng.standard_normal((32, size)),
        "ties": lambda: np.round(4 * rng.standard_normal((32, size))) / 4,
    }[kind]().astype(np.float32)
    logits[:, rng.integers(size, size=3)] = -np.inf
    top_k = rng.choice([-1, 0, 1, 20, 50, 1000, size // 2, size, 2 * size], 32)
    top_p, min_p = rng.choice([1.0, 0.99, 0.9, 0.5, 0.0], 32), rng.choice([0.0, 0.0, 0.1], 32)
    scale = rng.uniform(0.3, 3, 32).astype(np.float32)
    floor = functools.partial(top_k_top_p_floor, implementation="mosaic_gpu")
    kept = run(logits, top_k, top_p, min_p, floor, scale) > -np.inf
    logits *= scale[:, None]
    for row in range(32):
        most, least = (
            brute_force(logits[row], top_k[row], share, np.float32(min_p[row]))
            for share in (np.float32(top_p[row]) + room for room in (1e-5, -1e-5))
        )
        context = f"{seed=} {row=} {top_k[row]=} {top_p[row]=} {min_p[row]=}"
        assert np.all(least <= kept[row]), context
        assert np.all(kept[row] <= most), context


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (3, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.62, 0.0), (0, 0.0, 0.0), (0, 1.0, 1.0), (4, 0.62, 0.1)],
)
def test_ties_and_excluded_tokens(top_k: int, top_p: float, min_p: float):
    inf = np.inf
    rows = [
        [1, 2, 2, 2, 0, -inf, 2, 1],  # ties at the boundary stay together
        [-inf, -inf, -3, -inf, -inf, -inf, -inf, -inf],  # fewer tokens than k
        [0.0, -0.0, 0.0, -0.0, -1, -1, -inf, -50],  # equal floats of different bits
        [-5, -5, -5, -5, -5, -5, -5, -5],  # negative throughout
        [-inf] * 8,
        [1e-30, -1e-30, 3e38, -3e38, 88, -inf, 0, 1],
    ]
    check(rows, [top_k] * 6, [top_p] * 6, [min_p] * 6)


def test_order_of_the_filters():
    """top-p sees probabilities renormalised over what min-p and top-k left."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.06, 0.04]], np.float32))
    assert np.isfinite(run(logits, [0], [0.69], [0.0])).tolist() == [[True, True, False, False, False]]
    assert np.isfinite(run(logits, [2], [0.55], [0.0])).tolist() == [[True, False, False, False, False]]
    assert np.isfinite(run(logits, [4], [0.97], [0.2])).tolist() == [[True, True, True, False, False]]


def test_rows_that_use_nothing_pass_unchanged():
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    out = run(logits, [0, 5, -1], [1.0, 0.5, 1.0], [0.0, 0.1, 0.0])
    np.testing.assert_array_equal(out[[0, 2]], logits[[0, 2]])
    assert np.isinf(out[1]).any()


def test_rejects_another_dtype():
    zeros = jnp.zeros(1)
    with pytest.raises(ValueError, match="bfloat16"):
        top_k_top_p_floor(jnp.zeros((1, 4), jnp.bfloat16), jnp.zeros(1, jnp.int32), zeros, zeros)
