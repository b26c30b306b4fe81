"""The input and output of a batch: lines of JSON, and what of the input the output holds already."""

import codecs
import contextlib
import fcntl
import io
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from jaxserve.checks import shorten
from jaxserve.server.answers import Json

logger = logging.getLogger(__name__)

LONGEST_LINE = 32 << 20  # bytes of a request, as `jaxserve serve` takes them
STANDARD = "-"  # the name of standard input and output
OUTPUT_BEGINS = b'{"id":"batch_req_'  # without spaces


@dataclass(frozen=True)
class Line:
    """A line of the input: a request under its `custom_id`, or what is wrong with it. Numbers begin at 1."""

    number: int
    custom_id: str | None = None
    request: Json = field(default_factory=dict)
    error: str | None = None


@dataclass
class Written:
    """What an output holds: requests by `custom_id`, input lines that were none, and how many of all have failed."""

    ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)
    failed: int = 0
    size: int = 0  # bytes of whole lines

    @property
    def total(self) -> int:
        """Lines."""
        return len(self.ids) + len(self.bad_lines)


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line that is not blank; None stands for one that is too long to be read."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw.strip():
            yield number, raw


def parse_line(number: int, raw: bytes | None) -> Line:
    """A line's request, or its error."""
    if raw is None:
        return Line(number, error=f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        request = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"not JSON: {error}")
    if not isinstance(request, dict):
        return Line(number, error=f"not a JSON object but {type(request).__name__}")
    key = request.get("custom_id")
    if not isinstance(key, str) or not key:
        found = "missing" if key is None else f"{shorten(key)}, not a text"
        return Line(number, error=f"custom_id is {found}; each request needs one of its own")
    return Line(number, key, request)


def pending(file: BinaryIO, written: Written) -> Iterator[Line]:
    """The lines that are still to be answered, and errors that are still to be told."""
    seen: dict[str, int] = {}
    for number, raw in raw_lines(file):
        line = parse_line(number, raw)
        first = seen.setdefault(line.custom_id, number) if line.custom_id is not None else number
        if first != number:
            line = Line(number, error=f"custom_id {shorten(line.custom_id)} is that of line {first} already")
        known = number in written.bad_lines if line.error is not None else line.custom_id in written.ids
        if not known:
            yield line


def survey(file: BinaryIO, written: Written, name: str) -> int:
    """The number of lines, for a file that can be read twice; it is rewound.

    Raises:
        ValueError: the output holds requests that are not among them.
    """
    missing, total = set(written.ids), 0
    for number, raw in raw_lines(file):
        total += 1
        if missing:
            missing.discard(parse_line(number, raw).custom_id or "")
    file.seek(0)
    if missing:
        raise ValueError(
            f"{name} holds {len(missing)} custom_ids that the input does not have, such as {shorten(min(missing))}: "
            "it is from another input. Choose another output, or --overwrite it."
        )
    return total


def scan(file: BinaryIO, name: str) -> Written:
    """What an earlier run has written; a half-written last line does not count.

    Raises:
        ValueError: this is no output of a batch.
    """
    found = Written()
    no_output = f"is no output of run-batch, so nothing is appended to {name}. Choose another, or --overwrite it."
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            start = raw.replace(b" ", b"")[: len(OUTPUT_BEGINS)]
            if not OUTPUT_BEGINS.startswith(start):
                raise ValueError(f"line {number} {no_output}")
            break
        try:
            record = json.loads(raw)
            key, response, error = (record[name] for name in ("custom_id", "response", "error"))
            if key is None:
                found.bad_lines.add(error["line"])
            else:
                found.ids.add(key)
            found.failed += error is not None or response["status_code"] != 200
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} {no_output}") from error
        found.size += len(raw)
    return found


class Output:
    """Where results go, one write a line. A regular file is locked against a second run."""

    def __init__(self, file: io.FileIO, name: str, overwrite: bool):
        self._file, self.name = file, "standard output" if name == STANDARD else name
        self.is_file = name != STANDARD and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self.written = Written()
        if not self.is_file:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {name}; wait for it or choose another output.") from error
        except OSError:
            logger.warning("%s cannot be locked; see that only one run writes to it", name)
        if not overwrite:
            with open(name, "rb") as existing:
                self.written = scan(existing, name)

    def begin(self) -> None:
        """Cut off what does not stay."""
        if self.is_file:
            self._file.truncate(self.written.size)

    def write(self, record: Json) -> None:
        """Append a line. A half of a surrogate pair, which UTF-8 has no form for, stays the escape it was."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[self._file.write(rest) :]


@dataclass(frozen=True)
class BatchFiles:
    """An opened input and output; `total` is the number of lines, where that can be known."""

    source: BinaryIO
    output: Output
    total: int | None


@contextlib.contextmanager
def open_files(source: str, target: str, *, overwrite: bool = False) -> Iterator[BatchFiles]:
    """Open and check both before anything expensive starts; nothing is changed yet.

    Raises:
        OSError: one cannot be opened.
        ValueError: they are the same file, or the output does not belong to the input.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(0 if source == STANDARD else source, "rb", closefd=source != STANDARD))
        about = os.fstat(file.fileno())
        again = source != STANDARD and stat.S_ISREG(about.st_mode)
        with contextlib.suppress(FileNotFoundError):
            other = os.fstat(1) if target == STANDARD else os.stat(target)
            if os.path.samestat(about, other) and stat.S_ISREG(about.st_mode):
                raise ValueError(f"{target} is input and output at once; choose another output.")
        place = 1 if target == STANDARD else target
        raw = stack.enter_context(io.FileIO(place, "w" if target == STANDARD else "a", closefd=target != STANDARD))
        output = Output(raw, target, overwrite)
        if output.written.total and not again:
            message = f"{target} holds results, and an input that is no file cannot be compared with them."
            raise ValueError(f"{message} Choose another output, --overwrite it, or give the input as a file.")
        total = survey(file, output.written, target) if again else None
        if not again:  # whoever reads a pipe closes it: closing waits for a thread that waits for the next line
            stack.pop_all()
            stack.callback(raw.close)
        yield BatchFiles(file, output, total)
