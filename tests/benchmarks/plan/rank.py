"""`moeforge plan` beside published runs: order, winners, errors, what does not fit, and tables that nothing was fitted on.

    python tests/benchmarks/plan/rank.py

Prints the tables of RESULTS.md. The runs and their source are in plugins/moeforge_plan/published.toml.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moeforge_plan import published
from moeforge_plan.published import Estimate, Run
from moeforge_plan.search import search

CALLS = 5


def main() -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}; no GPU is asked\n")
    pairs = [(run, published.estimate(run)) for run in published.runs()]
    runs(pairs)
    winners()
    hold_out("scaling (table 4), global batch 1024: MFU % by GPUs", published.scaling())
    hold_out("context (table 5), Mixtral-8x22B folded: MFU % by GPUs", published.context())
    call()


def runs(pairs: list[tuple[Run, Estimate]]) -> None:
    """Every run of tables 1 and 3, then the summary."""
    print("| model | GPUs | method | TP EP PP ETP | published MFU % | estimated | error % | GB | fits 80 GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for run, found in pairs:
        at = run.layout
        said = "out of memory" if run.mfu is None else f"{run.mfu}"
        error = "" if run.mfu is None else f"{100 * (found.mfu / run.mfu - 1):+.0f}"
        print(f"| {run.model} | {at.world} | {run.method} | {at.tp} {at.ep} {at.pp} {at.etp} | {said} | {found.mfu:.1f} | {error} | "
              f"{found.memory / 1e9:.1f} | {'yes' if found.fits else 'no'} |")  # fmt: skip
    ran = [(run, found) for run, found in pairs if run.mfu is not None]
    order = [(a.mfu - b.mfu) * (x.mfu - y.mfu) > 0
             for (a, x), (b, y) in itertools.combinations(ran, 2) if a.model == b.model and a.mfu and b.mfu]  # fmt: skip
    errors = off(ran)
    print(f"\nconcordance: {sum(order)} of {len(order)} pairs within a model in the published order")
    print(
        f"error: median {statistics.median(errors):.1f}%, mean {statistics.mean(errors):.1f}%, largest {max(errors):.1f}%"
    )
    print(f"memory: {sum(found.fits for _, found in ran)} of {len(ran)} runs that ran fit, "
          f"{sum(not found.fits for run, found in pairs if run.mfu is None)} of 2 that did not do not")  # fmt: skip


def winners() -> None:
    """Where the published best mapping stands among all layouts that Megatron could run."""
    print("\n| model | rank of the published winner | layouts that fit | its time over the first's | do not fit |")
    print("| --- | --- | --- | --- | --- |")
    gpu = published.gpu()
    for run in published.runs():
        if run.method == "folded":
            found = search(
                run.shape, run.job, gpu, run.layout.world, gpu.memory * 1e9, engines=["megatron"], micro_batch=1
            )
            at = [row.layout for row in found.fits].index(run.layout)
            first, mine = found.fits[0].times, found.fits[at].times
            assert first is not None and mine is not None
            print(
                f"| {run.model} | {at + 1} | {len(found.fits)} | {mine.total / first.total:.3f} | {len(found.misfits)} |"
            )


def hold_out(title: str, runs: list[Run]) -> None:
    """Published and estimated MFU, and each as a ratio to its smallest number of GPUs."""
    print(f"\n{title}\n\n| model, method | published | estimated | last / first published | last / first estimated |")
    print("| --- | --- | --- | --- | --- |")
    pairs = [(run, published.estimate(run)) for run in runs]
    for (model, method), group in itertools.groupby(pairs, key=lambda pair: (pair[0].model, pair[0].method)):
        rows = list(group)
        theirs, ours = [run.mfu or 0.0 for run, _ in rows], [found.mfu for _, found in rows]
        told = " ".join(f"{run.layout.world}: {run.mfu}" for run, _ in rows)
        print(f"| {model}, {method} | {told} | {' '.join(f'{mfu:.1f}' for mfu in ours)} | {theirs[-1] / theirs[0]:.2f} | "
              f"{ours[-1] / ours[0]:.2f} |")  # fmt: skip
    errors = off(pairs)
    print(
        f"\nerror: median {statistics.median(errors):.1f}%, mean {statistics.mean(errors):.1f}%, largest {max(errors):.1f}%"
    )


def off(pairs: list[tuple[Run, Estimate]]) -> list[float]:
    """Relative errors in percent."""
    return [100 * abs(found.mfu / run.mfu - 1) for run, found in pairs if run.mfu]


def call() -> None:
    """The whole command: seconds on the clock, and of the processor, which other work on the machine does not lengthen."""
    run = next(run for run in published.runs() if run.method == "folded")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(dict(published.configs()[run.model])))
        command = [sys.executable, "-m", "moeforge", "plan", str(config)]
        print("\n| call | layouts | median s | processor s |\n| --- | --- | --- | --- |")
        for more in (
            ["--gpus", "128"],
            ["--gpus", "1024", "--global-batch", "1024"],
            ["--gpus", "1024", "--seq", "131072"],
        ):
            taken, spent, answer = [], [], b""
            for _ in range(CALLS):
                before, begin = os.times(), time.perf_counter()
                answer = subprocess.run([*command, *more, "--json"], stdout=subprocess.PIPE, check=True).stdout
                taken.append(time.perf_counter() - begin)
                after = os.times()
                spent.append(
                    after.children_user + after.children_system - before.children_user - before.children_system
                )
            data = json.loads(answer)
            print(f"| `plan config.json {' '.join(more)}` | {data['fit'] + len(data['do_not_fit'])} | {statistics.median(taken):.2f} | "
                  f"{statistics.median(spent):.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
