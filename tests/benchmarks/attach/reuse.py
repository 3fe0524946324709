"""Four LoRAs trained apart, imported frozen, and only a router to train: each domain beside its own LoRA.

    python tests/benchmarks/attach/reuse.py                                  # about 30 minutes on two quiet cores
    python tests/benchmarks/attach/reuse.py --steps 2 --router-tokens 512 --rows 1 --seeds 0    # a smoke test

See README.md. Every seed is appended to reuse.jsonl in the work directory as it ends, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    LENGTH,
    ROOT,
    ROWS,
    Domain,
    Log,
    Trained,
    attach,
    domain,
    heading,
    settle_process,
    table,
)

from moeforge.model.adapters import forced, values_of
from moeforge.testing.interval import Interval
from moeforge.testing.real import smollm2_gguf
from moeforge.train.batch import Batch, forward
from moeforge.train.routing import find_sites

DOMAINS = ("prose", "code", "legal", "cpp")
ATTENTION = "q,k,v,o"
ENTROPY = {"off": 0.0, "plus": 1.0, "minus": 1.0}
"""Sign of the entropy in the router's loss -> multiple of --entropy: plus makes it sure of itself, minus (as LoRA-Mixer prints it)
undecided."""
SAME = 1e-5
"""How far an imported expert's loss may be from its LoRA's, relative."""
OWN, BASE, UNIFORM = "own LoRA", "base", "uniform"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One seed: the LoRAs, then every router on them. Losses by way and domain, gates by way."""
    domains = {name: domain(name) for name in DOMAINS}
    texts, seed = list(domains.values()), job["seed"]
    found: dict[str, Any] = {"loss": {}, "gates": {}, "tokens": {}, "trainable": {}, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = Trained(smollm2_gguf())
        found["loss"][BASE] = _losses(base, domains, job["rows"])
        found["held_out_tokens"] = {
            name: base.loss(text.report, job["rows"])["tokens"] for name, text in domains.items()
        }
        plain = attach(scratch / "plain", "custom", sites=ATTENTION, experts="1", rank=job["rank"], seed=seed)
        loras, own = [], {}
        for name, text in domains.items():
            lora = Trained(plain)
            spent = lora.train([text], scratch / name, steps=job["steps"], rate=job["rate"], seed=seed)
            own |= _losses(lora, {name: text}, job["rows"])
            loras.append({key: value.clone() for key, value in values_of(lora.model).items()})
            _count(found, OWN, lora, "all", spent)
        found["loss"][OWN] = own
        for null in (0, 1):
            mixer = attach(scratch / f"null-{null}", "lora-mixer", experts=str(len(DOMAINS)), rank=job["rank"], null_experts=null,
                           router_init="zero", seed=seed)  # fmt: skip
            if not null:
                even = Trained(attach(scratch / UNIFORM, "lora-mixer", experts=str(len(DOMAINS)), rank=job["rank"], select="all",
                                      router_init="zero", seed=seed))  # fmt: skip
                fill(even, loras)
                found["loss"][UNIFORM] = _losses(even, domains, job["rows"])
            for sign, multiple in ENTROPY.items():
                way = f"entropy {sign}" + (", null" if null else "")
                routed = Trained(mixer)
                fill(routed, loras)
                if sign == "off":
                    _prove(routed, domains, own, job["rows"])
                spent = routed.train(texts, scratch / way, steps=job["router_steps"], rate=job["router_rate"], seed=seed, kind="routers",
                                     balance=job["balance"], entropy=multiple * job["entropy"],
                                     entropy_sign="minus" if sign == "minus" else "plus")  # fmt: skip
                found["loss"][way] = _losses(routed, domains, job["rows"])
                found["gates"][way] = [gates(routed, text, job["rows"], null) for text in texts]
                _count(found, way, routed, "routers", spent)
    return found


@torch.no_grad()
def fill(mixture: Trained, loras: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Expert e is the e-th LoRA, as it was trained."""
    for name, part in values_of(mixture.model).items():
        root, marker, rest = name.partition(".experts.")
        if marker:
            number, _, leaf = rest.partition(".")
            part.copy_(loras[int(number)][f"{root}.{leaf}"])  # the parts are views of the model's own parameters


def _prove(mixture: Trained, domains: Mapping[str, Domain], own: Mapping[str, float], rows: int) -> None:
    """With every token sent to one expert the mixture is that expert's LoRA.

    Raises:
        SystemExit: it is not, so nothing that is measured would mean anything.
    """
    for expert, (name, text) in enumerate(domains.items()):
        with forced(mixture.model, expert):
            found = mixture.loss(text.report, rows)["loss"]
        if not abs(found - own[name]) <= SAME * own[name]:
            sys.exit(f"expert {name}: loss {found} where it stands in the mixture, {own[name]} as a LoRA alone")


def _losses(trained: Trained, domains: Mapping[str, Domain], rows: int) -> dict[str, float]:
    return {name: trained.loss(text.report, rows)["loss"] for name, text in domains.items()}


def _count(found: dict[str, Any], way: str, trained: Trained, kind: str, spent: Mapping[str, Any]) -> None:
    found["trainable"][way] = sum(p.numel() for p in trained.parameters(kind).values())
    found["tokens"][way] = found["tokens"].get(way, 0) + spent["tokens"]
    found["seconds"] += spent["seconds"]


@torch.no_grad()
def gates(trained: Trained, text: Domain, rows: int, null: int) -> list[float]:
    """What each expert weighs (the null expert last), as a mean over tokens and routers, on held-out text."""
    model, sites = trained.model.eval(), find_sites(trained.model)
    total, routed = torch.zeros(len(DOMAINS), dtype=torch.float64), 0
    for row in trained.held_out(text.report, rows).rows(repeat=False):
        batch = Batch.of([row], torch.device("cpu"))
        _, seen = forward(model, sites, batch)
        for routing in seen.values():
            total += routing.pairs.gates().double().sum(0)[: len(DOMAINS)]
            routed += int(batch.real.sum())
    shares = (total / routed).tolist()
    return shares + ([1 - sum(shares)] if null else [])


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    first = runs[0]
    rows, apart = [], []
    for way in first["loss"]:
        means = [statistics.fmean(one["loss"][way][name] for one in runs) for name in DOMAINS]
        rows.append([way, f"{first['trainable'].get(way, 0):,}", f"{first['tokens'].get(way, 0):,}", *(f"{m:.4f}" for m in means),
                     f"{statistics.fmean(means):.4f}"])  # fmt: skip
        if way not in (OWN, BASE):
            less = {name: [one["loss"][way][name] - one["loss"][OWN][name] for one in runs] for name in DOMAINS}
            mean = Interval.of([statistics.fmean(values) for values in zip(*less.values(), strict=True)])
            apart.append([way, *(str(Interval.of(values)) for values in less.values()), str(mean), mean.claim])
    parts = [table(["way", "learn", "tokens", *DOMAINS, "mean"], rows),
             table([f"less the loss of the {OWN}, ± 95 %", *DOMAINS, "mean", "claim"], apart)]  # fmt: skip
    heat = [[way, name, *(f"{x:.3f}" for x in share)] + [""] * (len(DOMAINS) + 1 - len(share))
            for way, shares in mean_gates(runs).items() for name, share in zip(DOMAINS, shares, strict=True)]  # fmt: skip
    parts.append(table(["gates", "text", *(f"expert {name}" for name in DOMAINS), "null"], heat))
    held = ", ".join(f"{name} {count:,}" for name, count in first["held_out_tokens"].items())
    parts.append(f"Held-out tokens: {held}; seeds {', '.join(str(one['job']['seed']) for one in runs)}; {OWN}: {len(DOMAINS)} LoRAs, their tokens added up.")  # fmt: skip
    return "\n\n".join(parts)


def mean_gates(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Way -> [domains][experts], a mean over the seeds."""
    return {way: torch.tensor([one["gates"][way] for one in runs]).mean(0).tolist() for way in runs[0]["gates"]}


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A heat map of domains by experts for every router."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = mean_gates(runs)
    figure, axes = plt.subplots(2, len(ENTROPY), figsize=(4.2 * len(ENTROPY), 7), layout="constrained")
    image, most = None, max(x for rows in ways.values() for row in rows for x in row)
    for axis, (way, shares) in zip(axes.flat, ways.items(), strict=True):
        image = axis.imshow(shares, vmin=0, vmax=most, cmap="viridis")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(
                    x,
                    y,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if share > 0.7 * most else "white",
                )
        axis.set_xticks(range(len(shares[0])), [*DOMAINS, "null"][: len(shares[0])])
        axis.set_yticks(range(len(DOMAINS)), DOMAINS)
        axis.set(title=way, xlabel="expert", ylabel="text")
    figure.colorbar(image, ax=list(axes.flat), label="mean gate")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help=f"updates of {ROWS * LENGTH} tokens of each LoRA")
    parser.add_argument("--router-tokens", type=int, default=4096, help="rounded down to updates, of each router")
    parser.add_argument("--rows", type=int, default=8, help=f"held-out rows of {LENGTH} tokens, for each domain")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the LoRAs")
    parser.add_argument("--router-rate", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.001, help="weight of each router's load-balance loss")
    parser.add_argument("--entropy", type=float, default=0.003, help="weight of each router's entropy, where it counts")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "attach-reuse")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    parser.add_argument("--json", action="store_true", help="print all records as JSON instead of tables")
    args = parser.parse_args()
    settle_process()
    log = Log(args.work / "reuse.jsonl", args.fresh)
    job = {"steps": args.steps, "router_steps": max(args.router_tokens // (ROWS * LENGTH), 1), "rows": args.rows, "rank": args.rank,
           "rate": args.rate, "router_rate": args.router_rate, "balance": args.balance, "entropy": args.entropy}  # fmt: skip
    runs = []
    for seed in args.seeds:
        runs.append(log.get({**job, "seed": seed}, run))
        print(
            f"  seed {seed}: {runs[-1]['seconds']:.0f} s of training, {runs[-1]['peak_rss_mb']} MB",
            file=sys.stderr,
            flush=True,
        )
    plot(runs, args.work / "reuse.png")
    if args.json:
        print(json.dumps({"heading": heading(), "runs": runs}))
    else:
        print(f"{heading()}\n\n{report(runs)}")


if __name__ == "__main__":
    main()
