"""Any sites, any router: the options spelled out, with the neighbours' as well (LoRAMoE, HydraLoRA, AdaMoLE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.errors import UsageProblem
from moeforge.options import opt

from ..design import LINEAR, Content, Design, Maps
from ..imports import Named, droppable, frozen_experts, identities
from ..options import Options as StageOptions

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class Options:
    sites: str = opt(
        "where experts stand: ffn, or linear maps: q k v qkv o gate up gate_up down in; comma-separated",
        default="ffn",
    )
    plain: str = opt("where one LoRA without a router stands; comma-separated", default="")
    share_a: bool = opt("one A for all experts of a linear map (HydraLoRA, arXiv:2404.19245)", default=False)
    experts_from: tuple[str, ...] = opt(
        "a PEFT LoRA as a frozen expert: NAME=REF[*WEIGHT], repeated; REF is a directory or org/name[@revision]", default=(), reads=True,
        metavar="NAME=REF",
    )  # fmt: skip
    drop: tuple[str, ...] = opt(
        "leave out of an imported LoRA what no expert can hold: modules_to_save, bias, embeddings", default=()
    )

    def __post_init__(self) -> None:
        droppable(self.drop)
        for name, value, known in (("sites", self.sites, ("ffn", *LINEAR)), ("plain", self.plain, LINEAR)):
            for site in _split(value):
                if site not in known:
                    raise UsageProblem(f"--{name} {value}: {site!r} is no site; there are {', '.join(known)}")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Custom:
    name = "custom"
    summary = "LoRA experts at the sites and with the router that the options say"
    reference = "LoRAMoE arXiv:2312.09979, HydraLoRA arXiv:2404.19245, AdaMoLE arXiv:2405.00361"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        sites = _split(options.sites)
        if options.share_a and "ffn" in sites:
            raise UsageProblem("--share-a is for experts at linear maps, not for --sites ffn")
        return Design(
            sites,
            _split(options.plain),
            experts="8",
            rank=8,
            alpha=16,
            router={"select": "topk", "top_k": 2},
            share_a=options.share_a,
        )

    def inputs(self, stage: StageOptions, options: Options) -> Sequence[str]:
        return identities([Named.parse(text).ref for text in options.experts_from], stage)

    def content(
        self, base: Checkpoint, maps: Maps, design: Design, stage: StageOptions, options: Options, refs: Sequence[str]
    ) -> Content | None:
        return frozen_experts(maps, design, stage, options)
