"""MixLoRA: experts inside the FFN, mixed after its activation, one router a layer; plain LoRA on attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.options import opt

from ..design import ATTENTION, Design


@dataclass(frozen=True)
class Options:
    attention: bool = opt("plain LoRA on the attention's linear maps, too", default=True)


class MixLoRA:
    name = "mixlora"
    summary = "8 LoRA experts in every FFN, 2 active, plain LoRA on attention"
    reference = "MixLoRA, arXiv:2404.15159"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        router = {"select": "topk", "top_k": 2, "renormalise": stage.select != "topp"}
        return Design(("ffn",), ATTENTION if options.attention else (), experts="8", rank=16, alpha=32, router=router)
