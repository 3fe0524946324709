"""How the ranks of this run share the model. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

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
    if isinstance(source, ExpertAdapter):
        raise UsageProblem(
            f"{layout}: {source.ref} is an adapter of LoRA experts, which transformers' engine does not load in parts; {ELSEWHERE}"
        )
    if not isinstance(source, DirectoryCheckpoint | HubCheckpoint | PlannedCheckpoint):
        raise UsageProblem(f"{layout}: {source.ref} is no directory of safetensors ({type(source).__name__}), and only of such ones a rank "
                           f"reads its part; {ELSEWHERE}")  # fmt: skip
    if config.get("model_type") == "moeforge" and (layout.tp > 1 or layout.ep > 1):
        raise UsageProblem(f"{layout}: {source.ref} is a mixture of type moeforge, for which transformers has no plan of tensors or experts; "
                           f"--fsdp works; {ELSEWHERE}")  # fmt: skip
    if options.optimizer == "adamw-8bit":
        raise UsageProblem(f"--optimizer adamw-8bit: cannot hold the moments of parameters in shards ({layout}); use --optimizer adamw, or "
                           "leave out --tp, --fsdp and --ep")  # fmt: skip
    check_model(layout, plain_config(config), fewest_experts(config), source.ref)
    return layout


def fewest_experts(config: Mapping[str, Any]) -> int | None:
    """E of the mixture with the fewest experts; None for a dense model."""
    plain = plain_config(config)
    native = [plain[key] for key in EXPERT_COUNTS if isinstance(plain.get(key), int) and plain[key] > 1]
    ours = [entry["experts"]["count"] for entry in config.get("mixtures", ())]
    return min(native + ours, default=None)


def version(name: str) -> tuple[int, ...]:
    """Major and minor number of an installed package."""
    return tuple(int(part) for part in metadata.version(name).split(".")[:2])
