"""An adapter that another program trained, whole: MixLoRA, MoE-PEFT, MoLA or a plain PEFT LoRA, tensor for tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.options import opt

from ..design import Content, Design, Maps
from ..imports import droppable, identities, whole
from ..options import Options as StageOptions

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class Options:
    adapter: str = opt("the adapter: a directory or org/name[@revision]", reads=True, metavar="REF")
    drop: tuple[str, ...] = opt(
        "leave out of a plain LoRA what no expert can hold: modules_to_save, bias, embeddings", default=()
    )

    def __post_init__(self) -> None:
        droppable(self.drop)


class Import:
    name = "import"
    summary = "an adapter of MixLoRA, MoE-PEFT, MoLA or PEFT, with its own sites, experts and routers"
    reference = "MixLoRA arXiv:2404.15159, MoLA arXiv:2402.08562, LoRAMoE arXiv:2312.09979, LoRA arXiv:2106.09685"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        return Design(())  # the adapter says it all

    def inputs(self, stage: StageOptions, options: Options) -> Sequence[str]:
        return identities((options.adapter,), stage)

    def content(
        self, base: Checkpoint, maps: Maps, design: Design, stage: StageOptions, options: Options, refs: Sequence[str]
    ) -> Content:
        return whole(options.adapter, maps, base.config, stage, droppable(options.drop))
