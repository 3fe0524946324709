"""How many ranks share a model, and which part of it each holds. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageProblem

ELSEWHERE = "without --tp, --fsdp and --ep every rank holds the whole model, which any model can do"


@dataclass(frozen=True)
class Layout:
    """Two factorisations of the same ranks (MoE Parallel Folding, arXiv:2504.14960): replicate x fsdp x tp for what is dense, and
    replicate x (fsdp * tp / ep) x ep for the experts.

    Attributes:
        tp: ranks that cut every matrix among them and see the same rows.
        fsdp: ranks among which parameters, gradients and moments lie in shards.
        ep: ranks that own different experts.
        replicate: copies of all that.
    """

    tp: int = 1
    fsdp: int = 1
    ep: int = 1
    replicate: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.fsdp * self.replicate

    @property
    def data(self) -> int:
        """Ranks that see different rows; experts have no part in it."""
        return self.fsdp * self.replicate

    @property
    def sharded(self) -> bool:
        """Whether a rank holds less than the model; else every one holds a copy, which any model can do."""
        return self.shards > 1

    @property
    def shards(self) -> int:
        """Parts that parameters are cut into: the same for what is dense and for experts."""
        return self.tp * self.fsdp

    def __str__(self) -> str:
        return f"--tp {self.tp} --fsdp {self.fsdp} --ep {self.ep} --dp-replicate {self.replicate}"


def arrange(tp: int, fsdp: int, ep: int, replicate: int | None, world: int | None) -> Layout:
    """The layout of `world` ranks; None: of as many as the numbers ask for.

    Args:
        replicate: None takes what the ranks leave.

    Raises:
        UsageProblem: the numbers do not multiply to the ranks that there are, or contradict each other.
    """
    shards = tp * fsdp
    if world is not None and (world % shards or replicate not in (None, world // shards)):
        asked = f"--tp {tp} --fsdp {fsdp}" + ("" if replicate is None else f" --dp-replicate {replicate}")
        needed = f"{shards} or a multiple of it" if replicate is None else str(shards * replicate)
        raise UsageProblem(f"{asked} needs {needed} processes, and there {_are(world)}: torchrun --nproc-per-node N $(which moeforge) "
                           "tune ... starts N on one machine")  # fmt: skip
    if replicate is None:
        replicate = 1 if world is None else world // shards
    if ep > 1 and ep % tp:
        raise UsageProblem(f"--ep {ep} --tp {tp}: the ranks that own different experts must be whole tp groups; "
                           f"--ep must be a multiple of {tp}")  # fmt: skip
    if ep > 1 and shards % ep:
        raise UsageProblem(
            f"--ep {ep}: must divide fsdp * tp = {shards}, the ranks of one copy of the model; raise --fsdp"
        )
    return Layout(tp, fsdp, ep, replicate)


def check_model(layout: Layout, config: Mapping[str, Any], experts: int | None, ref: str) -> None:
    """Refuse what the model's numbers do not allow.

    Args:
        config: of the model, or of the dense one that mixtures were put into.
        experts: E; None for a dense model.

    Raises:
        UsageProblem: names the key and both numbers.
    """
    if layout.ep > 1 and experts is None:
        raise UsageProblem(f"--ep {layout.ep}: {ref} has no experts that could be shared out; use --fsdp")
    if experts is not None and experts % layout.ep:
        raise UsageProblem(f"--ep {layout.ep}: {ref} has {experts} experts, which {layout.ep} ranks cannot share evenly; "
                           f"use a divisor of {experts}")  # fmt: skip
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = config.get(key)
        if isinstance(heads, int) and heads % layout.tp:
            raise UsageProblem(f"--tp {layout.tp}: {ref} has {key} = {heads}, which {layout.tp} ranks cannot share evenly; "
                               "use a divisor, or --fsdp")  # fmt: skip
    # ranks that own the same experts cut them between two experts, and the engine does not load a part without any
    owned, holders = (experts or 0) // layout.ep, layout.shards // layout.ep if layout.ep > 1 else layout.fsdp
    if experts is not None and empty_shards(owned, holders):
        raise UsageProblem(f"{layout}: {ref} has {experts} experts, so that of {holders} ranks which hold {owned} of them together one would "
                           "hold none; lower --fsdp, and the ranks that are left hold copies")  # fmt: skip


def empty_shards(rows: int, ranks: int) -> int:
    """Ranks that FSDP2 leaves without a row: it hands out pieces of ceil(rows / ranks), one a rank, until there are none.

    Stacks of experts are cut along the axis that counts them. transformers stacks what a rank reads, and 5.24 fails where that is
    nothing ("stack expects a non-empty TensorList").
    """
    return ranks - math.ceil(rows / math.ceil(rows / ranks))


def _are(world: int) -> str:
    return "is one" if world == 1 else f"are {world}"
