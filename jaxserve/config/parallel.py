"""How many devices share a model and how many copies of it there are."""

from dataclasses import dataclass

from jaxserve.checks import check_int, require


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the device mesh, by vLLM's names.

    Attributes:
        tensor_parallel_size: devices that share each copy of the model.
        data_parallel_size: copies of the model, which serve different requests.

    Raises:
        TypeError, ParameterError: (a `ValueError`) a size that is no integer, or below 1.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size"):
            require(check_int(name, getattr(self, name)) >= 1, name, getattr(self, name), "be 1 or more")

    @property
    def world_size(self) -> int:
        """Devices of one copy."""
        return self.tensor_parallel_size

    @property
    def world_size_across_dp(self) -> int:
        """Devices of all copies."""
        return self.tensor_parallel_size * self.data_parallel_size

    def check_devices(self, available: int) -> None:
        """Raise `ParameterError` if there are fewer devices than all copies need."""
        rule = (
            f"be at most {available}, the number of devices there are; {self.tensor_parallel_size} devices for each of "
            f"{self.data_parallel_size} copies of the model are {self.world_size_across_dp}"
        )
        name = "tensor_parallel_size x data_parallel_size"
        require(self.world_size_across_dp <= available, name, self.world_size_across_dp, rule)
