"""Experts by layer: `8`, `2468`, `diamond:20`, `2,2,4,4`."""

from __future__ import annotations

from moeforge.errors import UsageProblem

SHAPES = {
    "triangle": (8, 6, 4, 2), "inverted-triangle": (2, 4, 6, 8), "hourglass": (8, 2, 2, 8), "rectangle": (5, 5, 5, 5), "diamond": (2, 8, 8, 2),
}  # fmt: skip
"""Experts in each quarter of the depth, low to high: MoLA's four (arXiv:2402.08562) and the one that its later version favours. Each
spends 20 a four layers."""


def experts_by_layer(pattern: str, depth: int) -> list[int]:
    """E of each of `depth` layers.

    A number is for all layers. Four digits, or a shape's name, are for four groups of layers: the i-th covers layers i L / 4 up to
    (i + 1) L / 4, rounded down. `name:TOTAL` scales a shape so that its four groups add up to TOTAL. A list names every layer.

    Raises:
        UsageProblem: names what is wrong with the pattern.
    """
    name, _, total = pattern.partition(":")
    if "," in pattern:
        counts = [_positive(part, pattern) for part in pattern.split(",")]
        if len(counts) != depth:
            raise UsageProblem(f"--experts {pattern}: {len(counts)} numbers for {depth} layers; give one for each")
        return counts
    if name in SHAPES:
        groups = list(SHAPES[name])
        if total:
            wanted = _positive(total, pattern)
            groups = [round(group * wanted / sum(SHAPES[name])) for group in groups]
            if sum(groups) != wanted or min(groups) < 1:
                raise UsageProblem(
                    f"--experts {pattern}: {name} is {SHAPES[name]}, which does not scale to whole experts that add up to {wanted}"
                )
    elif total or not pattern.isdecimal():
        raise UsageProblem(f"--experts {pattern}: expected a number, four digits such as 2468, one of {', '.join(SHAPES)} (:TOTAL), or a list with a "
                           "number for each layer")  # fmt: skip
    elif len(pattern) == 4:
        groups = [_positive(digit, pattern) for digit in pattern]
    else:
        return [_positive(pattern, pattern)] * depth
    edges = [i * depth // 4 for i in range(5)]
    return [groups[i] for i in range(4) for _ in range(edges[i], edges[i + 1])]


def _positive(text: str, pattern: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UsageProblem(f"--experts {pattern}: {text!r} is not a number of experts, 1 or more")
    return int(text)


def layers_of(text: str, depth: int) -> list[int]:
    """`all`, or a list such as 0,3,5-7.

    Raises:
        UsageProblem: no such layers.
    """
    if text == "all":
        return list(range(depth))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageProblem(f"--layers {text}: {part!r} is neither a number nor a range such as 5-7")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= depth:
        raise UsageProblem(f"--layers {text}: the model has layers 0 to {depth - 1}")
    return sorted(found)
