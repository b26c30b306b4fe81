"""Which implementation of an op runs: a table per op, tried in order of preference.

An implementation is a function with the op's own arguments. It raises `NotImplementedError`, naming the values, when
it cannot serve a call (wrong platform, unsupported shape, missing feature); the next one in the table is tried then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Op[**Arguments, Result]:
    """One operation and its implementations, best first.

    Attributes:
        name: what error messages and logs call it.
        table: implementation name -> function. Names are "mosaic_gpu", "mosaic_tpu" and "xla" (plain jax, the
            specification, which serves everything and therefore stands last).
    """

    name: str
    table: Mapping[str, Callable[Arguments, Result]]

    def run(
        self, implementation: str | None, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> tuple[str, Result]:
        """Call the first implementation that can serve these arguments, or exactly the named one.

        Returns the name of the implementation that served, and its result.

        Raises:
            ValueError: `implementation` is not in the table.
            NotImplementedError: none can serve (or the named one cannot); the message holds every reason.
        """
        if implementation is not None and implementation not in self.table:
            raise ValueError(f"{self.name} has no {implementation=}; choose one of {sorted(self.table)} or None")
        reasons = []
        for name in self.table if implementation is None else (implementation,):
            try:
                return name, self.table[name](*args, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise NotImplementedError(f"{self.name} cannot serve this call: " + "; ".join(reasons))

    def __call__(self, implementation: str | None, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The result alone of `run`."""
        return self.run(implementation, *args, **kwargs)[1]
