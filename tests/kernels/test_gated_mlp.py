"""The gated feed-forward layer against numpy.

The kernel for few tokens cannot be interpreted: it has clusters and a counter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_mlp import OP, gated_mlp, hopper_tiled, mosaic_gpu

H100_SMS = 132
SHAPES = (  # width, inner features, outputs
    (4096, 12288, 4096),  # Qwen 3 8B
    (4096, 6144, 4096),  # on two devices
    (2048, 6144, 2048),
    (2560, 9728, 2560),
    (4096, 14336, 4096),  # Llama 3 8B
)


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.tensordot(x, weights, ((1,), (weights.ndim - 1,)))


def shapes(tokens: int, width: int, inner: int, outputs: int, dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    sizes = ((tokens, width), (inner, 2, width), (outputs, inner))
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def make(*sizes: int, dtype: str = "bfloat16") -> list[jax.Array]:
    """Random arguments, of which tokens and weights give numbers of about 1."""
    keys = jax.random.split(jax.random.key(sum(sizes)), 3)
    arrays = shapes(*sizes, dtype=dtype)
    scales = (1.0, sizes[1] ** -0.5, sizes[2] ** -0.5)
    return [
        jax.random.normal(key, array.shape, dtype) * jnp.asarray(scale, dtype)
        for key, array, scale in zip(keys, arrays, scales, strict=True)
    ]


def gated(x: jax.Array, gate_up: jax.Array) -> np.ndarray:
    x, gate_up = (np.asarray(array, np.float32) for array in (x, gate_up))
    gate, up = x @ gate_up[:, 0].T, x @ gate_up[:, 1].T
    return gate / (1 + np.exp(-gate)) * up


def error(got: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected))


def relative(got: jax.Array, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> float:
    return error(got, gated(x, gate_up) @ np.asarray(down, np.float32).T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form_matches_numpy(dtype: str):
    args = make(5, 24, 40, 24, dtype=dtype)
    got = gated_mlp(*args, jax.nn.silu, product)
    assert got.dtype == dtype
    assert relative(got, *args) < (1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("tokens", [2, 24, 64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_kernel_lowers_for_cuda(tokens: int, sizes: tuple[int, int, int]):
    args = shapes(tokens, *sizes)
    assert "mosaic_gpu" in mosaic_gpu.call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [48, 64, 128, 192, 256, 384, 512, 16384])
@pytest.mark.parametrize(("width", "inner"), [(4096, 12288), (4096, 14336), (3584, 18944)], ids=str)
def test_kernel_for_more_tokens_lowers_for_cuda(tokens: int, width: int, inner: int):
    x, gate_up, _ = shapes(tokens, width, inner, 8)
    assert "mosaic_gpu" in hopper_tiled.call.trace(x, gate_up).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "tiling"),
    [(64, (96, 128, 2, 3)), (128, (96, 64, 4, 4)), (192, (32, 64, 3, 2)), (1920, (96, 64, 3, 2))],
    ids=str,
)
def test_kernel_for_more_tokens_in_the_interpreter(tokens: int, tiling: tuple[int, int, int, int]):
    """Several tiles of features, and more stages' worth of width than the ring has."""
    x, gate_up, _ = make(tokens, 384, 192, 8)
    got = hopper_tiled.call(x, gate_up, hopper_tiled.Tiling(*tiling), plgpu.InterpretGPUParams(detect_races=True))
    assert error(got, gated(x, gate_up)) < 1e-2


