"""What a run learnt, as files: the checkpoint again, or the adapter alone where the source is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.expert_adapter import ONE_FILE, STEM, ExpertAdapter, write_settings
from moeforge.checkpoint.writer import WrittenCheckpoint, write_checkpoint
from moeforge.model.build import build
from moeforge.model.weights import WeightMap
from moeforge.train.export import trained_adapter_ops, trained_ops
from moeforge.train.loop import Loop


def write(source: Checkpoint, loop: Loop, learnt: Mapping[str, torch.Tensor], directory: Path, on_bytes: Callable[[int], None],
          check: Callable[[], None]) -> WrittenCheckpoint:  # fmt: skip
    """Write the source again with what was learnt in place of what it held; of an adapter nothing but its own.

    No journal: a plan does not tell learnt weights from those of another attempt (another thread count), so a run that died while
    writing writes them all again, from the state that the loop left.
    """
    if isinstance(source, ExpertAdapter):
        write_settings(directory, source.settings_at(directory))
        ops = trained_adapter_ops(source, loop.model, learnt)
        return write_checkpoint(ops, directory, stem=STEM, max_shard_bytes=ONE_FILE, on_bytes=on_bytes, check=check)
    ops = trained_ops(source, WeightMap(source, build(source.config)), learnt)
    write_companions(source, directory, dict(source.config))
    return write_checkpoint(ops, directory, on_bytes=on_bytes, check=check)


def learnt_values(loop: Loop) -> Mapping[str, torch.Tensor]:
    """Parameter name -> whole value, for all that learnt, on the first rank; nothing on the others, which must ask as well. A tied
    parameter has several names, and the source may hold a tensor for each."""
    whole = {id(param): loop.ranks.gathered(master) for param, master in loop.masters.pairs.values()}
    found = {name: whole[id(param)] for name, param in loop.model.named_parameters(remove_duplicate=False)
             if id(param) in whole} | {name: loop.ranks.gathered(bias) for name, bias in loop.biases.items()}  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}
