"""The table of implementations, and lowering of every op for devices that are not here."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention, kv_write, top_k_top_p
from pallas_kernels.dispatch import Op


def plain(x, factor=2):
    return x * factor


def fussy(x, factor=2):
    if x.shape[0] % 8:
        raise NotImplementedError(f"{x.shape[0]=} is not a multiple of 8")
    return x * factor + 1


OP = Op("scale", {"mosaic_gpu": fussy, "xla": plain})
ONLY_FUSSY = Op("scale", {"mosaic_gpu": fussy})


@pytest.mark.parametrize(("size", "name", "value"), [(8, "mosaic_gpu", 4.0), (7, "xla", 3.0)])
def test_first_that_can_serve(size: int, name: str, value: float):
    ones = jnp.ones(size)
    assert OP(None, ones, factor=3)[0] == value
    assert OP.choice(None, ones, factor=3) == name
    assert OP.choice(None, jax.ShapeDtypeStruct((size,), "float32")) == name


def test_by_name_means_it_or_failure():
    assert OP("xla", jnp.ones(8))[0] == 2
    with pytest.raises(NotImplementedError, match=r"scale.*mosaic_gpu.*x\.shape\[0\]=7"):
        OP("mosaic_gpu", jnp.ones(7))
    with pytest.raises(NotImplementedError, match="mosaic_gpu: x"):
        ONLY_FUSSY.choice(None, jnp.ones(7))
    with pytest.raises(ValueError, match=r"abacus.*mosaic_gpu.*xla"):
        OP("abacus", jnp.ones(8))


def test_the_choice_is_logged_with_the_reasons_against_better_ones(caplog: pytest.LogCaptureFixture):
    op = Op("logged", OP.table)  # a name of its own: engines of other tests say each choice once in a process
    with caplog.at_level("INFO", "pallas_kernels.dispatch"):
        op(None, jnp.ones(8))
        op(None, jnp.ones(7))
    reason = "mosaic_gpu: x.shape[0]=7 is not a multiple of 8"
    assert caplog.messages == ["logged: mosaic_gpu", f"logged: xla ({reason})"]


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "int32")


def floats(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


CACHE = floats(32, 90_000, 2, 8, 64, 128)  # 377 GB: far beyond 2^31 elements
BATCH = (ints(16, 128), ints(17), ints(16))


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (
            lambda q, kv, *rest: attention.paged_attention(q, kv, 31, *rest, scale=0.1),
            (floats(16, 32, 128), CACHE, *BATCH),
        ),
        (
            lambda q, kv, layer, *rest: attention.paged_attention(
                q, kv, layer, *rest, scale=0.1, window=512, soft_cap=30.0
            ),
            (floats(512, 32, 128), CACHE, ints(), *BATCH),
        ),
        (
            lambda kv, *rest: kv_write.write_kv(kv, 31, *rest),
            (CACHE, floats(512, 8, 128), floats(512, 8, 128), ints(512), ints(512)),
        ),
        (
            top_k_top_p.top_k_top_p_floor,
            (floats(16, 49_152, dtype="float32"), ints(16), *[floats(16, dtype="float32")] * 2),
        ),
    ],
    ids=["decode", "prefill", "write", "top_k_top_p"],
)
def test_lowers_for_cuda(call, args):
    lowered = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))
    assert "module" in lowered.as_text()


def test_choice_of_the_real_ops():
    args = (floats(16, 32, 128), CACHE, 31, *BATCH)
    assert attention.OP.choice(None, *args, scale=0.1) in attention.OP.table
