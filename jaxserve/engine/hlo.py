"""What a compiled TPU program does to the device's memory, read from its optimized HLO text.

The compiler's own `optimal_seconds` charges weights that it fetches into VMEM ahead of their use up to three times (for
the fetch and for the use), so that decodes look several times slower than they can be. Here every byte that crosses the
border of the large memory (HBM) counts once: buffers with a memory space such as `S(1)` lie elsewhere.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

ITEM_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
              "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d\w+)?)\[([\d,]*)\](\{[^}]*\})?")
OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9-]*)\(([^)]*)\)")
CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{([^}]*)\}")
SCOPE = re.compile(r'op_name="([^"]*)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ALIASED = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")  # of pairs such as {}: (3, {}) or {1}: (0, {})
COST = re.compile(r'"cost_estimate":(\{[^}]*\})')
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CONTROL = ("while", "call", "conditional")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
PARTIAL = ("gather", "dynamic-slice", "slice")  # read no more than they return
IN_PLACE = ("scatter", "dynamic-update-slice")  # write no more than their updates


@dataclass(frozen=True)
class Buffer:
    """An array of a program: its bytes, and whether it lies in HBM."""

    size: int
    in_hbm: bool

    @property
    def charge(self) -> int:
        """Bytes that cross the border of HBM when all of it is read or written."""
        return self.size if self.in_hbm else 0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `outputs` has one buffer for each array of a tuple."""

    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    scope: str
    text: str

    @property
    def collective(self) -> str | None:
        """Which exchange between devices it begins, if any."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


@dataclass
class Traffic:
    """Bytes through HBM, exchanges between devices as (kind, bytes), and kernels as (scope, operations, bytes)."""

    hbm_bytes: int = 0
    collectives: list[tuple[str, int]] = field(default_factory=list)
    kernels: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, other: "Traffic", times: int = 1) -> None:
        """Count what another computation does, so many times."""
        self.hbm_bytes += times * other.hbm_bytes
        self.collectives += times * other.collectives
        self.kernels += times * other.kernels


@dataclass(frozen=True)
class Program:
    """The computations of a program by name; `entry` is where it begins."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """From what `Compiled.as_text()` returns.

        Raises:
            ValueError: it has no entry computation.
        """
        found: dict[str, list[Instruction]] = {}
        entry, name = "", ""
        for line in text.splitlines():
            if line.endswith("{") and line.startswith(("%", "ENTRY ")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                found[name] = []
                entry = name if line.startswith("ENTRY ") else entry
            elif name and " = " in line:
                found[name].append(_read(line))
        if not entry:
            raise ValueError("the HLO text has no ENTRY computation")
        return cls({name: tuple(lines) for name, lines in found.items()}, entry)

    def traffic(self, without: str = "") -> Traffic:
        """Of one run, less what happens in scopes whose name holds `without`.

        A loop counts as often as the compiler knows that it runs, else once; of several branches the most expensive.
        """
        return self._traffic(self.entry, without)

    def _traffic(self, name: str, without: str) -> Traffic:
        total, lines = Traffic(), self.computations[name]
        buffers = {line.name: line.outputs for line in lines}
        for line in lines:
            if without and without in line.scope:
                continue
            if line.opcode in CONTROL:
                parts = [self._traffic(one, without) for one in line.called]
                trips = TRIPS.search(line.text)
                worst = max(parts, key=lambda part: part.hbm_bytes, default=Traffic())
                total.add(worst, int(trips[1]) if trips else 1)
            elif line.collective is not None:
                total.collectives.append((line.collective, line.outputs[-1].size))
            elif line.opcode == "custom-call":
                operations, moved = self._kernel(line, buffers)
                total.kernels.append((line.scope, operations, moved))
                total.hbm_bytes += moved
            else:
                total.hbm_bytes += self._charge(line, buffers)
        return total

    def _kernel(self, line: Instruction, buffers: Mapping[str, tuple[Buffer, ...]]) -> tuple[int, int]:
        """Operations and bytes of a kernel: its own estimate, or all of its arrays but those changed in place."""
        if cost := COST.search(line.text):
            known = json.loads(cost[1])
            return int(known["flops"]), int(known["bytes_accessed"])
        pairs = re.findall(r"\{(\d*)\}: \((\d+)", (ALIASED.search(line.text) or [""])[0])
        outputs, operands = {int(out or 0) for out, _ in pairs}, {int(operand) for _, operand in pairs}
        moved = sum(buffer.charge for i, buffer in enumerate(line.outputs) if i not in outputs)
        sources = [buffers.get(name, ()) for i, name in enumerate(line.operands) if i not in operands]
        return 0, moved + sum(buffer.charge for source in sources for buffer in source)

    def _charge(self, line: Instruction, buffers: Mapping[str, tuple[Buffer, ...]]) -> int:
        """Bytes through HBM of one instruction that runs where it stands."""
        if line.opcode in FREE or line.opcode.endswith("-done"):
            return 0
        sources = [buffers.get(name, ()) for name in line.operands]
        if line.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            target = line.outputs[0 if line.opcode == "copy-start" else len(sources[0])]
            return target.charge + (target.size if any(buffer.in_hbm for buffer in sources[0]) else 0)
        inside = self.computations[line.called[0]] if line.opcode == "fusion" and line.called else (line,)
        if line.opcode == "fusion":
            return sum(_read_bytes(inside, i, source) for i, source in enumerate(sources)) + _written(inside, line)
        out = sum(buffer.charge for buffer in line.outputs)
        if line.opcode in PARTIAL:
            return out + sum(b.size for b in line.outputs if sources and any(s.in_hbm for s in sources[0]))
        if line.opcode in IN_PLACE:
            return 2 * sum(buffer.size for source in sources[1:] for buffer in source[:1])
        return out + sum(buffer.charge for source in sources for buffer in source)

    def copies(self, at_least: int) -> Iterator[Instruction]:
        """Copies between arrays of so many bytes that both lie in HBM, in any computation that is no fusion."""
        for name in self._reached(self.entry):
            buffers = {line.name: line.outputs for line in self.computations[name]}
            for line in self.computations[name]:
                if line.opcode not in ("copy", "copy-start") or line.outputs[0].size < at_least:
                    continue
                sources = buffers.get(line.operands[0], ())
                if line.outputs[0].in_hbm and any(buffer.in_hbm for buffer in sources):
                    yield line

    def _reached(self, name: str) -> set[str]:
        """A computation and those that it runs, in loops and branches."""
        found = {name}
        for line in self.computations[name]:
            if line.opcode in CONTROL:
                found = found.union(*(self._reached(one) for one in line.called))
        return found


def _read(line: str) -> Instruction:
    """One line of HLO text."""
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    match = OPCODE.search(rest)
    if match is None:
        raise ValueError(f"not a line of HLO: {line[:120]}")
    outputs = tuple(
        Buffer(math.prod(map(int, filter(None, sizes.split(",")))) * ITEM_BYTES.get(kind, 1), "S(" not in layout)
        for kind, sizes, layout in SHAPE.findall(rest[: match.start(1)])
    )
    called = [one or many for one, many in CALLED.findall(rest)]
    names = [name.strip().lstrip("%") for part in called for name in part.split(",")]
    scope = SCOPE.search(rest)
    operands = tuple(re.findall(r"%([\w.-]+)", match[2]))
    return Instruction(name.lstrip("%"), match[1], outputs, operands, tuple(names), scope[1] if scope else "", rest)


def _read_bytes(inside: tuple[Instruction, ...], position: int, source: tuple[Buffer, ...]) -> int:
    """Bytes that a fusion reads of its operand at this position: all, or what its users pick."""
    if not any(buffer.in_hbm for buffer in source):
        return 0
    mine = next(
        (line.name for line in inside if line.opcode == "parameter" and f"parameter({position})" in line.text), ""
    )
    aliases = {mine} | {line.name for line in inside if line.opcode == "bitcast" and mine in line.operands}
    users = [line for line in inside if aliases & set(line.operands) and line.opcode != "bitcast"]
    if users and all(line.opcode in PARTIAL and line.operands[0] in aliases for line in users):
        return sum(line.outputs[0].size for line in users)
    if users and all(line.opcode in IN_PLACE and line.operands[0] in aliases for line in users):
        return 0
    return sum(buffer.charge for buffer in source)


def _written(inside: tuple[Instruction, ...], line: Instruction) -> int:
    """Bytes that a fusion writes: what it returns, or the updates of what it changes in place (read and written)."""
    updates = [one for one in inside if one.opcode in IN_PLACE]
    sizes = {one.name: one.outputs for one in inside}
    if updates and any(buffer.in_hbm for buffer in line.outputs):
        return 2 * sum(sizes[one.operands[-1 if one.opcode == "scatter" else 1]][0].size for one in updates)
    return sum(buffer.charge for buffer in line.outputs)
