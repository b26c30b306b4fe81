"""Where the logical axes of parameters and of the cache lie on the mesh.

Attention is split over key/value heads, the MLP over its width, the embedding over the vocabulary; everything else
is whole on every device.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES: Mapping[str, str | None] = MappingProxyType(
    {
        "N": "model",  # query heads
        "K": "model",  # key/value heads
        "F": "model",  # MLP width
        "V": "model",  # vocabulary
        "D": None,  # model width
        "G": None,  # query heads of one key/value head (and that head's key and value)
        "H": None,  # head width
        "L": None,  # layers
    }
)


def is_split(axis: str | None) -> bool:
    """Whether the devices that share a copy of the model hold parts of this logical axis."""
    return axis is not None and MESH_AXES[axis] == "model"


def partition_spec(axes: Sequence[str | None], rules: Mapping[str, str | None] = MESH_AXES) -> PartitionSpec:
    """The mesh axes of an array with these logical axes (None: an axis that is never split).

    Raises:
        ValueError: an axis without a rule, or two logical axes on one mesh axis.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"logical axes {unknown} of {tuple(axes)} have no sharding rule; known are {sorted(rules)}")
    placed = [None if axis is None else rules[axis] for axis in axes]
    for mesh_axis in {name for name in placed if name is not None}:
        sharing = [axis for axis, name in zip(axes, placed, strict=True) if name == mesh_axis]
        if len(sharing) > 1:
            raise ValueError(
                f"logical axes {sharing} of {tuple(axes)} would both be split over the mesh axis {mesh_axis!r}; "
                "leave all but one of them whole"
            )
    return PartitionSpec(*placed)


def named_sharding(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, str | None] = MESH_AXES,
) -> NamedSharding:
    """The placement on `mesh` of an array with these logical axes and this shape.

    Raises:
        ValueError: as `partition_spec`; axes and shape of different length; a size that its mesh axis does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} do not fit the shape {tuple(shape)}")
    spec = partition_spec(axes, rules)
    for axis, size, mesh_axis in zip(axes, shape, spec, strict=True):
        parts = 1 if mesh_axis is None else mesh.shape[mesh_axis]
        if size % parts:
            raise ValueError(
                f"axis {axis} of size {size} cannot be split over the {parts} devices of the mesh axis {mesh_axis!r}; "
                f"use a {mesh_axis!r} size that divides {size}"
            )
    return NamedSharding(mesh, spec)
