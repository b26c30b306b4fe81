"""Sums over devices: the kernel's tables and refusals, its lowering without a GPU, and its sums where there are two."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.engine.mailboxes import open_mailboxes, reserved_bytes
from pallas_kernels.all_reduce import all_reduce, mosaic_gpu
from pallas_kernels.all_reduce.mailbox import FIRST_ADDRESS, MAX_RANKS, MAX_ROWS, OWN_ADDRESS, TABLE_WORDS, make_table
from sharding.mesh import AXES, abstract_mesh, make_mesh

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
WIDTH = 1024  # bfloat16 numbers of a row


def address(table: np.ndarray, word: int) -> int:
    return int(table[word : word + 2].view(np.uint64)[0])


def sums(mesh, count: int, implementation: str | None = None):
    """`count` sums one after the other, of x, 2 x, 3 x ..., and the number of sums after them."""

    def body(x, tables, number):
        ys = [
            all_reduce(x * (i + 1), tables, number, i, axis="model", implementation=implementation)
            for i in range(count)
        ]
        return jnp.stack(ys)[None], number + count

    specs = P("model"), P(AXES), P()
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(P("model"), P()), check_vma=False))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_table_names_all_mailboxes(rank: int):
    addresses = [0x7F_DEAD_BEEF_00, 1 << 40, 256]
    table = make_table(rank, addresses)
    assert (len(table), table[0]) == (TABLE_WORDS, rank)
    assert address(table, OWN_ADDRESS) == addresses[rank]
    assert [address(table, FIRST_ADDRESS + 2 * i) for i in range(3)] == addresses


def test_a_table_has_room_for_one_host():
    make_table(7, range(MAX_RANKS))
    with pytest.raises(ValueError, match="9 mailboxes; sums are made among at most 8"):
        make_table(0, range(MAX_RANKS + 1))


def test_tables_lead_to_the_mailboxes_of_the_same_copy():
    mesh = make_mesh(2, 2)
    tables, boxes = open_mailboxes(mesh)
    places = {part.device: part.data.unsafe_buffer_pointer() for part in boxes.addressable_shards}
    parts = {part.device: np.asarray(part.data) for part in tables.addressable_shards}
    for row in mesh.devices:
        for rank, device in enumerate(row):
            table = parts[device]
            assert table[0] == rank
            assert address(table, OWN_ADDRESS) == places[device]
            assert [address(table, FIRST_ADDRESS + 2 * i) for i in range(2)] == [places[other] for other in row]
    assert not np.asarray(boxes).any()


def test_no_memory_is_reserved_where_devices_cannot_write_to_one_another():
    assert reserved_bytes(make_mesh(1, 2)) == 0


@pytest.mark.parametrize("devices", [2, 8])
def test_without_mailboxes_it_is_the_sum_of_xla(devices: int):
    x = np.arange(devices * 3 * 4, dtype=np.float32).reshape(devices * 3, 4)

    def body(x):
        return all_reduce(x, None, None, 0, axis="model")

    mesh = make_mesh(1, devices)
    y = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("model"), out_specs=P(), check_vma=False))(x)
    np.testing.assert_array_equal(y, x.reshape(devices, 3, 4).sum(axis=0))


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((4, WIDTH), jnp.float32, "4096 elements of float32"),
        ((1, 1000), jnp.bfloat16, "1000 elements of bfloat16"),
        ((MAX_ROWS + 1, WIDTH), jnp.bfloat16, "up to 256 whole rows of 2048 bytes"),
    ],
)
def test_what_the_kernel_does_not_serve(shape: tuple[int, int], dtype: jnp.dtype, said: str):
    with pytest.raises(NotImplementedError, match=said):
        mosaic_gpu.check(jnp.zeros(shape, dtype))


@pytest.mark.parametrize(("rows", "kernels"), [(1, 3), (MAX_ROWS, 3), (MAX_ROWS + 1, 0)])
def test_it_lowers_for_a_gpu_that_is_not_here(rows: int, kernels: int):
    mesh = abstract_mesh(1, 2, H100)
    shapes = ((2 * rows, WIDTH), jnp.bfloat16), ((2 * TABLE_WORDS,), jnp.int32), ((1,), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = sums(mesh, 3).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("one_shot_all_reduce") >= kernels
    assert text.count("mosaic_gpu_v2") == kernels
    assert text.count("stablehlo.all_reduce") == 3 - kernels


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 31, 128, MAX_ROWS])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_two_gpus(rows: int, dtype: jnp.dtype):
    if jax.device_count() < 2:
        pytest.skip("it takes two GPUs")
    mesh = make_mesh(1, 2)
    if not reserved_bytes(mesh):
        pytest.skip("these GPUs cannot write to one another")
    tables, boxes = open_mailboxes(mesh)
    number = jax.device_put(jnp.zeros(1, jnp.int32), NamedSharding(mesh, P()))
    ours, theirs = (sums(mesh, 5, name) for name in ("mosaic_gpu", "xla"))
    place = partial(jax.device_put, device=NamedSharding(mesh, P("model")))
    for seed in range(8):  # one launch after the other: 40 sums, with an odd number in each program
        x = place(jax.random.normal(jax.random.key(seed), (2 * rows, WIDTH), dtype))
        y, number = ours(x, tables, number)
        exact, _ = theirs(x.astype(jnp.float32), tables, number)
        y, exact = np.asarray(y, np.float32), np.asarray(exact)
        np.testing.assert_array_equal(y[0], y[1])  # every device has the same
        assert np.linalg.norm(y - exact) < 1e-2 * np.linalg.norm(exact)
    assert int(number[0]) == 40
    boxes.delete()
