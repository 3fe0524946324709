"""A campaign of damaged inputs through the real planning path: `python -m moeforge.testing.campaign --cases 12000 --cli 60`.

Every case copies a sound source, damages the copy (:mod:`moeforge.testing.mutations`) and plans an upcycle of it; an adapter of LoRA
experts, which is no source of one, is loaded. It must end in
a refusal in one line with exit code 3, or in an acceptance that is right: then every tensor can be read from below the
directory. Nothing may be written, nothing may hang, memory may not grow, and no byte from outside may come back. The same
seed gives the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import open_checkpoint
from ..errors import ExitCode, MoeforgeError
from ..pipeline.artifact import locate
from . import inprocess, mutations
from .command import run
from .models import save_tiny
from .mutations import HEADERS, SECRET, Mutation

SECONDS = 20
"""After which a case counts as hanging; a sound one takes about ten milliseconds."""
MEMORY = 300_000_000
"""Bytes by which the process may grow in one case: nothing in a sound source is larger than a few hundred kilobytes."""
TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Source:
    """A sound source, the mutations that suit it, the options with which it is planned, and what is done with it."""

    path: Path
    mutations: tuple[Mutation, ...]
    options: dict[str, Any] = field(default_factory=dict)
    use: Callable[[Path, dict[str, Any]], Any] = lambda copy, options: inprocess.plan(
        "upcycle", copy, "copy", experts=2, top_k=1, **options
    )


@dataclass
class Report:
    """(source, kind of damage) -> how its cases ended: `refused`, `accepted`, or `FAULT`; and the faults in words."""

    outcomes: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    by_command: int = 0
    seconds: float = 0.0

    def table(self) -> str:
        lines = [f"{'source':<10} {'damage':<26} {'cases':>6} {'refused':>8} {'accepted':>9} {'faults':>7}"]
        total: Counter[str] = Counter()
        for (source, kind), count in sorted(self.outcomes.items()):
            lines.append(_row(source, kind, count))
            total.update(count)
        lines += [
            _row("all", "", total),
            f"{self.by_command} of them through the command as well; {self.seconds:.0f} s",
        ]
        return "\n".join(lines + self.faults)


def _row(source: str, kind: str, count: Counter[str]) -> str:
    cells = (count.total(), count["refused"], count["accepted"], count["FAULT"])
    return f"{source:<10} {kind:<26} {cells[0]:>6} {cells[1]:>8} {cells[2]:>9} {cells[3]:>7}"


def run_campaign(
    cases: int, seed: int, where: Path, *, by_command: int = 0, on_case: Callable[[int], Any] = lambda n: None
) -> Report:
    """Run `cases` cases, `by_command` of them through the installed command too.

    Args:
        where: an empty directory of its own; sources and copies live there.
    """
    report, began = Report(), time.monotonic()
    sources = make_sources(where)
    for name, source in sources.items():
        ended, fault = _case(random.Random(0), source, _nothing, where / "case")
        if fault or ended != "accepted":
            raise AssertionError(f"the sound source {name} is not accepted: {fault or ended}")
    names = sorted(sources)
    every = cases // by_command if by_command else 0
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        mutation = rng.choice(sources[name].mutations)
        count = report.outcomes.setdefault((name, mutation.__name__), Counter())
        ended, fault = _case(rng, sources[name], mutation, where / "case")
        if not fault and every and number % every == 0:
            report.by_command += 1
            fault = _by_command(sources[name], mutation, where / "case", ended)
        count["FAULT" if fault else ended] += 1
        if fault:
            report.faults.append(f"seed {seed} case {number}, {name}, {mutation.__name__}: {fault}")
        on_case(number)
    report.seconds = time.monotonic() - began
    return report


def _nothing(rng: random.Random, directory: Path) -> None:
    """The control."""


def make_sources(where: Path) -> dict[str, Source]:
    """One sound source of every kind that is read."""
    common = (*HEADERS, mutations.config_changed, mutations.index_changed, mutations.link_out, mutations.fixed_damage)
    dense = save_tiny(where / "dense", "llama", **TINY)
    sharded = where / "sharded"
    inprocess.run("export", dense, sharded, to="hf", max_shard_size=20_000)
    adapter = (*HEADERS, mutations.adapter_config_changed, mutations.link_out)
    gguf = (mutations.gguf_bytes_changed, mutations.gguf_cut, mutations.gguf_number_huge, mutations.link_out)
    return {
        "single": Source(dense, (*common, mutations.weights_not_finite)),
        "shards": Source(sharded, (*common, mutations.manifest_changed)),
        "adapter": Source(_adapter(where / "adapter", dense), adapter),
        "experts": Source(_experts(where / "experts", dense), adapter, use=_load),
        "int8": Source(_int8(where / "int8", dense), common, {"dequantize": True}),
        "gguf": Source(_gguf(where / "gguf", dense), gguf),
    }


def _adapter(where: Path, base: Path) -> Path:
    from safetensors.numpy import save_file

    rng, width = np.random.default_rng(1), TINY["hidden_size"]
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    shapes = {"A": (2, width), "B": (TINY["intermediate_size"], 2)}
    where.mkdir()
    save_file({name.format(layer, key): rng.normal(size=shape).astype(np.float32) for layer in range(2) for key, shape in shapes.items()},
              where / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), "rank_pattern": {"down_proj": 3},
                "target_modules": ["up_proj"], "use_dora": False, "fan_in_fan_out": False}  # fmt: skip
    (where / "adapter_config.json").write_text(json.dumps(settings))
    return where


def _experts(where: Path, base: Path) -> Path:
    """LoRA experts of several kinds, sizes and routers."""
    from ..mixture.config import RouterConfig
    from .adapters import lora, lora_ffn, save_adapter

    cosine = RouterConfig(kind="cosine", null_experts=1)
    entries = [
        lora_ffn(3, (0, 1), targets=["gate", "down"]), lora("q", 2, (0,), cosine, scales=[1.0, 2.0], ranks=[3, 1]), lora("o", 1, (0, 1)),
        lora("k", 2, (1,), share_a=True),
    ]  # fmt: skip
    return save_adapter(where, base, entries)


def _load(copy: Path, options: dict[str, Any]) -> None:
    from ..model.load import load

    load(str(copy), **options)


def _int8(where: Path, dense: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    rng, weights = np.random.default_rng(2), load_file(dense / "model.safetensors")
    for name in [name for name in weights if "mlp" in name]:
        shape = weights[name].shape
        weights[name] = rng.integers(-127, 128, shape).astype(np.int8)
        weights[name.replace(".weight", ".SCB")] = rng.uniform(0.1, 0.2, shape[0]).astype(np.float32)
    where.mkdir()
    save_file(weights, where / "model.safetensors")
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (where / "config.json").write_text(json.dumps(config))
    return where


def _gguf(where: Path, dense: Path) -> Path:
    """A directory with one GGUF file, written by the gguf package."""
    from gguf import GGUFWriter, get_tensor_name_map
    from gguf.constants import MODEL_ARCH
    from safetensors.numpy import load_file

    config = json.loads((dense / "config.json").read_text())
    where.mkdir()
    writer = GGUFWriter(where / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in load_file(dense / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight",)) or name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return where


class _Hangs(BaseException):
    """The time of a case is over; no `except Exception` may hold it up."""


def _ring(*_: object) -> None:
    raise _Hangs


def _case(rng: random.Random, source: Source, mutation: Mutation, copy: Path) -> tuple[str, str]:
    """How a case ended, and what is wrong with that ('' when nothing is)."""
    for old in copy.parent.glob(copy.name + "*"):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    shutil.copytree(source.path, copy)
    mutation(rng, copy)
    before, peak = list(_listing(copy.parent)), _peak()
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        source.use(copy, source.options)
        ended, fault = "accepted", _read_all(copy, source.options)
        if mutation is mutations.weights_not_finite:
            words = {"experts": 2, "top_k": 1, "verify": rng.random() < 0.5, **source.options}
            inprocess.run("upcycle", copy, copy.parent / "case-out", "copy", **words)
            fault = fault or "weights that are not finite were taken"
    except MoeforgeError as error:
        ended, said = "refused", str(error)
        fault = "" if error.exit_code == ExitCode.BAD_INPUT else f"exit code {int(error.exit_code)}: {said[:300]}"
        if not said.isprintable() or len(said) > 5000:
            fault = f"not one printable line of bounded length: {said[:300]!r}"
    except _Hangs:
        ended, fault = "refused", f"hangs for {SECONDS} s"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the campaign looks for
        ended, fault = "refused", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (copy.parent / "case-out").exists():
        fault = fault or "an output was made"
    if _peak() - peak > MEMORY:
        fault = fault or f"memory grew by {(_peak() - peak) / 1e6:.0f} MB"
    if mutation is not mutations.weights_not_finite and list(_listing(copy.parent)) != before:
        fault = fault or "something was written"
    return ended, fault


def _read_all(copy: Path, options: dict[str, Any]) -> str:
    """What is wrong with an accepted source: a tensor that cannot be read, or bytes from outside."""
    with open_checkpoint(locate(str(copy)).ref, dequantize=options.get("dequantize", False)) as opened:
        for name, info in opened.tensors.items():
            values = opened.read(name)
            if values.shape != info.shape:
                return f"{name}: planned {info.shape}, read {values.shape}"
        leaked = [companion.name for companion in opened.companions() if SECRET in companion.read()]
        opened.provenance()
    return f"{leaked[0]} holds bytes from outside the directory" if leaked else ""


def _by_command(source: Source, mutation: Mutation, copy: Path, ended: str) -> str:
    """The same case through the command: a refusal is exit code 3, one line, nothing written.

    What only the weights' bytes tell is found while the output is written; then its unfinished `.partial` may stay.
    """
    out = copy.parent / "command-out"
    words = [f"--{name.replace('_', '-')}" for name in source.options]
    done = run("upcycle", copy, "--experts", 2, "--top-k", 1, "--no-verify", *words, "-o", out)
    begun = {"command-out.partial"} if mutation is mutations.weights_not_finite else set()
    left = [path.name for path in copy.parent.glob("command-out*") if path.name not in begun]
    for path in copy.parent.glob("command-out*"):
        shutil.rmtree(path)
    if ended == "accepted":
        return ""
    said = [line for line in done.err.splitlines() if "error:" in line]
    if done.code != ExitCode.BAD_INPUT or len(said) != 1 or "Traceback" in done.err or done.out.strip():
        return f"the command ended with {done.code}: {done.err[-500:]!r}"
    return f"the command left {left}" if left else ""


def _listing(where: Path) -> Iterator[tuple[str, int, int]]:
    for root, folders, files in os.walk(where):
        for name in sorted([*folders, *files]):
            stat = os.lstat(os.path.join(root, name))
            yield os.path.join(root, name), stat.st_size, stat.st_mtime_ns


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cli", type=int, default=60, help="cases that run through the command as well")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeforge-campaign-") as where:
        report = run_campaign(words.cases, words.seed, Path(where), by_command=words.cli)
    print(report.table())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
