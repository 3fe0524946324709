"""A mixture after N tokens beside the dense model continued on the same tokens, in the same order.

    python tests/benchmarks/tune/curves.py                                  # about an hour on two cores
    python tests/benchmarks/tune/curves.py --steps 2 --points 2 --length 64 --methods copy    # a smoke test

Everything goes through the command. Prints a table for RESULTS.md; curves and numbers lie in the work directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moeforge.testing.real import smollm2_gguf

ROOT = Path(__file__).resolve().parents[3]


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


def curve(directory: Path) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss), before the first step and on."""
    seen, found = 0, []
    for line in (directory / "tune" / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            seen += record["tokens"]
        else:
            found.append((seen, record["loss"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--points", type=int, default=6, help="measurements after the one before the first step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--methods", default="copy,noise,drop", help="how the mixtures are made")
    parser.add_argument(
        "--data", action="append", help="sources [default: builtin:prose and builtin:code in equal shares]"
    )
    parser.add_argument("--train", default="all")
    parser.add_argument("--learning-rate", default="1e-4")
    parser.add_argument("--held-out", default="0.01")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tune-curves")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    every = max(1, args.steps // args.points)
    data = [word for source in args.data or ["builtin:prose=1", "builtin:code=1"] for word in ("--data", source)]
    sources: dict[str, Any] = {"dense": smollm2_gguf()}
    for method in args.methods.split(","):
        sources[method] = args.work / f"{method}-{args.experts}"
        moeforge("upcycle", smollm2_gguf(), "--method", method, "--experts", args.experts, "--top-k", 2, "--no-verify", "-o", sources[method])  # fmt: skip
    curves, manifests = {}, {}
    for name, source in sources.items():
        out = args.work / f"{name}-tuned"
        # dtypes of the result are those of the source: nothing here reads the weights back
        moeforge("tune", source, *data, "--train", args.train, "--steps", args.steps, "--evaluate-every", every,
                 "--sequence-length", args.length, "--batch-size", args.rows, "--learning-rate", args.learning_rate,
                 "--held-out", args.held_out, "-o", out, "--force")  # fmt: skip
        curves[name], manifests[name] = curve(out), json.loads((out / "moeforge.json").read_text("utf-8"))
    (args.work / "curves.json").write_text(json.dumps(curves, indent=1))
    plot(curves, args.work / "curves.png")
    print(report(curves, {name: body["counts"] for name, body in manifests.items()}))


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        axes.plot(
            *zip(*points, strict=True), marker="o", label="dense, continued" if name == "dense" else f"mixture, {name}"
        )
    axes.set(xlabel="tokens seen", ylabel="held-out loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def report(curves: dict[str, list[tuple[int, float]]], counts: dict[str, dict[str, Any]]) -> str:
    """The curves as a table: a row for every measurement, a column for every model."""
    names = list(curves)
    lines = ["| tokens | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for row in zip(*curves.values(), strict=True):
        lines.append(f"| {row[0][0]:,} | " + " | ".join(f"{loss:.4f}" for _, loss in row) + " |")
    lines.append("| seconds of training | " + " | ".join(f"{counts[n]['train_seconds']:.0f}" for n in names) + " |")
    lines.append("| parameters | " + " | ".join(f"{counts[n]['parameters_total'] / 1e6:.0f} M" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
