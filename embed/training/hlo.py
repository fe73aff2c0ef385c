"""How many bytes a compiled program sends between devices, read from its HLO text."""

import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


BETWEEN = "between slices"


def collective_bytes(hlo: str, chips: int, slices: int = 1) -> dict[str, float]:
    """Bytes that a chip sends in one run of a compiled program, by kind of collective: {kind: bytes}.

    A collective in a loop is multiplied by the trip counts of its loops. Traffic over the network between slices has
    kinds of its own, "… between slices".

    For an array of B bytes over n chips, a chip sends B (n-1)/n in an all-gather (B: the result), reduce-scatter (B:
    the operand) or all-to-all, twice that in an all-reduce, and B in a collective-permute.
    """
    bodies = _computations(hlo)
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    totals: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        for line in bodies[name][1]:
            match = re.search(r"= (.*?) ([a-z-]+)\(", line)
            if not match:
                continue
            result, operator = match.groups()
            kind = operator.removesuffix("-start")
            if kind in COLLECTIVES:
                size, n = float(sum(_bytes(result))), _group_size(line, chips)  # one collective may carry many arrays
                if operator == "collective-permute-start":
                    size = float(max(_bytes(result)))  # the tuple is operand, result and two words
                elif operator == "all-gather-start":
                    size *= n / (n + 1)  # the tuple is operands and results
                elif operator == "reduce-scatter":
                    size *= n  # the result is one shard of the operand
                if n > 1:
                    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
                    totals[kind] = totals.get(kind, 0.0) + times * size * share
            if operator == "send" and (match := re.search(r'megascale_transfer_type="(\w+)"', line)):
                # Slices exchange arrays through their hosts. The tuple is the array, a word and a token.
                kind = f"{match.group(1).lower().replace('_', '-')} {BETWEEN}"
                share = (2 if kind.startswith("all-reduce") else 1) * (slices - 1) / slices
                totals[kind] = totals.get(kind, 0.0) + times * max(_bytes(result)) * share
            inner = times
            if operator == "while":
                inner = times * _trip_count(line, bodies)
            called = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [name.strip().lstrip("%") for name in group.split(",")]
            for other in called:
                if other in bodies:
                    visit(other, inner)

    visit(entry, 1.0)
    return totals


def _computations(hlo: str) -> dict[str, tuple[bool, list[str]]]:
    """The computations of an HLO module: {name: (whether it is the entry, lines of instructions)}."""
    computations, current = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if head:
            current = head.group(2)
            computations[current] = (bool(head.group(1)), [])
        elif line.rstrip() == "}":
            current = None
        elif current:
            computations[current][1].append(line)
    return computations


def _trip_count(line: str, bodies) -> int:
    """The trip count of a loop: the compiler's annotation, or the constant in the loop's condition."""
    if match := re.search(r"known_trip_count\D*(\d+)", line):
        return int(match.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line).group(1)
    constants = [
        int(n) for text in bodies[condition][1] for n in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    ]
    return max(constants, default=1)


def _bytes(types: str) -> list[int]:
    """The size in bytes of each array in the text of a result type."""
    return [
        _SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
        if kind in _SIZES
    ]


def _group_size(line: str, chips: int) -> int:
    """The number of chips in one replica group of a collective."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)) if axis in sizes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match.group(1).split(","))
    return chips
