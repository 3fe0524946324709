"""How the ranks of this run share the model. No torch."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from moeforge.checkpoint.anatomy import plain_config
from moeforge.checkpoint.architectures import EXPERT_COUNTS
from moeforge.checkpoint.directory import DirectoryCheckpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.hub import HubCheckpoint
from moeforge.checkpoint.planned import PlannedCheckpoint
from moeforge.errors import MachineLacks, UsageProblem
from moeforge.pipeline.ranks import here
from moeforge.train.layout import ELSEWHERE, Layout, arrange, check_model

from .options import Options

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint

ENGINE = (5, 23)
"""The first transformers whose `DistributedConfig` has experts on ranks of their own."""


def lay_out(source: Checkpoint, options: Options) -> Layout:
    """How the ranks that there are share the model.

    Raises:
        UsageProblem: the numbers contradict each other, the model, or another option.
        MachineLacks: transformers is too old.
    """
    rank = here()
    layout = arrange(options.tp, options.fsdp, options.ep, options.dp_replicate, rank.world if rank.launched else None)
    if not layout.sharded:
        return layout
    if version("transformers") < ENGINE:
        raise MachineLacks(f"{layout}: needs transformers {'.'.join(map(str, ENGINE))} or newer, {metadata.version('transformers')} is "
                           f"installed: upgrade it; {ELSEWHERE}")  # fmt: skip
    config = source.config
    kind = "an adapter of LoRA experts" if isinstance(source, ExpertAdapter) else None
    if config.get("model_type") == "moeforge":
        kind = kind or "a mixture of type moeforge"
    if kind is None and not isinstance(source, DirectoryCheckpoint | HubCheckpoint | PlannedCheckpoint):
        kind = f"no directory of safetensors ({type(source).__name__})"
    if kind is not None:
        raise UsageProblem(
            f"{layout}: {source.ref} is {kind}, which transformers' engine does not load in parts; {ELSEWHERE}"
        )
    if options.optimizer == "adamw-8bit":
        raise UsageProblem(f"--optimizer adamw-8bit: cannot hold the moments of parameters in shards ({layout}); use --optimizer adamw, or "
                           "leave out --tp, --fsdp and --ep")  # fmt: skip
    plain = plain_config(config)
    experts = next((plain[key] for key in EXPERT_COUNTS if isinstance(plain.get(key), int) and plain[key] > 1), None)
    check_model(layout, plain, experts, source.ref)
    return layout


def version(name: str) -> tuple[int, ...]:
    """Major and minor number of an installed package."""
    return tuple(int(part) for part in metadata.version(name).split(".")[:2])
