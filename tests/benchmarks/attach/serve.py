"""Decoding with many adapters in one batch, beside each adapter's requests one after the other and beside PEFT's mixed batches.

    python tests/benchmarks/attach/serve.py                          # some minutes on two cores
    python tests/benchmarks/attach/serve.py --new 4 --rounds 1       # a smoke test

SmolLM2-135M in float32, adapters with random weights. Every way to run a batch must give the same tokens before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import heading, settle_process
from safetensors.torch import load_file, save_file

from moeforge.checkpoint import open_checkpoint
from moeforge.model.joining import join, labels_of
from moeforge.model.load import load
from moeforge.testing import inprocess
from moeforge.testing.real import smollm2_gguf

PROMPT = 32
"""Tokens that each request begins with."""
MAPS = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = {"method": "custom", "sites": ",".join(MAPS), "experts": "1", "rank": 16, "alpha": 32.0}
KINDS = {"plain LoRA": PLAIN, "MixLoRA, 8 experts": {"method": "mixlora", "rank": 16}}
WEIGHTS = "adapter_model.safetensors"


def make(base: Path, where: Path, seed: int, method: str, **options: Any) -> Path:
    """An adapter that says something of its own."""
    path = inprocess.run("attach", base, where, method, verify=False, **options).path
    values, random = load_file(path / WEIGHTS), torch.Generator().manual_seed(seed)
    for name, value in values.items():
        if "lora_B" in name:
            value += 0.02 * torch.randn(value.shape, generator=random)
    save_file(values, path / WEIGHTS)
    return path


class Timed:
    """Greedy decoding of a fixed number of tokens."""

    def __init__(self, ids: torch.Tensor, new: int) -> None:
        self.ids, self.new = ids, new

    def tokens(self, model: Any, rows: slice = slice(None), **given: Any) -> torch.Tensor:
        ids = self.ids[rows]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new, min_new_tokens=self.new,
                             do_sample=False, pad_token_id=0, **given)  # fmt: skip
        return out[:, PROMPT:]


def ours(base: Path, refs: Sequence[Path]) -> Any:
    """One model of all adapters."""
    return join(open_checkpoint(str(base)), {ref.name: open_checkpoint(str(ref)) for ref in refs}, dtype="float32")


def pefts(base: Path, refs: Sequence[Path]) -> Any:
    """The same plain LoRAs as PEFT holds them."""
    import peft

    config = peft.LoraConfig(
        r=PLAIN["rank"], lora_alpha=PLAIN["alpha"], target_modules=[f"{name}_proj" for name in MAPS]
    )
    model = peft.get_peft_model(load(str(base), dtype="float32"), config, adapter_name=refs[0].name)
    for ref in refs[1:]:
        model.add_adapter(ref.name, config)
    for ref in refs:
        peft.set_peft_model_state_dict(model, load_file(ref / WEIGHTS), adapter_name=ref.name)
    return model.eval()


def ways(kind: str, base: Path, refs: Sequence[Path], work: Timed) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> what makes all rows' tokens: rows go round the adapters, in blocks."""
    rows, block = len(work.ids), len(work.ids) // len(refs)
    names = [refs[row // block].name for row in range(rows)]
    joined = ours(base, refs)
    apart = [load(str(ref), dtype="float32") for ref in refs]
    found = {
        "joined": lambda: work.tokens(joined, mixture_labels=labels_of(joined, names)),
        "one after the other": lambda: torch.cat(
            [work.tokens(m, slice(i * block, (i + 1) * block)) for i, m in enumerate(apart)]
        ),
    }
    if kind == "plain LoRA":
        peer = pefts(base, refs)
        found["PEFT adapter_names"] = lambda: work.tokens(peer, adapter_names=names)
    return found


def measure(kind: str, base: Path, refs: Sequence[Path], work: Timed, rounds: int) -> dict[str, Any]:
    """Tokens a second of each way, medians over rounds in which they take turns."""
    plain = load(str(base), dtype="float32")
    run = {"base alone": lambda: work.tokens(plain)} | ways(kind, base, refs, work)
    seen = {name: way() for name, way in run.items()}  # also warms up
    for name, tokens in seen.items():
        if name != "base alone" and not torch.equal(tokens, seen["joined"]):
            raise SystemExit(f"{kind}, {len(refs)} adapters: {name} gives other tokens than joined")
    if torch.equal(seen["base alone"], seen["joined"]):
        raise SystemExit(f"{kind}: the adapters change nothing, so agreement says nothing")
    speeds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, way in run.items():
            began = time.perf_counter()
            way()
            speeds[name].append(len(work.ids) * work.new / (time.perf_counter() - began))
    return {"kind": kind, "batch": len(work.ids), "adapters": len(refs)} | {
        n: statistics.median(s) for n, s in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=24, help="tokens that each row decodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settle_process()
    found = []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        base = inprocess.run("export", smollm2_gguf(), Path(scratch) / "base", to="hf").path
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 40_000, (8, PROMPT), generator=random)
        for index, (kind, how) in enumerate(KINDS.items()):
            refs = [make(base, Path(scratch) / f"a{index}{n}", n, **how) for n in range(4)]
            for batch, adapters in ((1, 1), (8, 1), (8, 4)):
                found.append(measure(kind, base, refs[:adapters], Timed(ids[:batch], options.new), options.rounds))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found))
        return
    columns = ("base alone", "joined", "one after the other", "PEFT adapter_names")
    print(heading())
    print(f"decode tokens/s, {PROMPT} + {options.new} tokens a row, medians of {options.rounds}\n")
    print("| adapters | batch x adapters | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 2))
    for row in found:
        cells = [f"{row[name]:.1f}" if name in row else "" for name in columns]
        print(f"| {row['kind']} | {row['batch']} x {row['adapters']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
