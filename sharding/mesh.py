"""The device mesh: "data" replicates the model, "model" splits it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

AXES = ("data", "model")


def make_mesh(
    data: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh `("data", "model")` over the first `data * model` devices, neighbours along "model".

    Args:
        data: copies of the model that serve different requests.
        model: devices that share each copy.
        devices: the devices to take, in order; None is all of this JAX client.

    Raises:
        ValueError: a size below 1, or more devices than there are.
    """
    for name, size in (("data", data), ("model", model)):
        if size < 1:
            raise ValueError(f"mesh axis {name!r} has size {size}; it must be 1 or more")
    devices = list(jax.devices() if devices is None else devices)
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of data={data} x model={model} needs {data * model} devices but there are {len(devices)}; "
            "choose smaller sizes or add devices"
        )
    grid = np.array(devices[: data * model], dtype=object).reshape(data, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(data: int, model: int, device: AbstractDevice) -> AbstractMesh:
    """The mesh of as many devices of that kind, which need not exist here."""
    return AbstractMesh((data, model), AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Of its devices: "cpu", "gpu" or "tpu"."""
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if device is None:
        raise ValueError("the abstract mesh does not say which devices it stands for")
    return device.platform
