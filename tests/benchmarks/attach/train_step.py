"""A whole training step of a model under MixLoRA's layer, beside plain LoRA and the ways that others run such experts.

    python tests/benchmarks/attach/train_step.py                                           # SmolLM2 shape, some minutes
    python tests/benchmarks/attach/train_step.py --shapes qwen3-0.6b --tokens 1024 --dtype bfloat16
    python tests/benchmarks/attach/train_step.py --shapes llama-8b --tokens 4096 --dtype bfloat16 --rounds 3

A step is forward, cross entropy, backward, clipping and AdamW on what learns. All rows have plain LoRA of rank r on attention's four maps;
on the FFN: ours as `attach mixlora` makes it and `tune` runs it, its balance loss and statistics included; PEFT's plain LoRA at rank r and at k r;
MixLoRA's loop; naive experts (see ffn.py). Weights are random, the vocabulary is cut to 8,192 in every row alike, and Llama-8B has one layer of
its 32. Times are medians over rounds in which all rows take turns in one process; added memory is that of a process of its own.
The floor is the frozen model's forward and backward to its inputs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import heading, settle_process
from ffn import ALPHA, SHAPES, E, K, Loop, R
from torch import nn

LAYERS = {"smollm2": 30, "qwen3-0.6b": 28, "llama-8b": 1}
HEADS = {"smollm2": (9, 3, 64), "qwen3-0.6b": (16, 8, 128), "llama-8b": (32, 8, 128)}
"""Query heads, key heads, width of a head."""
VOCABULARY = 8192
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
ROWS = ("ours", "peft r", "peft k r", "mixlora loop", "naive", "frozen alone")
BALANCE = 0.01


def save_base(where: Path, shape: str, dtype: torch.dtype, layers: int | None) -> Path:
    """A Llama of that shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, ffn = SHAPES[shape]
    heads, keys, head = HEADS[shape]
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers or LAYERS[shape],
                         num_attention_heads=heads, num_key_value_heads=keys, head_dim=head, max_position_embeddings=8192,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(where)
    return where


def scatter(model: nn.Module, learning: list[nn.Parameter]) -> None:
    """Deltas that say something: a matrix of zeros would let products of zeros be timed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learning:
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def make(row: str, base: Path, dtype: torch.dtype) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[nn.Parameter]]:
    """(tokens [B, T] -> the loss to go back from, what learns)."""
    from transformers import AutoModelForCausalLM

    if row == "ours":
        return _ours(base, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
    if row != "frozen alone":
        from peft import LoraConfig, get_peft_model

        rank = R * K if row == "peft k r" else R
        own = row.startswith("peft")
        maps = FFN if own else ()
        model = get_peft_model(model, LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules=[*ATTENTION, *maps],
            rank_pattern=dict.fromkeys(maps, rank), alpha_pattern=dict.fromkeys(maps, ALPHA * rank // R),
        ), autocast_adapter_dtype=False)  # fmt: skip
        if not own:
            for layer in model.base_model.model.model.layers:
                layer.mlp = Loop(layer.mlp, row == "naive")
    learning = [p for p in model.parameters() if p.requires_grad]
    scatter(model, learning)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs = model.get_input_embeddings()(tokens).detach()
        # without anything that learns, the way back to the inputs is the floor
        logits = model(inputs_embeds=inputs.requires_grad_(row == "frozen alone"), use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    model.train()
    return loss, learning


def _ours(base: Path, dtype: torch.dtype) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[nn.Parameter]]:
    from moeforge.mixture.losses import Weights, layer_losses
    from moeforge.model.load import load
    from moeforge.testing import inprocess
    from moeforge.train.routing import find_sites, watch

    with tempfile.TemporaryDirectory() as directory:
        path = inprocess.run("attach", base, Path(directory) / "adapter", "mixlora", verify=False, rank=R, alpha=float(ALPHA),
                             experts=str(E), top_k=K).path  # fmt: skip
        model: Any = load(str(path), dtype=dtype)
    learning = [p for p in model.parameters() if p.requires_grad]
    scatter(model, learning)
    sites, weights = find_sites(model), Weights(balance=BALANCE)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with watch(sites, torch.ones_like(tokens, dtype=torch.bool)) as seen:
            logits = model(input_ids=tokens, use_cache=False).logits
        terms = layer_losses(seen)
        task = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return task + terms.layers * weights.total(terms)

    model.train()
    return loss, learning


class Step:
    """One update after another on the same random tokens."""

    def __init__(self, row: str, base: Path, dtype: torch.dtype) -> None:
        self.loss, self.learning = make(row, base, dtype)
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=True) if self.learning else None

    def __call__(self, tokens: torch.Tensor) -> float:
        started = time.perf_counter()
        loss = self.loss(tokens)
        loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        took = time.perf_counter() - started
        assert torch.isfinite(loss)
        return took


def tokens_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def peak(row: str, base: Path, dtype: torch.dtype, rows: int, length: int) -> int:
    """Bytes that one step adds to a process that has made a short one."""
    step = Step(row, base, dtype)
    step(tokens_of(1, 8))
    tokens = tokens_of(rows, length)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    step(tokens)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 - before


def compare(shape: str, dtype: str, rows: int, length: int, args: argparse.Namespace) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as directory:
        base = save_base(Path(directory) / "base", shape, kind, args.layers)
        steps = {row: Step(row, base, kind) for row in args.only}
        tokens = tokens_of(rows, length)
        times: dict[str, list[float]] = {row: [] for row in steps}
        for number in range(args.rounds + 1):
            for row, step in steps.items():
                took = step(tokens)
                if number:  # the first warms up
                    times[row].append(took)
        learn = {row: sum(p.numel() for p in step.learning) for row, step in steps.items()}
        del steps
        peaks = {}
        if not args.no_memory:
            words = [sys.executable, __file__, "--peak", str(base), dtype, str(rows), str(length)]
            peaks = {row: int(subprocess.run([*words, row], capture_output=True, text=True, check=True).stdout.split()[-1])
                     for row in args.only}  # fmt: skip
    medians = {row: statistics.median(values) for row, values in times.items()}
    return {"shape": shape, "dtype": dtype, "batch": [rows, length], "layers": args.layers or LAYERS[shape], "seconds": medians,
            "spread": {row: [min(values), max(values)] for row, values in times.items()}, "learn": learn, "added_bytes": peaks}  # fmt: skip


def told(found: dict[str, Any]) -> str:
    rows, length = found["batch"]
    ours = found["seconds"].get("ours")
    head = f"{found['shape']}, {found['layers']} layers, {rows} x {length} tokens, {found['dtype']}"
    lines = [
        head,
        "",
        "| row | learn | s a step (range) | tokens/s | ours over it | added MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, seconds in found["seconds"].items():
        low, high = found["spread"][row]
        added = found["added_bytes"].get(row)
        lines.append(f"| {row} | {found['learn'][row]:,} | {seconds:.3f} ({low:.3f} to {high:.3f}) | {rows * length / seconds:,.0f} | "
                     f"{'' if ours is None else f'{ours / seconds:.2f}x'} | {'' if added is None else f'{added / 1e6:,.0f}'} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2", help=", ".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settle_process()
    if args.peak:
        base, dtype, rows, length, row = args.peak
        print(peak(row, Path(base), getattr(torch, dtype), int(rows), int(length)))
        return
    found = [compare(shape, args.dtype, args.batch, args.tokens, args) for shape in args.shapes.split(",")]
    print(
        json.dumps({"heading": heading(), "found": found}) if args.json else "\n\n".join([heading(), *map(told, found)])
    )


if __name__ == "__main__":
    main()
