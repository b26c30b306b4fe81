"""Norm and product against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.norm_matmul import OP, mosaic_gpu, norm_matmul

EPS = 1e-6
H100_SMS = 132
H100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=H100_SMS, platform="gpu")
QWEN = 4096, 1024  # outputs and inputs, Qwen 3 0.6B


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.tensordot(x, weights, ((1,), (weights.ndim - 1,)))


def shapes(tokens: int, outputs: int, inputs: int, dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(size, dtype) for size in ((tokens, inputs), (inputs,), (outputs, inputs))]


def make(tokens: int, outputs: int, inputs: int, dtype: str = "bfloat16") -> list[jax.Array]:
    """Random arguments, hidden states of about 10."""
    keys = jax.random.split(jax.random.key(outputs + inputs), 3)
    scales = 10.0, 1.0, inputs**-0.5
    return [
        jax.random.normal(key, one.shape, dtype) * jnp.asarray(scale, dtype)
        for key, one, scale in zip(keys, shapes(tokens, outputs, inputs, dtype), scales, strict=True)
    ]


def error(got: jax.Array, *args: jax.Array) -> float:
    x, scale, weights = (np.asarray(array, np.float32) for array in args)
    wanted = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS) * scale @ weights.T
    return float(np.linalg.norm(np.asarray(got, np.float32) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form_matches_numpy(dtype: str):
    args = make(5, 48, 24, dtype=dtype)
    got = norm_matmul(*args, product, norm_eps=EPS)
    assert got.dtype == dtype
    assert error(got, *args) < (1e-6 if dtype == "float32" else 1e-2)


def test_outputs_may_have_several_axes():
    x, scale, weights = make(5, 48, 24, dtype="float32")
    got = norm_matmul(x, scale, weights.reshape(6, 8, 24), product, norm_eps=EPS)
    np.testing.assert_allclose(
        got.reshape(5, 48), norm_matmul(x, scale, weights, product, norm_eps=EPS), rtol=1e-5, atol=1e-6
    )


def test_kernel_lowers_for_cuda():
    traced = mosaic_gpu.call.trace(*shapes(1, *QWEN), norm_eps=EPS, multiprocessors=H100_SMS)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("sizes", "multiprocessors"), [((64, 256), 4), ((48, 512), 5)], ids=str)
def test_kernel_in_the_interpreter(sizes: tuple[int, int], multiprocessors: int):
    args = make(1, *sizes)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = mosaic_gpu.call(*args, norm_eps=EPS, multiprocessors=multiprocessors, interpret=interpret)
    assert error(got, *args) < 1e-2


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((2, 4096, 1024), "2 tokens, not one"),
        ((1, 4100, 1024), r"\(4100,\) outputs"),
        ((1, 4096, 1000), "1000 features"),
        ((1, 6144, 4096), "393216 bytes of weights for each of 128 CTAs"),
    ],
)
def test_kernel_names_shapes_that_do_not_fit(sizes: tuple[int, int, int], reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.call.trace(*shapes(*sizes), norm_eps=EPS, multiprocessors=H100_SMS)


@pytest.mark.parametrize(
    ("sizes", "dtype", "offset", "reason"),
    [
        ((1, *QWEN), "float32", 0.0, "float32"),
        ((1, *QWEN), "bfloat16", 1.0, r"norm_offset=1\.0"),
        ((4, *QWEN), "bfloat16", 0.0, "4 tokens"),
    ],
)
def test_kernel_names_what_it_cannot_serve(sizes: tuple[int, int, int], dtype: str, offset: float, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(*shapes(*sizes, dtype=dtype), offset)


def test_the_kernel_serves_an_h100_only():
    arguments, options = (*shapes(1, *QWEN), product), {"norm_eps": EPS}
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        OP.choice("mosaic_gpu", *arguments, **options)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H100)):
        assert OP.choice(None, *arguments, **options) == "mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [QWEN, (1024, 512), (64, 256)], ids=str)
def test_kernel_on_the_gpu(sizes: tuple[int, int]):
    args = make(1, *sizes)
    poison = [jnp.full((sizes[0],), jnp.nan, "bfloat16").block_until_ready() for _ in range(4)]
    del poison
    got = mosaic_gpu.call(*args, norm_eps=EPS, multiprocessors=H100_SMS)
    assert error(got, *args) < 1e-2
    np.testing.assert_array_equal(got, mosaic_gpu.call(*args, norm_eps=EPS, multiprocessors=H100_SMS))
