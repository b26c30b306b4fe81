"""The second half of a layer against numpy. Its kernels cannot be interpreted: they have clusters or counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_tail import OP, block_tail, lone, mosaic_gpu

H100_SMS = 132
H100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=H100_SMS, platform="gpu")
EPS = 1e-6
SHAPES = (  # features of heads, width, inner features
    (4096, 4096, 12288),  # Qwen 3 8B
    (4096, 2560, 9728),  # Qwen 3 4B
    (2048, 2048, 8192),  # Llama 3.2 1B
)

SMALL = (  # for a lone token
    (2048, 1024, 3072),  # Qwen 3 0.6B
    (1024, 512, 2560),
    (256, 512, 512),
)


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.tensordot(x, weights, ((1,), (weights.ndim - 1,)))


def shapes(tokens: int, heads: int, width: int, inner: int, dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    lefts, weights = ((tokens, width), (tokens, heads)), ((width, heads), (width,), (inner, 2, width), (width, inner))
    return [jax.ShapeDtypeStruct(size, dtype) for size in (*lefts, *weights)]


def make(*sizes: int, dtype: str = "bfloat16") -> list[jax.Array]:
    """Random arguments that give numbers of about 1; rows differ a hundredfold, as hidden states do."""
    keys = jax.random.split(jax.random.key(sum(sizes)), 7)
    arrays = [
        jax.random.normal(key, one.shape, dtype)
        * jnp.asarray(one.shape[-1] ** -0.5 if i > 1 and one.ndim > 1 else 1.0, dtype)
        for i, (key, one) in enumerate(zip(keys[:-1], shapes(*sizes, dtype=dtype), strict=True))
    ]
    factors = jnp.exp2(jax.random.uniform(keys[-1], (sizes[0], 1), dtype, -3, 3))
    return [arrays[0] * factors, arrays[1] * factors, *arrays[2:]]


def expected(x: jax.Array, heads: jax.Array, *weights: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the feed-forward layer before its norm, and what that adds."""
    x, heads, projection, scale, gate_up, down = (np.asarray(array, np.float32) for array in (x, heads, *weights))
    y = x + heads @ projection.T
    normed = y / np.sqrt(np.mean(y * y, axis=1, keepdims=True) + EPS) * scale
    gate, up = normed @ gate_up[:, 0].T, normed @ gate_up[:, 1].T
    return y, (gate / (1 + np.exp(-gate)) * up) @ down.T


def errors(got: jax.Array, *args: jax.Array) -> np.ndarray:
    """Of each row, relative to what the feed-forward layer adds or, where more, what goes through."""
    y, added = expected(*args)
    scales = np.maximum(np.linalg.norm(y, axis=1), np.linalg.norm(added, axis=1))
    return np.linalg.norm(np.asarray(got, np.float32) - y - added, axis=1) / scales


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form_matches_numpy(dtype: str):
    args = make(5, 48, 24, 40, dtype=dtype)
    got = block_tail(*args, jax.nn.silu, product, norm_eps=EPS)
    assert got.dtype == dtype
    assert errors(got, *args).max() < (1e-6 if dtype == "float32" else 2e-2)


def test_the_offset_of_the_norm_is_added_to_its_scale():
    args = make(5, 48, 24, 40, dtype="float32")
    more = [*args[:3], args[3] + 1, *args[4:]]
    got, wanted = (
        block_tail(*some, jax.nn.silu, product, norm_eps=EPS, norm_offset=offset)
        for some, offset in ((args, 1.0), (more, 0.0))
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("tokens", [2, 16, 24, 32, 64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_kernel_lowers_for_cuda(tokens: int, sizes: tuple[int, int, int]):
    traced = mosaic_gpu.call.trace(*shapes(tokens, *sizes), norm_eps=EPS)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_kernel_for_a_lone_token_lowers_for_cuda(sizes: tuple[int, int, int]):
    traced = lone.call.trace(*shapes(1, *sizes), norm_eps=EPS, multiprocessors=H100_SMS)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((2, 2048, 1024, 3072), "2 tokens, not one"),
        ((1, 2048, 1024, 3076), r"\(1024, 3076\) outputs"),
        ((1, 2000, 1024, 3072), "2000 features, not a multiple of 256"),
        ((1, 256, 256, 512), "width=256, a single piece"),
        ((1, 4096, 4096, 12288), "2621440 bytes of weights for each of 128 CTAs, not 228352"),
    ],
)
def test_kernel_for_a_lone_token_names_what_it_cannot_serve(sizes: tuple[int, ...], reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        lone.call.trace(*shapes(*sizes), norm_eps=EPS, multiprocessors=H100_SMS)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options", "reason"),
    [
        ((16, 4096, 4096, 12288), "float32", (jax.nn.silu, 0.0), "float32"),
        ((16, 4096, 4096, 12288), "bfloat16", (jax.nn.gelu, 0.0), "gelu"),
        ((16, 4096, 4096, 12288), "bfloat16", (jax.nn.silu, 1.0), r"norm_offset=1\.0"),
        ((1, 4096, 4096, 12288), "bfloat16", (jax.nn.silu, 0.0), "1 tokens"),
        ((16, 2048, 1024, 3072), "bfloat16", (jax.nn.silu, 0.0), "width 1024, 3072 inner"),
    ],
)
def test_kernel_names_what_it_cannot_serve(sizes: tuple[int, ...], dtype: str, options: tuple, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(tuple(shapes(*sizes, dtype=dtype)), *options)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((16, 4096, 4160, 12288), "width=4160 is more than 4096"),
        ((16, 96, 4096, 12288), "48 features"),
        ((512, 4096, 4096, 12288), "room for"),
    ],
)
def test_kernel_names_shapes_that_do_not_fit(sizes: tuple[int, ...], reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.call.trace(*shapes(*sizes), norm_eps=EPS)


@pytest.mark.parametrize("sizes", [(1, *SMALL[0]), (32, *SHAPES[0])], ids=str)
def test_the_kernels_serve_an_h100_only(sizes: tuple[int, ...]):
    arguments, options = (*shapes(*sizes), jax.nn.silu, product), {"norm_eps": EPS}
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        OP.choice("mosaic_gpu", *arguments, **options)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H100)):
        assert OP.choice(None, *arguments, **options) == "mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_kernel_on_the_gpu(tokens: int, sizes: tuple[int, int, int]):
    args = make(tokens, *sizes)
    poison = [jnp.full((tokens, size), jnp.nan, "bfloat16").block_until_ready() for size in sizes[1:] for _ in range(4)]
    del poison  # so that what is read before it is written shows
    got = mosaic_gpu.call(*args, norm_eps=EPS)
    assert errors(got, *args).max() < 1e-2
    np.testing.assert_array_equal(got, mosaic_gpu.call(*args, norm_eps=EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_kernel_for_a_lone_token_on_the_gpu(sizes: tuple[int, int, int]):
    args = make(1, *sizes)
    poison = [jnp.full((size,), jnp.nan, "bfloat16").block_until_ready() for size in sizes[1:] for _ in range(4)]
    del poison
    got = lone.call(*args, norm_eps=EPS, multiprocessors=H100_SMS)
    assert errors(got, *args).max() < 1e-2
    for _ in range(50):
        again = lone.call(*args, norm_eps=EPS, multiprocessors=H100_SMS)
    np.testing.assert_array_equal(got, again)
