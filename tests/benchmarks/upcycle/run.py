"""moeforge beside mergekit-moe, MixtureKit and `cp`, on one job: SmolLM2-135M to a Mixtral of 8 experts, 2 active.

    python tests/benchmarks/upcycle/run.py                     # everything: medians of 5, then the flatness test
    python tests/benchmarks/upcycle/run.py --repeats 1 --only moeforge,cp-fsync --no-flatness

Prints a table and writes `results.json` into the work directory. See README.md for what is measured and how.

Standard library only, and kept so: on Linux a child's peak memory starts at what its parent held when it was started,
so the measuring process must be smaller than anything it measures.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

from moeforge.testing.real import smollm2_gguf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
EXPERTS, LIMIT_RSS_BYTES = 8, 700e6
OURS = "moeforge"


def environment(ours: bool) -> dict[str, str]:
    """No Hub for anybody; for our own processes, packages that are importable from a bare checkout."""
    if not ours:
        return {**os.environ, "HF_HUB_OFFLINE": "1"}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "MOEFORGE_PLUGINS": "",
    }


def measure(argv: list[str], log: Path, ours: bool) -> dict[str, float]:
    """Run one command: wall seconds, CPU seconds, peak resident bytes of its largest process, seconds to flush after it.

    Raises:
        SystemExit: it failed; shows the end of what it printed.
    """
    with open(log, "w") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(ours)
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed with {process.returncode}: {' '.join(argv)}\n{log.read_text()[-2000:]}")
    os.sync()
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "rss_bytes": usage.ru_maxrss * 1024,
            "flush_s": time.perf_counter() - started - wall}  # fmt: skip


def warm(path: Path) -> None:
    """Read every file once, so that each contestant finds its input in the page cache."""
    for file in [path] if path.is_file() else (f for f in path.rglob("*") if f.is_file()):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def make_venv(peer: str, given: Path | None, work: Path) -> Path:
    """The `bin` directory of a peer's own environment; made from `peers/<peer>.txt` unless one is given."""
    home = given / peer if given else work / "venvs" / peer
    if not (home / "bin" / "python").exists():
        venv.create(home, with_pip=True)
    wanted = [line for line in (HERE / "peers" / f"{peer}.txt").read_text().splitlines() if not line.startswith("#")]
    for requirement in wanted:  # torch first and alone, so that no later resolution replaces it
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement],
                       check=True, stderr=subprocess.DEVNULL)  # fmt: skip
    return home / "bin"