@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
def test_tilings_fit_shared_memory_and_registers(tokens: int):
    assert hopper_tiled.Tiling.fit(tokens, 12288).inner == 96  # 128 CTAs, one wave
    sizes = [size for size in hopper_tiled.INNER if size <= hopper_tiled.MOST_INNER[tokens]]
    for inner in (inner for inner in range(32, 30_000, 16) if any(inner % size == 0 for size in sizes)):
        size, step, stages, token_stages = hopper_tiled.Tiling.fit(tokens, inner)
        assert inner % size == 0
        assert min(stages, token_stages) >= 2
        assert 2 * (stages * 2 * size * step + token_stages * tokens * hopper_tiled.STEP) <= 232_448 - 2048
        assert size <= token_stages * hopper_tiled.STEP  # results lie where tokens were
        rows = tokens // hopper_tiled.GROUPS[tokens]
        assert rows * 2 * size // 128 <= 192  # registers of a thread for the sums


@pytest.mark.parametrize(
    ("tokens", "tiling", "reason"),
    [
        (300, None, "300 tokens"),
        (128, (96, 96, 3, 4), "320 -> 192 features"),
        (128, (64, 64, 1, 4), "fewer than two stages"),
        (128, (96, 64, 6, 4), "width=320"),
    ],
)
def test_kernel_for_more_tokens_names_what_it_cannot_serve(tokens: int, tiling: tuple[int, ...] | None, reason: str):
    x, gate_up, _ = shapes(tokens, 320, 192, 8)
    with pytest.raises(NotImplementedError, match=reason):
        hopper_tiled.call(x, gate_up, hopper_tiled.Tiling(*tiling) if tiling else None)


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((16, 4096, 12288, 4096), "float32", "float32"),
        ((16, 4096, 12288, 4096), "float16", "float16"),
        ((1, 4096, 12288, 4096), "bfloat16", "1 tokens"),
        ((96, 4096, 12288, 4096), "bfloat16", "96 tokens"),
        ((16, 1024, 3072, 1024), "bfloat16", "1024 -> 3072 -> 1024"),
    ],
)
def test_kernel_names_what_it_cannot_serve(sizes: tuple[int, ...], dtype: str, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(*shapes(*sizes, dtype=dtype), jax.nn.silu, H100_SMS)


def test_all_blocks_of_the_kernel_have_room_at_once():
    with pytest.raises(NotImplementedError, match="128 CTAs at once on 114"):
        mosaic_gpu.check(*shapes(16, 4096, 12288, 4096), jax.nn.silu, 114)


def test_kernel_serves_one_activation():
    with pytest.raises(NotImplementedError, match="silu"):
        mosaic_gpu.check(*shapes(16, 4096, 12288, 4096), jax.nn.gelu, H100_SMS)


def test_the_kernel_serves_an_h100_only():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=H100_SMS, platform="gpu")
    arguments = *shapes(32, 4096, 12288, 4096), jax.nn.silu, product
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        OP.choice("mosaic_gpu", *arguments)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert OP.choice(None, *arguments) == "mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 24, 32, 64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_kernel_on_the_gpu(tokens: int, sizes: tuple[int, int, int]):
    args = make(tokens, *sizes)
    poison = [jnp.full((tokens, sizes[1]), jnp.nan, "bfloat16").block_until_ready() for _ in range(4)]
    del poison  # so that an activation which is read before it is written shows
    got = mosaic_gpu.call(*args)
    assert relative(got, *args) < 1e-2
    np.testing.assert_array_equal(got, mosaic_gpu.call(*args))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "width", "inner"),
    [
        *((tokens, 4096, 12288) for tokens in (48, 64, 128, 192, 256, 384)),
        (256, 4096, 6144),
        (512, 2560, 9696),
        (8192, 512, 1536),
    ],
)
def test_kernel_for_more_tokens_on_the_gpu(tokens: int, width: int, inner: int):
    x, gate_up, _ = make(tokens, width, inner, 8)
    poison = [jnp.full((tokens, inner), jnp.nan, "bfloat16").block_until_ready() for _ in range(4)]
    del poison
    got = hopper_tiled.call(x, gate_up)
    assert error(got, gated(x, gate_up)) < 1e-2
    np.testing.assert_array_equal(got, hopper_tiled.call(x, gate_up))
