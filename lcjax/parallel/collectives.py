"""What a compiled program sends between chips: collectives by kind, times the trips of the loops they are in."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BETWEEN_SLICES = "send between slices"
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")


@dataclass(frozen=True)
class Collective:
    """One collective of the program. `bytes`: the whole array that a chip puts together or takes part in, once."""

    kind: str
    bytes: int
    times: int
    name: str
    shape: str


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    rest: str


def collectives(hlo: str) -> list[Collective]:
    """The collectives of an optimised HLO module, as `jax.stages.Compiled.as_text()` prints it.

    A loop whose trip count the compiler does not state takes the constant that its condition compares with.
    """
    computations, entry = _computations(hlo)
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for op in computations[name]:
            kind = op.opcode.removesuffix("-start")
            if kind in KINDS and not op.opcode.endswith("-done"):
                scattered = "all-reduce-scatter" in name
                shown = "reduce-scatter" if scattered else kind
                found.append(Collective(shown, _bytes(kind, op), times, op.name, _shape(op.result)))
                continue
            if kind == "send" and "megascale" in op.rest:  # through the hosts, over the network
                largest = max(_size(*array) for array in _arrays(op.result))
                found.append(Collective(BETWEEN_SLICES, largest, times, op.name, _shape(op.result)))
            trips = _trip_count(op, computations) if op.opcode == "while" else 1
            called = _CALLED.findall(op.rest)
            for branches in _BRANCHES.findall(op.rest):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for inner in called:
                if inner in computations:
                    walk(inner, times * trips)

    walk(entry, 1)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (start := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(start[1], line[start.end() :]))
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    """Split `type opcode(operands), attributes`; the type may be a tuple."""
    depth = end = 0
    while depth or text[end] != " ":
        depth += (text[end] in "([{") - (text[end] in ")]}")
        end += 1
    opcode, _, rest = text[end + 1 :].partition("(")
    return _Instruction(name, text[:end], opcode, rest)


def _trip_count(op: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    if stated := _TRIPS.search(op.rest):
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.-]+)", op.rest)
    limits = [] if condition is None else list(_constants(computations[condition[1]]))
    return max(limits, default=1)


def _constants(instructions: list[_Instruction]) -> Iterator[int]:
    for op in instructions:
        if op.opcode == "constant" and (found := _CONSTANT.search(f"{op.result} constant({op.rest}")):
            yield int(found[1])


def _arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(type_text)]


def _size(kind: str, dims: tuple[int, ...]) -> int:
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    return math.prod(dims) * bits // 8


def _bytes(kind: str, op: _Instruction) -> int:
    """The largest array of the result (a `-start` lists its operand too); reduce-scatter counts its whole operand."""
    sizes = [_size(*array) for array in _arrays(op.result)]
    total = max(sizes, default=0) if op.opcode.endswith("-start") else sum(sizes)
    return total * _group_size(op.rest) if kind == "reduce-scatter" else total


def _group_size(rest: str) -> int:
    """Of a list of groups, of their shape (`[groups,size]<=...`), or of named mesh axes (`mesh['a'=8,'b'=4] {'b'}`)."""
    groups = _GROUPS.search(rest)
    if groups is None:
        return 1
    if groups[5] is None:
        return len(groups[1].split(",")) if groups[1] else int(groups[3])
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", groups[4])}
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[5])  # a part of an axis is 'a':(before)size
    return math.prod(int(part) if part else sizes[name] for name, part in used)


def _shape(type_text: str) -> str:
    arrays = _arrays(type_text)
    kind, dims = max(arrays, key=lambda array: _size(*array), default=("", ()))
    return f"{kind}[{','.join(map(str, dims))}]"
