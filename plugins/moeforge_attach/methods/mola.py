"""MoLA: a router and experts of its own at every linear map, more of them in some layers than in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..design import LINEAR, Design


@dataclass(frozen=True)
class Options:
    """None of its own."""


class MoLA:
    name = "mola"
    summary = "LoRA experts at every linear map, 2 to 8 of them by depth, 2 active"
    reference = "MoLA, arXiv:2402.08562"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        return Design(LINEAR, experts="2468", rank=8, alpha=16, router={"select": "topk", "top_k": 2})
