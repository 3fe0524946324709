"""LoRA experts beside plain LoRA at equal trainable parameters, on three domains whose formats conflict.

    python tests/benchmarks/attach/quality.py                                # about 40 minutes on two quiet cores
    python tests/benchmarks/attach/quality.py --rates 3e-4,1e-3              # each method at the better of two rates
    python tests/benchmarks/attach/quality.py --steps 3 --rows 1 --seeds 0 --only lora,mixlora    # a smoke test
    python tests/benchmarks/attach/quality.py --tasks LLM-Adapters/dataset   # three public tasks instead, see tasks.py

See README.md. Every run is appended to quality.jsonl in the work directory as it ends, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import LENGTH, ROOT, ROWS, Domain, Log, Trained, attach, domain, heading, settle_process, table, trainable
from tasks import TASKS, score, task

from moeforge.testing.interval import Interval
from moeforge.testing.real import smollm2_gguf

DOMAINS = ("prose", "code", "legal")
EVERYWHERE = "q,k,v,o,gate,up,down"
CLOSE = 0.03
"""How far trainable parameters may be from plain LoRA's."""
BALANCE = 0.01
LABELLED = 0.75
"""Share of LoRA-Mixer's updates in its first, labelled phase."""
REFERENCE, TWICE, ALONE, HARD_SOFT = "lora", "lora-2x", "lora-alone", "lora-mixer"


@dataclass(frozen=True)
class Contestant:
    """How `attach` makes it, but for the rank, and how long it trains beside the others."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: float = 1.0


PLAIN = {"sites": EVERYWHERE, "experts": "1"}
CONTESTANTS = {
    REFERENCE: Contestant("custom", PLAIN),
    "dora": Contestant("custom", {**PLAIN, "dora": True}),
    "mixlora": Contestant("mixlora"),
    "mola-2468": Contestant("mola", {"experts": "2468"}),
    "mola-diamond": Contestant("mola", {"experts": "diamond"}),
    "llava-mole": Contestant("llava-mole"),
    HARD_SOFT: Contestant("lora-mixer", {"experts": str(len(DOMAINS))}),
    TWICE: Contestant("custom", PLAIN, steps=2.0),
    ALONE: Contestant("custom", PLAIN),
}


def matched_ranks(least: int) -> dict[str, tuple[int, int]]:
    """Name -> (rank, trainable parameters), for the smallest rank of plain LoRA, `least` or more, that all others come close to.

    Raises:
        SystemExit: there is none below four times `least`.
    """
    lines = {}
    for name, one in CONTESTANTS.items():
        first, second = (trainable(one.method, rank=rank, **one.options) for rank in (1, 2))
        lines[name] = (second - first, 2 * first - second)  # so many a rank, and so many of routers and magnitudes
    for rank in range(least, 4 * least):
        budget = rank * lines[REFERENCE][0]
        ranks = {name: max(round((budget - rest) / slope), 1) for name, (slope, rest) in lines.items()}
        counts = {name: ranks[name] * slope + rest for name, (slope, rest) in lines.items()}
        if all(abs(count - budget) <= CLOSE * budget for count in counts.values()):
            return {name: (ranks[name], counts[name]) for name in lines}
    sys.exit(
        f"--rank {least}: no rank from there to {4 * least} gives all methods the same parameters within {CLOSE:.0%}"
    )


def domains_of(job: Mapping[str, Any]) -> dict[str, Domain]:
    if "tasks" in job:
        return {name: task(Path(job["tasks"]), name) for name in TASKS}
    return {name: domain(name) for name in DOMAINS}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one contestant and measure it: held-out losses by domain, tokens, seconds; of tasks, their questions too."""
    domains = domains_of(job)
    name, steps, seed = job["name"], job["steps"], job["seed"]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if name == "base":
            trained, spent = Trained(smollm2_gguf()), []
            return _measure(trained, domains, job) | _sums(spent)
        one = CONTESTANTS[name]

        def fresh() -> Trained:
            return Trained(attach(scratch / "adapter", one.method, rank=job["rank"], seed=seed, **one.options))

        how = {"rate": job["rate"], "seed": seed}
        if name == ALONE:
            # as many tokens of its domain as the mixed run has of each, so the difference is what the other domains cost or give
            found: dict[str, Any] = {}
            spent = []
            for own, text in domains.items():
                trained = fresh()
                spent.append(trained.train([text], scratch / own, steps=max(round(steps / len(domains)), 1), **how))
                measured = _measure(trained, {own: text}, job)
                found = {key: {**found.get(key, {}), **measured[key]} for key in measured}
            return found | _sums(spent)
        trained = fresh()
        if name == HARD_SOFT:
            spent = _hard_soft(trained, domains, scratch, steps, how)
        else:
            spent = [
                trained.train(
                    list(domains.values()), scratch / "log", steps=round(steps * one.steps), balance=BALANCE, **how
                )
            ]
        return _measure(trained, domains, job) | _sums(spent)


