"""Every implementation of `rope_kv_write` against loops over tokens and heads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.rope_kv_write import mosaic_gpu, rope_kv_write

EPS, OFFSET = 1e-6, 1.0
NUM_LAYERS, LAYER, PAGE_SIZE = 2, 1, 4


@dataclass(frozen=True)
class Shape:
    """Heads are those of one KV head's queries; `half` pairs of the `width` features are rotated."""

    tokens: int
    num_kv: int
    group: int
    width: int
    half: int
    norm: bool = False


FAMILIES = (
    Shape(5, 8, 2, 128, 64, norm=True),  # Qwen 3
    Shape(1, 8, 4, 128, 64),  # Llama 3, Mistral
    Shape(3, 2, 7, 64, 32),  # Qwen 2.5
    Shape(2, 4, 2, 256, 128),  # Gemma 2
    Shape(4, 1, 4, 256, 128, norm=True),  # Gemma 3
    Shape(4, 32, 1, 96, 48),  # Phi 3
    Shape(4, 8, 3, 128, 48),  # Phi 4 mini: a quarter of each head passes
    Shape(2, 4, 3, 80, 40),
)


def make(shape: Shape, dtype: str) -> tuple[list, dict]:
    """Fresh arguments; some rows are dropped: page past the end, or negative."""
    rng = np.random.default_rng(shape.tokens)

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    num_pages = 2 * shape.tokens
    cells = rng.permutation(num_pages * PAGE_SIZE)[: shape.tokens]
    pages, offsets = cells // PAGE_SIZE, cells % PAGE_SIZE
    pages[1::3] = [num_pages, num_pages + 7, -1][shape.tokens % 3]
    angles = rng.standard_normal((shape.tokens, shape.half))
    tables = [jnp.asarray(1.5 * f(angles), jnp.float32) for f in (np.cos, np.sin)]
    args = [
        normal(shape.tokens, shape.num_kv, shape.group + 2, shape.width),
        normal(NUM_LAYERS, num_pages, 2, shape.num_kv, PAGE_SIZE, shape.width),
        LAYER,
        *tables,
        *(jnp.asarray(x, jnp.int32) for x in (pages, offsets)),
    ]
    scales = [normal(shape.width) if shape.norm else None for _ in range(2)]
    return args, {"q_scale": scales[0], "k_scale": scales[1], "norm_eps": EPS, "norm_offset": OFFSET}


def brute_force(args: list, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """Queries and cache in float64, unrounded."""
    qkv, kv, layer, cos, sin, pages, offsets = (np.asarray(x).astype(np.float64) for x in args)
    half = cos.shape[1]

    def turn(x: np.ndarray, scale: jax.Array | None, t: int) -> np.ndarray:
        if scale is not None:
            x = x / np.sqrt(np.mean(x * x) + EPS) * (OFFSET + np.asarray(scale).astype(np.float64))
        first, second = x[:half], x[half : 2 * half]
        return np.concatenate([first * cos[t] - second * sin[t], second * cos[t] + first * sin[t], x[2 * half :]])

    tokens, num_kv, heads, width = qkv.shape
    q, kv = np.zeros((tokens, num_kv, heads - 2, width)), kv.copy()
    for t, (page, offset) in enumerate(zip(pages.astype(int), offsets.astype(int), strict=True)):
        for k in range(num_kv):
            for g in range(heads - 2):
                q[t, k, g] = turn(qkv[t, k, g], options["q_scale"], t)
            if 0 <= page < kv.shape[1]:
                kv[int(layer), page, 0, k, offset] = turn(qkv[t, k, -2], options["k_scale"], t)
                kv[int(layer), page, 1, k, offset] = qkv[t, k, -1]
    return q.reshape(tokens, -1, width), kv


def relative(got: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", FAMILIES[:7:2], ids=str)
def test_plain_form_matches_brute_force(shape: Shape, dtype: str):
    args, options = make(shape, dtype)
    got = rope_kv_write(*args, **options, implementation="xla")
    for mine, expected in zip(got, brute_force(args, options), strict=True):
        assert mine.dtype == dtype
        assert relative(mine, expected) < (1e-6 if dtype == "float32" else 4e-3)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("shape", [Shape(4, 2, 2, 64, 32, norm=True), Shape(2, 2, 3, 64, 24)], ids=str)
def test_kernel_in_the_interpreter_equals_the_plain_form(shape: Shape):
    args, options = make(shape, "bfloat16")
    got = mosaic_gpu.call(*args, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    for mine, expected in zip(got, rope_kv_write(*args, **options, implementation="xla"), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_kernel_lowers_for_cuda_in_place(shape: Shape):
    args, options = make(shape, "bfloat16")
    mosaic_gpu.check(args[0], args[1], args[3], shape.norm)

    def step(kv, qkv, *rest):
        return mosaic_gpu.call(qkv, kv, *rest, **options)

    traced = jax.jit(step, donate_argnums=0, static_argnums=2).trace(args[1], args[0], *args[2:])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "output_operand_alias" in text
    assert "tf.aliasing_output" in text


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (Shape(1, 2, 2, 64, 32), "float32", "dtypes"),
        (Shape(1, 2, 2, 64, 20), "bfloat16", "20 rotated pairs"),
        (Shape(1, 1, 1, 80, 40), "bfloat16", "1 KV heads of 80"),
        (Shape(1, 2, 2, 64, 24, norm=True), "bfloat16", "48 of 64"),
        (Shape(1, 128, 2, 256, 128), "bfloat16", "too large"),
    ],
    ids=str,
)
def test_kernel_names_what_it_cannot_serve(shape: Shape, dtype: str, reason: str):
    args, _ = make(shape, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(args[0], args[1], args[3], shape.norm)


def test_kernel_needs_a_gpu():
    args, options = make(FAMILIES[0], "bfloat16")
    with pytest.raises(NotImplementedError, match="platform"):
        rope_kv_write(*args, **options, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_kernel_on_the_gpu(shape: Shape):
    args, options = make(shape, "bfloat16")
    poison = [jnp.full(args[0].shape, jnp.nan, "bfloat16").block_until_ready() for _ in range(4)]
    del poison  # so that a query which is never written shows
    got = jax.jit(lambda *rest: rope_kv_write(*rest, **options, implementation="mosaic_gpu"))(*args)
    for mine, expected in zip(got, brute_force(args, options), strict=True):
        assert relative(mine, expected) < 1e-2
