"""Mesh, rules and placement on eight fake CPU devices (made by the top-level conftest)."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.mesh import make_mesh
from sharding.place import place
from sharding.rules import MESH_AXES, named_sharding, partition_spec


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, model=4)


def test_mesh_lays_model_neighbours_side_by_side():
    devices = jax.devices()
    mesh = make_mesh(data=2, model=4, devices=devices)
    assert mesh.axis_names == ("data", "model")
    assert [d.id for d in mesh.devices[0]] == [d.id for d in devices[:4]]
    assert [d.id for d in mesh.devices[1]] == [d.id for d in devices[4:8]]


def test_default_mesh_is_one_device():
    assert make_mesh().devices.shape == (1, 1)


@pytest.mark.parametrize(("sizes", "words"), [((0, 1), "'data' has size 0"), ((1, -2), "'model' has size -2"),
                                              ((3, 3), "needs 9 devices but there are 8")])  # fmt: skip
def test_bad_meshes_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("V", "D"), ("model", None)),
        (("K", "G", "H", "D"), ("model", None, None, None)),
        (("D", "N", "H"), (None, "model", None)),
        ((None, "F", "D"), (None, "model", None)),
        (("D",), (None,)),
        ((), ()),
    ],
)
def test_logical_axes_map_to_mesh_axes(axes, spec):
    assert partition_spec(axes) == PartitionSpec(*spec)


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"\['F', 'V'\].*'model'"):
        partition_spec(("F", "V"))
    assert partition_spec(("F", "V"), {**MESH_AXES, "F": "data"}) == PartitionSpec("data", "model")


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="'Z'"):
        partition_spec(("Z", "D"))


def test_sizes_must_divide(mesh):
    assert named_sharding(mesh, ("F", "D"), (8, 3)).shard_shape((8, 3)) == (2, 3)
    with pytest.raises(
        ValueError, match="axis F of size 6 cannot be split over the 4 devices of the mesh axis 'model'"
    ):
        named_sharding(mesh, ("F", "D"), (6, 3))
    with pytest.raises(ValueError, match="do not fit the shape"):
        named_sharding(mesh, ("F",), (8, 3))


def test_place_gives_every_device_its_slice(mesh):
    value = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    placed = place(value, named_sharding(mesh, ("F", "D"), value.shape))
    np.testing.assert_array_equal(np.asarray(placed), value)
    for shard in placed.addressable_shards:
        column = list(mesh.devices.flat).index(shard.device) % 4
        np.testing.assert_array_equal(np.asarray(shard.data), value[2 * column : 2 * column + 2])


def test_place_asks_only_for_slices(mesh):
    class Spy(np.ndarray):
        asked: list[tuple[int, ...]]

        def __getitem__(self, index):
            part = np.asarray(self).__getitem__(index)
            self.asked.append(part.shape)
            return part

    value = np.zeros((8, 6), np.float32).view(Spy)
    value.asked = []
    place(value, named_sharding(mesh, ("F", "D"), value.shape))
    assert set(value.asked) == {(2, 6)}
