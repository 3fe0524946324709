"""Was upcycling worth its tokens? Mixtures beside the dense model continued on the same tokens, and on as many FLOPs.

    python tests/benchmarks/tune/curves.py                                  # 21 runs of the whole model, two hours and more on two quiet cores
    python tests/benchmarks/tune/curves.py --layers 24-29 --train 'model.layers.2[4-9].*' --precision bf16    # only the last six layers
    python tests/benchmarks/tune/curves.py --steps 2 --points 2 --length 64 --methods copy --seeds 0    # a smoke test

Everything goes through the command. Every run that has ended is kept in the work directory and not done again. Prints tables for RESULTS.md;
curves.png and experts.png lie beside curves.json. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from moeforge.testing.interval import Interval
from moeforge.testing.real import smollm2_gguf

ROOT = Path(__file__).resolve().parents[3]
DENSE, FLOPS = "dense", "dense, equal FLOPs"
SHAPES = {"split": ("--experts", 8, "--top-k", 4, "--granularity", 2)}
"""How a method makes its mixture, where that is not 4 experts of which 2 are active."""


def moeforge(*words: object) -> None:
    """Run the command; its progress is shown.

    Raises:
        SystemExit: it failed.
    """
    argv = [sys.executable, "-P", "-m", "moeforge", *map(str, words)]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "MOEFORGE_PLUGINS": "",
    }
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"failed with {done.returncode}: moeforge {' '.join(map(str, words))}")


def read(directory: Path) -> dict[str, Any]:
    """What a run says: [(tokens seen, held-out loss)] before the first step and on, load by layer and source at both ends, counts."""
    seen, points, loads = 0, [], []
    for line in (directory / "tune" / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            seen += record["tokens"]
        elif "loss" in record:
            points.append((seen, record["loss"]))
            loads.append(record.get("by_label"))
    counts = json.loads((directory / "moeforge.json").read_text("utf-8"))["counts"]
    return {"points": points, "load": [loads[0], loads[-1]], "seconds": counts["train_seconds"], "total": counts["parameters_total"]}  # fmt: skip


class Contest:
    """Runs by contestant and seed, each kept as it ends.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, args.data or ["builtin:prose=1", "builtin:code=1"]
        self.path = args.work / "curves.json"
        self.kept: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, seed: int, source: str | Path, steps: int) -> dict[str, Any]:
        """Tune one contestant; `steps` differ where FLOPs are to be equal."""
        args = self.args
        words = [word for data in self.data for word in ("--data", data)] + [
            "--train", args.train, "--steps", steps, "--evaluate-every", max(1, steps // args.points), "--sequence-length", args.length,
            "--batch-size", args.rows, "--learning-rate", args.learning_rate, "--held-out", args.held_out, "--precision", args.precision, "--seed", seed,
        ]  # fmt: skip
        key = " ".join(map(str, [name, *words]))
        if key not in self.kept:
            out = args.work / "tuned"
            moeforge("tune", source, *words, "-o", out, "--force")
            self.kept[key] = read(out)
            shutil.rmtree(out)
            self.path.write_text(json.dumps(self.kept, indent=1))
        found = self.kept[key]
        start, end = found["points"][0][1], found["points"][-1][1]
        print(f"  {name}, seed {seed}: {start:.4f} -> {end:.4f}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        return found

    def mixture(self, method: str, seed: int) -> tuple[Path, float]:
        """(made by `upcycle` from that seed, its active parameters over the dense model's)."""
        out = self.args.work / f"{method}-{seed}"
        if not (out / "moeforge.json").exists():
            shape = SHAPES.get(method, ("--experts", 4, "--top-k", 2))
            moeforge("upcycle", smollm2_gguf(), "--method", method, *shape, "--layers", self.args.layers, "--seed", seed, "--no-verify", "-o", out)  # fmt: skip
        counts = json.loads((out / "moeforge.json").read_text("utf-8"))["counts"]
        return out, counts["parameters_active"] / DENSE_PARAMETERS

    def all(self) -> dict[str, list[dict[str, Any]]]:
        """Contestant -> its run of every seed."""
        args, found = self.args, {}
        ratio = 0.0
        for seed in args.seeds:
            found.setdefault(DENSE, []).append(self.run(DENSE, seed, smollm2_gguf(), args.steps))
            for method in args.methods:
                made, active = self.mixture(method, seed)
                found.setdefault(method, []).append(self.run(method, seed, made, args.steps) | {"active": active})
                shutil.rmtree(made)
                ratio = max(ratio, active)
            found.setdefault(FLOPS, []).append(self.run(FLOPS, seed, smollm2_gguf(), round(args.steps * ratio)))
        return found


DENSE_PARAMETERS = 134_515_008
"""SmolLM2-135M's, its tied embedding once."""


def gains(found: dict[str, list[dict[str, Any]]], name: str) -> list[list[float]]:
    """By measurement, what a contestant's held-out loss is above the dense model's of the same seed (the same held-out text, which a seed draws)."""
    columns = zip(*(
        [loss - other for (_, loss), (_, other) in zip(one["points"], dense["points"], strict=True)]
        for one, dense in zip(found[name], found[DENSE], strict=True)), strict=True)  # fmt: skip
    return [list(column) for column in columns]


def speciality(run: dict[str, Any], end: int) -> list[list[float]]:
    """[layer][expert], an expert's share of the first source's tokens less its share of the second's; 0: both alike."""
    return [[first - second for first, second in zip(*by_source[:2], strict=True)] for by_source in run["load"][end]]


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| contestant | parameters | active, of dense | held-out loss, first and last | above the dense model's at the end, ± 95 % | seconds | experts part by source, first and last |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, runs in found.items():
        first, last = (statistics.fmean(run["points"][at][1] for run in runs) for at in (0, -1))
        apart = "" if name == DENSE else str(Interval.of(gains(found, name)[-1]))
        parts = ["" if run["load"][0] is None else
                 " and ".join(f"{statistics.fmean(abs(x) for row in speciality(run, end) for x in row):.3f}" for end in (0, 1)) for run in runs[:1]]  # fmt: skip
        lines.append(f"| {name} | {runs[0]['total'] / 1e6:.0f} M | {runs[0].get('active', 1.0):.2f} | {first:.4f}, {last:.4f} | {apart} | "
                     f"{statistics.fmean(run['seconds'] for run in runs):.0f} | {parts[0]} |")  # fmt: skip
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses over tokens, means and 95 % intervals of the differences to the dense model; both scales leave room for what is close together,
    where one contestant starts far away."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shown = []
    for number, (name, runs) in enumerate(found.items()):
        tokens = [seen for seen, _ in runs[0]["points"]]
        columns = list(zip(*([loss for _, loss in run["points"]] for run in runs), strict=True))
        losses = [statistics.fmean(column) for column in columns]
        color, far = f"C{number}", losses[-1] > last_loss(found[DENSE]) + FAR
        label = f"{name} (off this scale: {losses[0]:.2f} to {losses[-1]:.2f})" if far else name
        left.plot(
            tokens, losses, marker="o", markersize=3, label=label, color=color, linestyle="--" if name == FLOPS else "-"
        )
        shown += [] if far else losses
        if name in (DENSE, FLOPS):
            continue
        bars = [Interval.of(column) for column in gains(found, name)]
        means, halves = [bar.mean for bar in bars], [bar.half or 0 for bar in bars]
        right.errorbar(tokens, means, yerr=halves, marker="o", markersize=3, capsize=3, label=name, color=color)
    room = 0.05 * (max(shown) - min(shown))
    left.set(
        xlabel="tokens seen",
        ylabel="held-out loss, mean of seeds (nats a token)",
        ylim=(min(shown) - room, max(shown) + room),
    )
    right.set_yscale("symlog", linthresh=0.02)
    right.set(xlabel="tokens seen", ylabel="above the dense model's, 95 % interval over seeds")
    right.axhline(0, color="grey", linewidth=1)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="lower right", ncols=3)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


FAR = 0.2
"""Nats above the dense model's loss from which on a contestant does not set the scale."""


def last_loss(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(run["points"][-1][1] for run in runs)


def plot_experts(found: dict[str, list[dict[str, Any]]], sources: list[str], path: Path) -> None:
    """Layers x experts of the first seed at the end: which source an expert takes more of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name, runs in found.items() if runs[0]["load"][0] is not None]
    figure, axes = plt.subplots(1, len(names), figsize=(2.2 * len(names) + 1, 5), layout="constrained", squeeze=False)
    maps = {name: speciality(found[name][0], 1) for name in names}
    limit = max(0.01, max(abs(x) for rows in maps.values() for row in rows for x in row))
    for ax, (name, rows) in zip(axes[0], maps.items(), strict=True):
        image = ax.imshow(rows, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        ax.set(title=name, xlabel="expert", ylabel="sparse layer", xticks=range(len(rows[0])), yticks=range(len(rows)))
    figure.colorbar(image, ax=axes[0].tolist(), label=f"share of {sources[0]} less share of {sources[1]}")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--points", type=int, default=4, help="measurements after the one before the first step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["copy", "noise", "drop", "split", "shared"],
                        help="how the mixtures are made")  # fmt: skip
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--data", action="append", help="two sources or more [default: builtin:prose and builtin:code in equal shares]"
    )
    parser.add_argument("--layers", default="all", help="which become sparse")
    parser.add_argument("--train", default="all", help="what learns, in the dense model and the mixtures alike")
    parser.add_argument("--learning-rate", default="1e-4")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--held-out", default="0.01")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tune-curves")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    contest = Contest(args)
    found = contest.all()
    plot(found, args.work / "curves.png")
    if any(runs[0]["load"][0] is not None for runs in found.values()):
        plot_experts(found, [word.partition("=")[0] for word in contest.data], args.work / "experts.png")
    print(report(found))


if __name__ == "__main__":
    main()