def _hard_soft(
    trained: Trained, domains: Mapping[str, Any], scratch: Path, steps: int, how: dict[str, Any]
) -> list[dict[str, Any]]:
    """LoRA-Mixer: a label sends a domain's tokens to its expert, then the routers alone learn on the same mixture."""
    texts, hard = list(domains.values()), max(round(steps * LABELLED), 1)
    return [
        trained.train(texts, scratch / "hard", steps=hard, route="label", **how),
        trained.train(texts, scratch / "soft", steps=max(steps - hard, 1), kind="routers", balance=BALANCE, **how),
    ]


def _measure(trained: Trained, domains: Mapping[str, Domain], job: Mapping[str, Any]) -> dict[str, Any]:
    """Of the text for choosing half as much is read as of that for the results."""
    rows = job["rows"]
    choose = {name: trained.loss(text.choose, max(rows // 2, 1))["loss"] for name, text in domains.items()}
    report = {name: trained.loss(text.report, rows) for name, text in domains.items()}
    measured: dict[str, Any] = {
        "choose": choose,
        "loss": {name: found["loss"] for name, found in report.items()},
        "held_out_tokens": {name: found["tokens"] for name, found in report.items()},
    }
    if "tasks" in job:
        asked = {
            name: score(trained.model, trained.tokenizer, text.questions[: job["questions"]])
            for name, text in domains.items()
        }
        for key in ("accuracy", "nats"):
            measured[key] = {name: found[key] for name, found in asked.items()}
    return measured


def _sums(spent: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": sum(part["tokens"] for part in spent),
        "seconds": round(sum(part["seconds"] for part in spent), 1),
        "losses": [loss for part in spent for loss in part["losses"]],
    }


def mean_loss(record: Mapping[str, Any], key: str = "loss") -> float:
    return statistics.fmean(record[key].values())


def contest(
    args: argparse.Namespace, log: Log, ranks: Mapping[str, tuple[int, int]]
) -> dict[str, list[dict[str, Any]]]:
    """Name -> its record of every seed, at the rate that was best for it on the first seed, judged on text that is not reported."""
    found: dict[str, list[dict[str, Any]]] = {}

    def get(name: str, seed: int, rate: float) -> dict[str, Any]:
        steps, rank = (0, 0) if name == "base" else (args.steps, ranks[name][0])
        job = {"name": name, "rank": rank, "steps": steps, "rate": rate, "seed": seed, "rows": args.rows}
        if args.tasks is not None:
            job |= {"tasks": str(args.tasks), "questions": args.questions}
        record = log.get(job, run)
        print(f"  {name} seed {seed} rate {rate:g}: {mean_loss(record):.4f}, {record['tokens']:,} tokens, {record['seconds']:.0f} s, "
              f"{record['peak_rss_mb']} MB", file=sys.stderr, flush=True)  # fmt: skip
        return record

    found["base"] = [get("base", 0, 0.0)]
    for name in args.only:
        tried = {rate: get(name, args.seeds[0], rate) for rate in args.rates}
        rate = min(tried, key=lambda rate: mean_loss(tried[rate], "choose"))
        found[name] = [tried[rate], *(get(name, seed, rate) for seed in args.seeds[1:])]
    return found


def differences(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], key: str = "loss"
) -> dict[str, Interval]:
    """Domain (and `mean` of all) -> loss, or what `key` names, of the one less that of the other, paired by seed."""
    found = {
        name: Interval.of([a[key][name] - b[key][name] for a, b in zip(one, other, strict=True)])
        for name in one[0][key]
    }
    return found | {"mean": Interval.of([mean_loss(a, key) - mean_loss(b, key) for a, b in zip(one, other, strict=True)])}  # fmt: skip


def report(found: Mapping[str, list[dict[str, Any]]], ranks: Mapping[str, tuple[int, int]]) -> str:
    budget = ranks[REFERENCE][1]
    domains = list(found["base"][0]["loss"])
    rows = []
    for name, records in found.items():
        means = [statistics.fmean(record["loss"][one] for record in records) for one in domains]
        rank, count = ranks.get(name, (0, 0))
        job = records[0]["job"]
        rows.append([name, str(rank), f"{count:,} ({count / budget:.3f})", f"{job['rate']:g}", f"{records[0]['tokens']:,}",
                     *(f"{mean:.4f}" for mean in means), f"{statistics.fmean(means):.4f}",
                     f"{statistics.fmean(r['seconds'] for r in records):.0f}", str(max(r["peak_rss_mb"] for r in records))])  # fmt: skip
    parts = [
        table(
            ["method", "rank", "learn (of plain LoRA's)", "rate", "tokens", *domains, "mean", "seconds", "peak MB"],
            rows,
        )
    ]
    rest = [name for name in found if name not in (REFERENCE, "base")]
    if REFERENCE in found:
        parts.append(_against(found, REFERENCE, rest))
    if "accuracy" in found["base"][0]:
        parts.append(_answers(found, domains))
        if REFERENCE in found:
            parts.append(_against(found, REFERENCE, rest, "nats"))
    conflict = [name for name in ("llava-mole", "mixlora") if name in found]
    if TWICE in found and conflict:
        parts.append(_against(found, TWICE, conflict))
    held = ", ".join(f"{name} {count:,}" for name, count in found["base"][0]["held_out_tokens"].items())
    seeds = ", ".join(str(record["job"]["seed"]) for record in next(reversed(found.values())))
    parts.append(f"Held-out tokens: {held}; seeds {seeds}. {ALONE}: a LoRA for each domain, of as many tokens of it as the mixed runs see, "
                 "measured on its own domain.")  # fmt: skip
    return "\n\n".join(parts)


def _against(found: Mapping[str, list[dict[str, Any]]], reference: str, names: Sequence[str], key: str = "loss") -> str:
    rows, domains = [], list(found["base"][0]["loss"])
    for name in names:
        apart = differences(found[name], found[reference], key)
        rows.append([name, *map(str, apart.values()), apart["mean"].claim])
    return table([f"less the {key} of {reference}, ± 95 %", *domains, "mean", "claim"], rows)


def _answers(found: Mapping[str, list[dict[str, Any]]], domains: Sequence[str]) -> str:
    """Accuracy and nats of the right answer, means over the seeds."""
    rows = []
    for name, records in found.items():
        cells = [statistics.fmean(r[key][one] for r in records) for key in ("accuracy", "nats") for one in domains]
        means = [statistics.fmean(mean_loss(r, key) for r in records) for key in ("accuracy", "nats")]
        rows.append([name, *(f"{x:.1%}" for x in cells[: len(domains)]), f"{means[0]:.1%}",
                     *(f"{x:.3f}" for x in cells[len(domains) :]), f"{means[1]:.3f}"])  # fmt: skip
    head = [f"{one} {key}" for key in ("right", "nats") for one in (*domains, "mean")]
    return table(["method", *head], rows)


def plot(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Differences to plain LoRA with their intervals, by domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in found if name not in (REFERENCE, "base")]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.6 * len(names)), layout="constrained")
    for at, key in enumerate((*found["base"][0]["loss"], "mean")):
        ys = [row + 0.18 * (1.5 - at) for row in range(len(names))]
        apart = [differences(found[name], found[REFERENCE])[key] for name in names]
        axes.errorbar([a.mean for a in apart], ys, xerr=[a.half or 0.0 for a in apart], fmt="s" if key == "mean" else "o",
                      color="black" if key == "mean" else f"C{at}", capsize=3, markersize=4, label=key)  # fmt: skip
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss less that of plain LoRA (nats a token, 95 % interval over seeds)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help=f"updates of {ROWS * LENGTH} tokens")
    parser.add_argument("--tokens", type=int, help="the same budget in tokens, rounded down to updates")
    parser.add_argument("--rows", type=int, default=8, help=f"held-out rows of {LENGTH} tokens, for each domain")
    parser.add_argument("--rank", type=int, default=16, help="least rank of plain LoRA")
    parser.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=[1e-3],
                        help="peak learning rates; of several, each method gets its best on the first seed")  # fmt: skip
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(CONTESTANTS), help=", ".join(CONTESTANTS)
    )
    parser.add_argument(
        "--tasks", type=Path, help="folder of public tasks: train and answer these instead of the texts"
    )
    parser.add_argument("--questions", type=int, default=100, help="held-out questions, for each task")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "attach-quality")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    parser.add_argument("--json", action="store_true", help="print all records as JSON instead of tables")
    args = parser.parse_args()
    settle_process()
    if unknown := sorted(set(args.only) - set(CONTESTANTS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(CONTESTANTS)}")
    if args.tokens is not None:
        args.steps = max(args.tokens // (ROWS * LENGTH), 1)
    ranks = matched_ranks(args.rank)
    for name in args.only:
        print(f"  {name}: rank {ranks[name][0]}, {ranks[name][1]:,} parameters learn", file=sys.stderr)
    found = contest(args, Log(args.work / "quality.jsonl", args.fresh), ranks)
    if REFERENCE in found and len(found) > 2:
        plot(found, args.work / "quality.png")
    if args.json:
        print(json.dumps({"heading": heading(), "ranks": ranks, "runs": found}))
    else:
        print(f"{heading()}\n\n{report(found, ranks)}")


if __name__ == "__main__":
    main()
