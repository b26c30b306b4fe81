"""How an engine option is declared and checked: its dataclass field carries its help, group, choices and bounds.

The command line is generated from the same metadata: `help`, `group`, `choices`, and `parse`, which turns a word of
the command line into the value (None for switches).
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.checks import (
    ParameterError,
    check_bool,
    check_choice,
    check_float,
    check_int,
    check_items,
    require,
    shorten,
)

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_count(text: str) -> int:
    """A whole number with an optional suffix: k, m and g count by 1000, K, M and G by 1024 ("32k", "25.6k", "8K").

    Raises:
        ParameterError: when it is none.
    """
    match = _COUNT.fullmatch(text.strip())
    number = float(match[1]) * _SUFFIXES[match[2]] if match else 0.5
    if match and "." not in match[1]:
        return int(match[1]) * _SUFFIXES[match[2]]
    if number != int(number):
        raise ParameterError(
            f"{shorten(text)} is no whole number such as 4096, 32k (32,000) or 32K (32,768).", value=text
        )
    return int(number)


def parse_length(text: str) -> int | str:
    """A `parse_count` number, -1 or "auto"."""
    return text if text == "auto" else -1 if text.strip() == "-1" else parse_count(text)


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ParameterError: when it is none.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ParameterError(f"{shorten(text)} is not JSON: {error}.", value=text) from error
    if not isinstance(value, dict):
        raise ParameterError(f"{shorten(text)} must be a JSON object such as '{{\"name\": 1}}'.", value=text)
    return value


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


PARSERS: Mapping[str, Callable[[str], Any] | None] = {
    "int": int,
    "count": parse_count,
    "length": parse_length,
    "float": float,
    "str": str,
    "path": str,
    "token": str,
    "dict": parse_object,
    "names": parse_names,
    "bool": None,
}


def about(
    help: str,
    group: str,
    kind: str,
    *,
    choices: tuple[str, ...] = (),
    low: int | float | None = None,
    high: int | float | None = None,
) -> dict[str, Any]:
    """The metadata of an option's field; None is a valid value where it is the default."""
    parts = {"help": help, "group": group, "kind": kind, "choices": choices, "low": low, "high": high}
    return parts | {"parse": PARSERS[kind]}


def check_option(name: str, value: object, metadata: Mapping[str, Any], default: object) -> Any:
    """The value in its plain Python type, within the field's bounds.

    Raises:
        TypeError, ParameterError: when it is not.
    """
    if value is None and default is None:
        return None
    kind = metadata["kind"]
    if metadata["choices"]:
        return check_choice(name, value, metadata["choices"])
    if kind in ("count", "length") and isinstance(value, str):
        value = _parse(name, value, parse_length if kind == "length" else parse_count)
    if kind == "length" and value in ("auto", -1):
        return None
    checked = _CHECKS[kind](name, value)
    low, high = metadata["low"], metadata["high"]
    if low is not None:
        require(checked >= low, name, value, f"be {low:g} or more")
    if high is not None:
        require(checked <= high, name, value, f"be at most {high:g}")
    return checked


def _parse(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}", parameter=name, value=text) from error


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shorten(value)} of type {type(value).__name__}.")
    return value


def _check_path(name: str, value: object) -> str:
    return _check_text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _check_token(name: str, value: object) -> str | bool:
    return value if isinstance(value, bool) else _check_text(name, value)


def _check_dict(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {shorten(value)} of type {type(value).__name__}.")
    for key in value:
        _check_text(f"a key of {name}", key)
    return dict(value)


def _check_names(name: str, value: object) -> list[str]:
    names = [value] if isinstance(value, str) else check_items(name, value, "names")
    checked = [_check_text(f"{name}[{i}]", item) for i, item in enumerate(names)]
    require(all(checked), name, value, "not have an empty name")
    return checked


_CHECKS: Mapping[str, Callable[[str, object], Any]] = {
    "int": check_int,
    "count": check_int,
    "length": check_int,
    "float": check_float,
    "str": _check_text,
    "path": _check_path,
    "token": _check_token,
    "dict": _check_dict,
    "names": _check_names,
    "bool": check_bool,
}