def headers(directory: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """name -> (file, where the body begins, header entry) of every tensor in a directory's safetensors files."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            table = json.loads(stream.read(length))
        found |= {name: (file, 8 + length, entry) for name, entry in table.items() if name != "__metadata__"}
    return found


def body(entry: tuple[Path, int, dict[str, Any]]) -> bytes:
    file, start, info = entry
    low, high = info["data_offsets"]
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view[start + low : start + high]


def check_mixture(output: Path, dense: Path) -> str:
    """Make sure that a contestant really did the job: 8 experts, each holding the dense FFN's bytes, in every layer.

    Each stores them differently (one tensor an expert, or one stacked tensor a layer), so it is enough that the down
    projections of the first and last layer are there 8 times.

    Raises:
        SystemExit: they are not.
    """
    sources, made = headers(dense), headers(output)
    layers = json.loads((dense / "config.json").read_text())["num_hidden_layers"]
    for layer in {0, layers - 1}:
        wanted = body(sources[f"model.layers.{layer}.mlp.down_proj.weight"])
        held = 0
        for name, entry in made.items():
            size = entry[2]["data_offsets"][1] - entry[2]["data_offsets"][0]
            if f".layers.{layer}." in name and "expert" in name and size in (len(wanted), EXPERTS * len(wanted)):
                data = body(entry)
                held += sum(data[i : i + len(wanted)] == wanted for i in range(0, len(data), len(wanted)))
        if held != EXPERTS:
            sys.exit(f"{output}: layer {layer} holds the dense down projection {held} times, not {EXPERTS}")
    parameters = sum(math.prod(entry["shape"]) for _, _, entry in made.values())
    return f"{len(made)} tensors, {parameters / 1e6:.1f} M parameters"


class Bench:
    """The places and the contestants of one benchmark run."""

    def __init__(self, work: Path, venvs: Path | None, only: list[str] | None):
        self.work = work
        self.table: dict[str, dict[str, Any]] = tomllib.loads((HERE / "contestants.toml").read_text())
        unknown = set(only or ()) - set(self.table)
        if unknown:
            sys.exit(f"--only {','.join(sorted(unknown))}: choose from {', '.join(self.table)}")
        self.names = [name for name in self.table if only is None or name in only]
        self.gguf = smollm2_gguf()
        self.dense = work / "dense"
        self.reference = work / "reference"
        self.bins = {peer: make_venv(peer, venvs, work) for peer in {e["peer"] for n, e in self.table.items()
                                                                      if n in self.names and "peer" in e}}  # fmt: skip
        if not (self.dense / "config.json").exists():
            subprocess.run(
                [sys.executable, HERE / "inputs.py", "dense", self.gguf, self.dense], check=True, env=environment(True)
            )
        if "cp-fsync" in self.names and not self.reference.exists():
            measure(self.argv(OURS, self.dense, self.reference), work / "reference.log", ours=True)

    def argv(self, name: str, source: Path, output: Path) -> list[str]:
        peer = self.table[name].get("peer")
        places = {
            "source": source,
            "gguf": self.gguf,
            "output": output,
            "reference": self.reference,
            "python": sys.executable,
        }
        if peer:
            config = self.work / f"{peer}.yml"
            config.write_text((HERE / "peers" / f"{peer}.yml").read_text().replace("{source}", str(source)))
            places |= {"bin": self.bins[peer], "config": config}
        return [word.format(**places) for word in self.table[name]["argv"]]

    def once(self, name: str, source: Path) -> tuple[dict[str, float], Path]:
        """One measured run from a quiet disk and a warm cache; the output is left for a look."""
        output = self.work / "output"
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        warm(self.gguf if "{gguf}" in self.table[name]["argv"] else source)
        if name == "cp-fsync":
            warm(self.reference)
        return measure(
            self.argv(name, source, output), self.work / f"{name}.log", "peer" not in self.table[name]
        ), output

    def compare(self, repeats: int) -> dict[str, list[dict[str, float]]]:
        """`repeats` rounds; each round runs everybody once, in an order that turns by one place a round."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
        for turn in range(repeats):
            at = turn % len(self.names)
            for name in self.names[at:] + self.names[:at]:
                taken, output = self.once(name, self.dense)
                runs[name].append(taken)
                note = ""
                if turn == 0 and output.exists():
                    taken["output_bytes"] = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
                    note = ", " + check_mixture(output, self.dense) if name != "moeforge-gguf" else ""
                print(
                    f"  round {turn + 1} {name}: {taken['wall_s']:.2f} s, {taken['rss_bytes'] / 1e6:.0f} MB{note}",
                    file=sys.stderr,
                )
        return runs

    def flatness(self, base_rss: float) -> dict[str, dict[str, float]]:
        """moeforge's peak memory on synthetic checkpoints 8 times larger, relative to the real model's."""
        found = {}
        for shape in ("deeper", "wider"):
            source = self.work / shape
            if not source.exists():
                subprocess.run(
                    [sys.executable, HERE / "inputs.py", shape, self.dense, source], check=True, env=environment(True)
                )
            taken, output = self.once(OURS, source)
            size = sum(f.stat().st_size for f in output.rglob("*.safetensors"))
            found[shape] = {**taken, "output_bytes": size, "rss_ratio": taken["rss_bytes"] / base_rss}
            shutil.rmtree(output)
            shutil.rmtree(source)
        return found


def machine() -> dict[str, Any]:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "kernel": platform.release(),
            "python": platform.python_version(), "load_before": os.getloadavg()[0]}  # fmt: skip


