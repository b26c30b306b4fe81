"""Flags made from dataclasses, so that an option has its name, default, help and checks in one place only."""

import argparse
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jaxserve.checks import ParameterError, shorten
from jaxserve.config import EngineArgs
from jaxserve.config.args import FOREIGN_NAMES, default_of
from jaxserve.config.options import parse_object
from jaxserve.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

ENGINE, SAMPLING = "engine.", "sampling."  # prefixes of the names in the namespace, whose fields overlap

# What the command line decides itself, or what has no meaning there.
NOT_SAMPLING_FLAGS = ("output_kind", "extra_args", "flat_logprobs", "skip_reading_prefix_cache")


class UsageError(ValueError):
    """The command line is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, as `UsageError`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")

    def listed_actions(self) -> list[argparse.Action]:
        """The arguments that the help shows."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Options in one column, help in the other, and a usage line that does not repeat every option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        shown = [action for action in actions if not action.option_strings]
        super().add_usage(usage or f"{self._prog} [OPTIONS]" + "".join(f" {_positional(a)}" for a in shown), [], [])


def _positional(action: argparse.Action) -> str:
    name = action.metavar or action.dest
    return f"[{name} ...]" if action.nargs == "*" else str(name)


def dashes(argv: Sequence[str]) -> list[str]:
    """Arguments with `--max_model_len` written as `--max-model-len`."""

    def rewrite(word: str) -> str:
        name, sign, value = word.partition("=")
        return name.replace("_", "-") + sign + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word

    return [rewrite(word) for word in argv]


def reader(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for argparse whose own message is shown, instead of argparse's general one."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ParameterError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
        except ValueError as error:
            kinds = {
                int: "a whole number",
                _whole: "a whole number",
                float: "a number",
                _token_ids: "a list such as 1,2",
            }
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not {kinds.get(parse, 'valid')}") from error

    return read


def describe(text: str, default: object) -> str:
    """A help line with the default, where there is one to tell."""
    if default is True:
        text = f"switch off: {text}"
    shown = "" if default is None or default == {} or isinstance(default, bool) else f" (default: {default})"
    return (text + shown).replace("%", "%%")


def add_flag(
    group: Any,
    dest: str,
    help: str,
    parse: Callable[[str], Any] | None,
    *,
    choices: Collection[str] = (),
    action: str = "store",
    metavar: str | None = None,
    on: bool = False,
) -> None:
    """One flag for the field `dest` names after its prefix; absent from the namespace unless it is given.

    A field without a parser is a switch; of `--x` and `--no-x` the help shows the one that changes the default.
    """
    name = dest.partition(".")[2].replace("_", "-")
    flag = f"--{name}"
    common: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": help}
    if parse is None:
        hidden = common | {"help": argparse.SUPPRESS}
        group.add_argument(flag, action="store_true", **(hidden if on else common))
        group.add_argument(f"--no-{name}", action="store_false", **(common if on else hidden))
    elif choices:
        group.add_argument(flag, choices=list(choices), metavar="|".join(choices), **common)
    else:
        group.add_argument(flag, type=reader(parse), action=action, metavar=metavar or "VALUE", **common)


METAVARS = {"int": "N", "count": "N", "length": "N", "float": "X", "dict": "JSON", "path": "PATH", "names": "NAME,..."}


def add_engine_flags(
    parser: argparse.ArgumentParser, *, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> None:
    """The fields of `EngineArgs` by group, and vLLM's other options, which are understood but not listed."""
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(EngineArgs):
        about = item.metadata
        if item.name in skip or (only is not None and item.name not in only):
            continue
        if about["group"] not in groups:
            title = "sampling defaults" if about["group"] == "sampling" else about["group"]
            groups[about["group"]] = parser.add_argument_group(title)
        add_flag(
            groups[about["group"]],
            ENGINE + item.name,
            describe(about["help"], default_of(item)),
            about["parse"],
            choices=about["choices"],
            metavar=METAVARS.get(about["kind"]),
            on=item.default is True,
        )
    for name in sorted(FOREIGN_NAMES.difference(skip)) if only is None else ():
        flag, dest = name.replace("_", "-"), ENGINE + name
        options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{flag}", nargs="?", const=True, type=_literal, **options)
        parser.add_argument(f"--no-{flag}", action="store_false", **options)


def _literal(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _whole(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _token_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def sampling_help() -> dict[str, str]:
    """The lines about each field in the docstring of `SamplingParams`."""
    section = inspect.cleandoc(SamplingParams.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}([\w, ]+): ((?:.|\n {5,})*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for names, text in entries for name in names.split(", ")}


def add_sampling_flags(parser: argparse.ArgumentParser, skip: Collection[str] = ()) -> None:
    """The fields of `SamplingParams` that make sense for a whole command."""
    group = parser.add_argument_group("sampling", "what is not given comes from the model's generation config")
    lines = sampling_help()
    for item in dataclasses.fields(SamplingParams):
        if item.name in skip or item.name in NOT_SAMPLING_FLAGS:
            continue
        kinds = {typing.get_origin(kind) or kind for kind in typing.get_args(item.type) or [item.type]}
        help = describe(lines.get(item.name, ""), item.default)
        if list in kinds and item.name in ("stop", "bad_words"):
            help += "; may be given several times"
            add_flag(group, SAMPLING + item.name, help, str, action="append", metavar="TEXT")
            continue
        parse, metavar = next(how for kind, how in _SAMPLING_KINDS.items() if kind in kinds)
        add_flag(group, SAMPLING + item.name, help, parse, metavar=metavar, on=item.default is True)


_SAMPLING_KINDS: Mapping[type, tuple[Callable[[str], Any] | None, str | None]] = {
    bool: (None, None),
    int: (_whole, "N"),
    float: (float, "X"),
    list: (_token_ids, "ID,..."),
    dict: (parse_object, "JSON"),
    StructuredOutputsParams: (parse_object, "JSON"),
    RepetitionDetectionParams: (parse_object, "JSON"),
}


def given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The flags with this prefix that were given."""
    return {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}


def engine_args(args: argparse.Namespace, **defaults: Any) -> EngineArgs:
    """Checked engine options of a command line; `defaults` hold unless the flag was given."""
    return EngineArgs(**(defaults | given(args, ENGINE)))


def sampling_params(base: SamplingParams | None, values: Mapping[str, Any]) -> SamplingParams:
    """`base` with some fields replaced by values as JSON can write them; None takes the class's defaults.

    Raises:
        TypeError, ParameterError: an unknown name or a bad value.
    """
    values = dict(values)
    nested = {"structured_outputs": StructuredOutputsParams, "repetition_detection": RepetitionDetectionParams}
    for name, kind in nested.items():
        if isinstance(values.get(name), Mapping):
            values[name] = kind(**values[name])
    start = {} if base is None else vars(base.clone())
    return SamplingParams.from_optional(**(start | values))
