"""The same run by transformers' Trainer, timed step by step: `python peer.py JOB.json OUT.json EXPERTS`.

The rows are moeforge's own (packed, with positions that restart at document borders), so that both do the same work;
everything else is stock: the model class, its loss, the optimizer, clipping, the loop.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from moeforge.train.data import find_pools
from moeforge.train.encoding import Encoder
from moeforge.train.packing import Packer


class InOrder(Trainer):
    """The rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def rows(job: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    encode = Encoder(AutoTokenizer.from_pretrained(job["model"]))
    packer = Packer(find_pools(job["data"]), encode, job["length"], job["seed"])
    count = job["steps"] * job["accumulate"] * job["rows"]
    # `shift_labels`: already shifted, so that the last slot of a row is predicted too
    return [{"input_ids": torch.from_numpy(row.tokens), "position_ids": torch.from_numpy(row.positions),
             "labels": torch.from_numpy(row.labels), "shift_labels": torch.from_numpy(row.labels)}
            for row in islice(packer.rows(), count)]  # fmt: skip


def main(job: dict[str, Any], experts: str) -> dict[str, Any]:
    short = job["precision"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16 if short else torch.float32)
    model.set_experts_implementation(experts)
    for name, param in model.named_parameters():
        param.requires_grad_(job["train"] == "all" or any(fnmatch.fnmatch(name, p) for p in job["train"].split(",")))
    data, clock = rows(job), Clock()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=job["rows"], gradient_accumulation_steps=job["accumulate"],
            max_steps=job["steps"], learning_rate=job["rate"], lr_scheduler_type="constant", weight_decay=0.1,
            adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", logging_steps=1,
            save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True, seed=job["seed"],
            dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        InOrder(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()  # pyright: ignore[reportArgumentType]
    step = job["rows"] * job["accumulate"]
    tokens = [int(sum((row["labels"] >= 0).sum() for row in data[i : i + step])) for i in range(0, len(data), step)]
    return {"losses": clock.losses, "tokens": tokens, "times": clock.times, "experts": experts,
            "attention": model.config._attn_implementation,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3])))
