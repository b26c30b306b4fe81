"""Products with weight matrices against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul import OP, matmul, mosaic_gpu

H100_SMS = 132
SHAPES = (  # outputs, inputs; of Qwen 3 8B, but for the last
    (24576, 4096),
    (6144, 4096),
    (4096, 12288),
    (19008, 2304),  # a part of a vocabulary
)


def make(tokens: int, outputs: int, inputs: int, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(tokens + inputs))
    x = jax.random.normal(keys[0], (tokens, inputs), dtype)
    return x, jax.random.normal(keys[1], (outputs, inputs), dtype) * jnp.asarray(inputs**-0.5, dtype)


def relative(got: jax.Array, x: jax.Array, weights: jax.Array) -> float:
    expected = np.asarray(x, np.float32) @ np.asarray(weights, np.float32).T
    return float(np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form_matches_numpy(dtype: str):
    x, weights = make(5, 24, 40, dtype)
    got = matmul(x, weights)
    assert got.dtype == dtype
    assert relative(got, x, weights) < (1e-6 if dtype == "float32" else 4e-3)
    assert matmul(x, weights, "float32").dtype == "float32"


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "dtype", "out_dtype"),
    [
        (16, 320, 192, "bfloat16", "bfloat16"),
        (8, 128, 512, "float16", "float32"),
        (72, 64, 256, "bfloat16", "bfloat16"),
    ],
)
def test_kernel_in_the_interpreter(tokens: int, outputs: int, inputs: int, dtype: str, out_dtype: str):
    x, weights = make(tokens, outputs, inputs, dtype)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = mosaic_gpu.call(x, weights, jnp.dtype(out_dtype), 2, interpret)
    assert got.dtype == out_dtype
    assert relative(got, x, weights) < 4e-3


@pytest.mark.parametrize("tokens", [2, 64, 72])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_kernel_lowers_for_cuda(tokens: int, outputs: int, inputs: int):
    shapes = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((tokens, inputs), (outputs, inputs)))
    traced = mosaic_gpu.call.trace(*shapes, jnp.dtype("float32"), H100_SMS)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "dtype", "out_dtype", "reason"),
    [
        (16, 24576, 4096, "float32", "float32", "float32 and float32"),
        (16, 24576, 4096, "float16", "float16", "float16 and float16"),
        (16, 24576, 4096, "bfloat16", "float32", "24576 x 4096 weights to float32"),
        (1, 24576, 4096, "bfloat16", "bfloat16", "1 tokens"),
        (20, 24576, 4096, "bfloat16", "bfloat16", "20 tokens"),
        (32, 1024, 4096, "bfloat16", "bfloat16", "32 tokens, 1024 x 4096"),
        (64, 6144, 4096, "bfloat16", "bfloat16", "64 tokens, 6144 x 4096"),
    ],
)
def test_kernel_names_what_it_cannot_serve(
    tokens: int, outputs: int, inputs: int, dtype: str, out_dtype: str, reason: str
):
    x, weights = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, inputs), (outputs, inputs)))
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(x, weights, out_dtype)


def test_the_kernel_serves_an_h100_only():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=H100_SMS, platform="gpu")
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((32, 4096), (24576, 4096))]
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        OP.choice("mosaic_gpu", *shapes, "bfloat16")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert OP.choice(None, *shapes, "bfloat16") == "mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [2, 8, 24, 32, 64, 72, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_kernel_on_the_gpu(tokens: int, outputs: int, inputs: int, out_dtype: str):
    x, weights = make(tokens, outputs, inputs)
    got = mosaic_gpu.call(x, weights, jnp.dtype(out_dtype), H100_SMS)
    assert relative(got, x, weights) < 1e-2
    np.testing.assert_array_equal(got, mosaic_gpu.call(x, weights, jnp.dtype(out_dtype), H100_SMS))
