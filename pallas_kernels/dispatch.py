"""Which implementation of an op runs: a table per op, tried in order of preference.

An implementation is a function with the op's own arguments. It raises `NotImplementedError`, naming the values, when
it cannot serve a call (wrong platform, unsupported shape, missing feature); the next one in the table is tried then.
Each choice is logged at level INFO with the reasons against the better ones, as often as a call is traced; inside
`recorded` it is only written down, for programs that are traced in one place and used in another.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax

logger = logging.getLogger(__name__)

KINDS = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}

_record: ContextVar[list[str] | None] = ContextVar("record", default=None)
_preferred: ContextVar[Mapping[str, str] | None] = ContextVar("preferred", default=None)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What would have been logged by calls inside, on this thread."""
    notes: list[str] = []
    token = _record.set(notes)
    try:
        yield notes
    finally:
        _record.reset(token)


@contextmanager
def preferring(choices: Mapping[str, str]) -> Iterator[None]:
    """Calls inside, on this thread, that name no implementation use that of their op in `choices`, or fail."""
    token = _preferred.set(choices)
    try:
        yield
    finally:
        _preferred.reset(token)


def announce(notes: list[str]) -> None:
    """Log what was recorded."""
    for note in notes:
        logger.info("%s", note)


def target_device() -> Any:
    """The device of the abstract mesh in use, which need not exist here; without one, jax's default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def only_on(platform: str, module: str, name: str) -> Callable[..., Any]:
    """The implementation of that name in a module, for "gpu" or "tpu".

    The module is imported when a program for the platform is traced for the first time, and not elsewhere: Pallas and
    the kernels take half a second.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        found = target_device().platform
        if found != platform:
            raise NotImplementedError(f"needs {KINDS[platform]}, the platform is {found!r}")
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


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

    def __call__(self, implementation: str | None, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the first implementation that can serve these arguments, or exactly the named one.

        Raises:
            ValueError: `implementation` is not in the table.
            NotImplementedError: none can serve (or the named one cannot); the message holds every reason.
        """
        return self._serve(implementation, *args, **kwargs)[1]

    def choice(self, implementation: str | None, *args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        """Name of the implementation that a call with these arguments uses; computes nothing.

        Arrays may be given as `jax.ShapeDtypeStruct`. Raises as the call does.
        """
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)}
        names = []

        def call(arrays: dict[int, jax.Array]) -> Result:
            filled_args, filled_kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
            filled = self._serve(implementation, *filled_args, **filled_kwargs)  # pyright: ignore[reportCallIssue]
            name, result = filled
            names.append(name)
            return result

        jax.eval_shape(call, traced)
        return names[0]

    def _serve(
        self, implementation: str | None, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> tuple[str, Result]:
        if implementation is None:
            implementation = (_preferred.get() or {}).get(self.name)
        if implementation is not None and implementation not in self.table:
            raise ValueError(f"{self.name} has no {implementation=}; choose one of {sorted(self.table)} or None")
        reasons = []
        for name in self.table if implementation is None else (implementation,):
            try:
                result = self.table[name](*args, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
            else:
                note = f"{self.name}: {name}{f' ({"; ".join(reasons)})' if reasons else ''}"
                record = _record.get()
                announce([note]) if record is None else record.append(note)
                return name, result
        raise NotImplementedError(f"{self.name} cannot serve this call: " + "; ".join(reasons))
