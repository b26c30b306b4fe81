"""Checks of what a caller gave: wrong types raise `TypeError`, wrong values `ParameterError`."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real


class ParameterError(ValueError):
    """A value that a caller gave cannot be used. `parameter` names it and `value` is what was given."""

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class UnsupportedError(ParameterError, NotImplementedError):
    """A valid value of a feature that jaxserve does not have yet; never ignored silently."""


def shorten(value: object, limit: int = 120) -> str:
    """`repr` of a user's value, cut so that an error message stays readable."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def check_int(name: str, value: object) -> int:
    """The value as a Python int; numpy integers pass, bools, floats and strings raise `TypeError`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shorten(value)} of type {type(value).__name__}.")
    return int(value)


def check_float(name: str, value: object) -> float:
    """The value as a finite Python float; bools and strings raise `TypeError`, NaN and infinities `ParameterError`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shorten(value)} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ParameterError(f"{name} must be finite, got {shorten(value)}.", parameter=name, value=value)
    return number


def check_bool(name: str, value: object) -> bool:
    """The value, which must be `True` or `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shorten(value)} of type {type(value).__name__}.")
    return value


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise `ParameterError` "<name> must be <rule>, got <value>." unless the condition holds."""
    if not condition:
        raise ParameterError(f"{name} must {rule}, got {shorten(value)}.", parameter=name, value=value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """The value, which must be one of the strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shorten(value)} of type {type(value).__name__}.")
    require(value in choices, name, value, f"be one of {', '.join(map(repr, choices))}")
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """A question whether the closest known name was meant, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_items(name: str, value: object, what: str) -> list[object]:
    """A new list of the caller's items; `None` is no items."""
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be a list of {what}, got {shorten(value)} of type {type(value).__name__}.")
    return list(value)


def check_token_ids(name: str, value: object) -> list[int]:
    """A new list of token ids >= 0."""
    ids = [check_int(f"{name}[{i}]", item) for i, item in enumerate(check_items(name, value, "token ids"))]
    for i, token in enumerate(ids):
        require(token >= 0, f"{name}[{i}]", token, "be a token id, 0 or more")
    return ids


def check_strings(name: str, value: object) -> list[str]:
    """A new list of non-empty strings."""
    strings = []
    for i, item in enumerate(check_items(name, value, "strings")):
        if not isinstance(item, str):
            raise TypeError(f"{name}[{i}] must be a string, got {shorten(item)} of type {type(item).__name__}.")
        require(bool(item), f"{name}[{i}]", item, "not be empty; leave it out")
        strings.append(item)
    return strings