def versions(bins: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Versions of what matters, asked of each environment."""
    code = ("import json;from importlib import metadata as m;"
            "print(json.dumps({d.name.lower(): d.version for d in m.distributions() if d.name and d.name.lower() in "
            "('moeforge','mergekit','mixturekit','torch','transformers','safetensors','numpy','gguf')}))")  # fmt: skip
    pythons = {OURS: sys.executable, **{peer: str(place / "python") for peer, place in bins.items()}}
    return {name: json.loads(subprocess.check_output([python, "-c", code])) for name, python in pythons.items()}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and the ratio of each wall time to moeforge's."""
    table = {
        name: {key: statistics.median(t[key] for t in taken if key in t) for key in taken[0]}
        for name, taken in runs.items()
    }
    ours = table.get(OURS, {}).get("wall_s")
    for row in table.values():
        if ours:
            row["times_moeforge"] = row["wall_s"] / ours
    return table


def goals(
    table: dict[str, dict[str, float]], peers: set[str], flat: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """What was aimed at, what was measured."""
    found = []

    def goal(text: str, measured: float, limit: float, unit: str) -> None:
        found.append({"goal": text, "measured": measured, "limit": limit, "unit": unit, "met": measured <= limit})

    ours = table.get(OURS)
    if ours and (rivals := {name: table[name]["wall_s"] for name in peers & set(table)}):
        fastest = min(rivals, key=rivals.__getitem__)
        goal(f"wall at most 1/3 of the faster peer's ({fastest})", ours["wall_s"], rivals[fastest] / 3, "s")
    if ours and "cp-fsync" in table and "start-up" in table:
        goal(
            "wall at most 2.5 x cp + start-up",
            ours["wall_s"],
            2.5 * table["cp-fsync"]["wall_s"] + table["start-up"]["wall_s"],
            "s",
        )
    if ours:
        goal("peak memory at most 700 MB", ours["rss_bytes"] / 1e6, LIMIT_RSS_BYTES / 1e6, "MB")
    for shape, row in flat.items():
        goal(f"peak memory flat (+10 %) on a synthetic checkpoint 8 times larger ({shape})", row["rss_ratio"], 1.1, "x")
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as it goes into RESULTS.md."""
    m = report["machine"]
    lines = [f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, Linux {m['kernel']}, Python {m['python']}, "
             f"load before {m['load_before']:.2f}; medians of {report['repeats']}", ""]  # fmt: skip
    lines += [
        f"- {name}: " + ", ".join(f"{k} {v}" for k, v in sorted(found.items()))
        for name, found in report["versions"].items()
    ]
    lines += [
        "",
        "| | wall s | x moeforge | CPU s | flush after s | peak RSS MB | output MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["medians"].items():
        ratio = f"{row['times_moeforge']:.2f}" if "times_moeforge" in row else "-"
        size = f"{row['output_bytes'] / 1e6:.0f}" if "output_bytes" in row else "-"
        lines.append(f"| {name} | {row['wall_s']:.2f} | {ratio} | {row['cpu_s']:.2f} | {row['flush_s']:.2f} "
                     f"| {row['rss_bytes'] / 1e6:.0f} | {size} |")  # fmt: skip
    for shape, row in report["flatness"].items():
        lines.append(f"| moeforge, {shape} | {row['wall_s']:.2f} | - | {row['cpu_s']:.2f} | {row['flush_s']:.2f} "
                     f"| {row['rss_bytes'] / 1e6:.0f} | {row['output_bytes'] / 1e6:.0f} |")  # fmt: skip
    lines += ["", "| goal | measured | limit | met |", "| --- | --- | --- | --- |"]
    lines += [f"| {g['goal']} | {g['measured']:.2f} {g['unit']} | {g['limit']:.2f} {g['unit']} | {'yes' if g['met'] else 'no'} |"
              for g in report["goals"]]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "upcycle-benchmark", help="inputs, outputs, venvs, results"
    )
    parser.add_argument("--venvs", type=Path, help="a directory with ready venvs named after the peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="comma-separated contestants")
    parser.add_argument("--flatness", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "repeats": args.repeats}
    bench = Bench(args.work.resolve(), args.venvs, args.only.split(",") if args.only else None)
    report["versions"] = versions(bench.bins)
    report["runs"] = bench.compare(args.repeats)
    report["medians"] = summary(report["runs"])
    flat = args.flatness and OURS in report["medians"]
    report["flatness"] = bench.flatness(report["medians"][OURS]["rss_bytes"]) if flat else {}
    peers = {name for name, entry in bench.table.items() if "peer" in entry}
    report["goals"] = goals(report["medians"], peers, report["flatness"])
    (args.work / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(bench.work / "output", ignore_errors=True)
    print(markdown(report))


if __name__ == "__main__":
    main()
