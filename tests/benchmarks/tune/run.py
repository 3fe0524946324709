"""`moeforge tune` beside transformers' Trainer, on one job: SmolLM2-135M as a Mixtral of 4 experts, 2 active.

    python tests/benchmarks/tune/run.py                               # medians of 3 rounds, about 15 minutes on two cores
    python tests/benchmarks/tune/run.py --rounds 1 --steps 3 --length 64     # a smoke test

Prints a table for RESULTS.md and writes `results.json` into the work directory. See README.md for what is measured and how.

Standard library only, and kept so: on Linux a child's peak memory starts at what its parent held when it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moeforge.testing.real import smollm2_gguf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OURS = "moeforge"
PEERS = ("eager", "grouped_mm")
"""transformers' ways to run experts. `batched_mm` is left out: it copies an expert's weights for every token."""
WARM_UP = 2
"""Steps that do not count."""
SAME_FIRST_LOSS, SAME_LOSS = 1e-6, 1e-3
"""Relative difference of the losses of one step that still counts as the same work."""


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "MOEFORGE_PLUGINS": "",
    }


def once(name: str, work: Path) -> dict[str, Any]:
    """One contestant in a process of its own: what it measured, and its peak resident bytes.

    Raises:
        SystemExit: it failed; shows the end of what it printed.
    """
    out, log = work / f"{name}.json", work / f"{name}.log"
    script, *rest = ["ours.py"] if name == OURS else ["peer.py", name.removeprefix("trainer-")]
    argv = [sys.executable, "-P", str(HERE / script), str(work / "job.json"), str(out), *rest]
    with open(log, "w") as stream:
        process = subprocess.Popen(
            argv, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{name} failed with {process.returncode}\n{log.read_text()[-3000:]}")
    found = json.loads(out.read_text())
    steps = [after - before for before, after in zip(found["times"], found["times"][1:], strict=False)][WARM_UP:]
    counted = found["tokens"][WARM_UP:]
    return {**found, "step_s": statistics.median(steps), "tokens_per_second": sum(counted) / sum(steps),
            "rss_bytes": usage.ru_maxrss * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}  # fmt: skip


def mixture(work: Path, experts: int) -> Path:
    """The model that is trained, made once."""
    made = work / f"moe-{experts}"
    if not (made / "moeforge.json").exists():
        argv = [sys.executable, "-P", "-m", "moeforge", "upcycle", str(smollm2_gguf()), "--experts", str(experts), "--top-k", "2",
                "--method", "copy", "--no-verify", "-o", str(made)]  # fmt: skip
        subprocess.run(argv, check=True, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return made


def same_work(runs: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference of any loss from ours at the same step.

    Raises:
        SystemExit: it shows that other work was done.
    """
    wanted = runs[OURS][0]
    worst = 0.0
    for name, found in ((name, run) for name, all_runs in runs.items() for run in all_runs):
        if found["tokens"] != wanted["tokens"] or found["trained"] != wanted["trained"]:
            sys.exit(f"{name} trained {found['trained']} parameters on {found['tokens']}, moeforge {wanted['trained']} on {wanted['tokens']}")  # fmt: skip
        for step, (a, b) in enumerate(zip(found["losses"], wanted["losses"], strict=True), 1):
            worst = max(worst, abs(a - b))
            if not abs(a - b) <= (SAME_FIRST_LOSS if step == 1 else SAME_LOSS) * abs(b):
                sys.exit(f"{name}: loss {a} at step {step}, moeforge has {b}: not the same work")
    return worst


def report(runs: dict[str, list[dict[str, Any]]], job: dict[str, Any], load: str) -> str:
    def middle(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    peers = [name for name in runs if name != OURS]
    fastest = max(peers, key=lambda name: middle(name, "tokens_per_second"))
    leanest = min(peers, key=lambda name: middle(name, "rss_bytes"))
    lines = [f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, torch "
             f"{version('torch')}, transformers {version('transformers')}, accelerate {version('accelerate')}, load before {load}; "
             f"medians of {len(runs[OURS])}",
             f"{runs[OURS][0]['trained']:,} parameters learn (`{job['train']}`), {job['steps']} steps of {job['accumulate']} x "
             f"{job['rows']} x {job['length']} tokens, {job['precision']}, {runs[OURS][0]['attention']} attention; losses differ by at "
             f"most {same_work(runs):.1e}", "",
             "| | tokens/s | s a step | peak RSS MB | CPU s | experts |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    lines += [f"| {name} | {middle(name, 'tokens_per_second'):.1f} | {middle(name, 'step_s'):.2f} | "
              f"{middle(name, 'rss_bytes') / 1e6:.0f} | {middle(name, 'cpu_s'):.0f} | {runs[name][0]['experts']} |" for name in runs]  # fmt: skip
    # ratios within each round, so that a slow minute of the machine hits both sides
    speed = statistics.median(a["tokens_per_second"] / b["tokens_per_second"]
                              for a, b in zip(runs[OURS], runs[fastest], strict=True))  # fmt: skip
    memory = middle(OURS, "rss_bytes") / middle(leanest, "rss_bytes")
    lines += ["", "| goal | measured | met |", "| --- | --- | --- |",
              f"| tokens/s at least 1.0 x the fastest peer's ({fastest}) | {speed:.2f} x | {'yes' if speed >= 1 else 'no'} |",
              f"| peak memory at most 1.0 x the leanest peer's ({leanest}) | {memory:.2f} x | {'yes' if memory <= 1 else 'no'} |"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--train", default="*.layers.2[4-9].*", help="patterns of parameter names, or all")
    parser.add_argument("--only", help="comma-separated contestants: moeforge, trainer-eager, trainer-grouped_mm")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tune-benchmark")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        sys.exit(f"--steps {args.steps}: the first {WARM_UP} do not count; give more")
    args.work.mkdir(parents=True, exist_ok=True)
    job = {"model": str(mixture(args.work, args.experts)), "data": ["builtin:prose"], "train": args.train, "steps": args.steps,
           "length": args.length, "rows": args.rows, "accumulate": args.accumulate, "rate": 1e-4, "seed": 0,
           "precision": args.precision}  # fmt: skip
    (args.work / "job.json").write_text(json.dumps(job))
    names = [OURS, *(f"trainer-{peer}" for peer in PEERS)]
    names = [name for name in names if args.only is None or name in args.only.split(",")]
    if OURS not in names or len(names) < 2:
        sys.exit(f"--only {args.only}: name {OURS} and at least one trainer")
    load = f"{os.getloadavg()[0]:.2f}"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            started = time.monotonic()
            runs[name].append(once(name, args.work))
            last = runs[name][-1]
            print(f"  round {turn + 1} {name}: {last['tokens_per_second']:.1f} tokens/s, {last['rss_bytes'] / 1e6:.0f} MB, "
                  f"{time.monotonic() - started:.0f} s in all", file=sys.stderr, flush=True)  # fmt: skip
    (args.work / "results.json").write_text(json.dumps({"job": job, "runs": runs}, indent=1))
    print(report(runs, job, load))


if __name__ == "__main__":
    main()
