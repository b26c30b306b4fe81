"""What the kernels need to know about the device that a program is traced for."""

import jax


def require_hopper() -> int:
    """Number of SMs of the GPU that jax computes on by default.

    Raises:
        NotImplementedError: the default device is not an NVIDIA GPU of compute capability 9 (Hopper).
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, the platform is {device.platform!r}")
    capability = str(device.compute_capability)
    if capability.split(".", maxsplit=1)[0] != "9":
        raise NotImplementedError(f"needs compute capability 9.x (Hopper), {device.device_kind} has {capability}")
    return device.core_count
