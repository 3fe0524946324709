"""How the FITTED constants of plugins/moeforge_plan/steptime.py were chosen: a coarse grid over the runs of tables 1 and 3.

    python tests/benchmarks/plan/fit.py        # about a minute

Prints the best rows and the one in use: root mean square of log(estimated / published), pairs in the published order, median error.
Tables 4 and 5, the hold-out, are not read.
"""

from __future__ import annotations

import itertools
import math
import statistics

from moeforge_plan import published, steptime

GRID = {
    "MATMUL": (0.66, 0.70, 0.74, 0.78),
    "LAUNCH": (60e-6, 120e-6, 200e-6),
    "OVERLAP": (0.0, 0.2, 0.35, 0.5),
    "HALF_EXPERT": (300.0, 500.0),
}
SHOWN = 8


def main() -> None:
    runs = [run for run in published.runs() if run.mfu is not None]
    used = {name: getattr(steptime, name) for name in GRID}
    found = []
    for values in itertools.product(*GRID.values()):
        found.append((*score(runs, dict(zip(GRID, values, strict=True))), values))
    print("| rms | pairs of 33 | median error % | " + " | ".join(GRID) + " |\n" + "| --- " * (3 + len(GRID)) + "|")
    for rms, pairs, median, values in sorted(found)[:SHOWN]:
        print(f"| {rms:.4f} | {pairs} | {median:.1f} | " + " | ".join(f"{value:g}" for value in values) + " |")
    rms, pairs, median = score(runs, used)
    print(f"\nin use: {used}: rms {rms:.4f}, {pairs} of 33, median {median:.1f}%")


def score(runs: list[published.Run], constants: dict[str, float]) -> tuple[float, int, float]:
    for name, value in constants.items():
        setattr(steptime, name, value)
    pairs = [(run, published.estimate(run).mfu) for run in runs]
    logs = [math.log(mfu / run.mfu) for run, mfu in pairs if run.mfu]
    order = sum((a.mfu - b.mfu) * (x - y) > 0
                for (a, x), (b, y) in itertools.combinations(pairs, 2) if a.model == b.model and a.mfu and b.mfu)  # fmt: skip
    return (
        math.sqrt(statistics.mean(x * x for x in logs)),
        order,
        100 * statistics.median(abs(math.expm1(x)) for x in logs),
    )


if __name__ == "__main__":
    main()
