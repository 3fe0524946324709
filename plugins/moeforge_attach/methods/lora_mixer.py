"""LoRA-Mixer: experts at the attention's linear maps (or a state-space mixer's), soft in training, top-3 after; trained together with
labels, or imported and frozen with only the router to train.

Whether q, k and v share a router the paper does not settle: they do with `--router-input shared`, and do not by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.options import opt

from ..design import ATTENTION, Content, Design, Maps
from ..imports import Named, droppable, frozen_experts, identities
from ..options import Options as StageOptions

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class Options:
    experts_from: tuple[str, ...] = opt(
        "a PEFT LoRA as a frozen expert: NAME=REF[*WEIGHT], repeated; REF is a directory or org/name[@revision]", default=(), reads=True,
        metavar="NAME=REF",
    )  # fmt: skip
    drop: tuple[str, ...] = opt(
        "leave out of an imported LoRA what no expert can hold: modules_to_save, bias, embeddings", default=()
    )

    def __post_init__(self) -> None:
        droppable(self.drop)


class LoRAMixer:
    name = "lora-mixer"
    summary = "6 LoRA experts at the attention's linear maps, all in training, 3 after; or imported LoRAs, frozen"
    reference = "LoRA-Mixer, arXiv:2507.00029"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        router = {"select": "topk", "top_k": 3, "train_select": "all"}
        return Design((*ATTENTION, "in"), experts="6", rank=64, alpha=128, router=router)

    def inputs(self, stage: StageOptions, options: Options) -> Sequence[str]:
        return identities([Named.parse(text).ref for text in options.experts_from], stage)

    def content(
        self, base: Checkpoint, maps: Maps, design: Design, stage: StageOptions, options: Options, refs: Sequence[str]
    ) -> Content | None:
        return frozen_experts(maps, design, stage, options)
