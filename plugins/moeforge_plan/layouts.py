"""Layouts: two factorizations of the same ranks, one for attention and one for experts, and the groups that they make.

    W = TP * CP * DP * PP = ETP * EP * EDP * PP        DP and EDP follow, they are never chosen

(MoE Parallel Folding, arXiv 2504.14960, section 3.) A group of an axis is the set of ranks that differ in that axis alone. An
order names the axes, fastest first; the stride of an axis is the product of the sizes of those before it. Attention's grid has no
`ep`, that of the experts no `cp`, and `tp` means TP in one and ETP in the other, as in Megatron-Core's RankGenerator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from moeforge.train.layout import empty_shards

ORDER = "tp-cp-ep-dp-pp"
"""Megatron-Core's default. Transformers' meshes (pp, dp_replicate, fsdp, tp) and (pp, dp_replicate, efsdp, ep) are laid out the
same way, `dp` being dp_replicate x fsdp with fsdp the faster."""
AXES = ("tp", "cp", "ep", "dp", "pp")
Engine = Literal["transformers", "megatron"]
Sharding = Literal["optimizer", "parameters"]


@dataclass(frozen=True)
class Axis:
    """`size` ranks, `stride` apart."""

    size: int
    stride: int

    def inside(self, node: int) -> int:
        """How many of a group's ranks share one node of `node` ranks, where groups are cut as favourably as the stride allows."""
        return max(1, min(self.size, node // self.stride))


@dataclass(frozen=True)
class Layout:
    """One way of laying a model over `world` ranks.

    Args:
        sharding: what data parallelism cuts: the `optimizer`'s state (ZeRO-1, Megatron's distributed optimizer) or the
            `parameters` and all that belongs to them (FSDP).
        replicate: copies of the sharded parameters (HSDP, `dp_replicate_size`); 1 with `optimizer`.
    """

    engine: Engine
    world: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    replicate: int = 1
    sharding: Sharding = "optimizer"

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of attention's parameters."""
        return self.dp // self.replicate

    @property
    def efsdp(self) -> int:
        """Ranks that share one copy of an expert."""
        return self.edp // self.replicate

    @property
    def model_parallel(self) -> int:
        """Ranks that one copy of the model is cut over."""
        return self.pp * max(self.tp * self.cp, self.ep * self.etp)

    @property
    def folded(self) -> bool:
        """Whether the experts' axes reach over attention's TP or CP ranks, which ETP = TP and CP = 1 forbid."""
        return self.ep > 1 and (self.etp != self.tp or self.cp > 1)

    def dense_sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "cp": self.cp, "ep": 1, "dp": self.dp, "pp": self.pp}

    def expert_sizes(self) -> dict[str, int]:
        return {"tp": self.etp, "cp": 1, "ep": self.ep, "dp": self.edp, "pp": self.pp}

    def dense_axis(self, name: str) -> Axis:
        """An axis of attention under the default order; `dp+cp` is what attention's parameters are reduced over."""
        if name == "dp+cp":
            return Axis(self.dp * self.cp, self.tp)
        return axis(self.dense_sizes(), ORDER, name)

    def expert_axis(self, name: str) -> Axis:
        return axis(self.expert_sizes(), ORDER, name)


def axis(sizes: Mapping[str, int], order: str, name: str) -> Axis:
    """The axis `name` of a grid."""
    names = complete(sizes, order)
    return Axis(sizes[name], math.prod(sizes[other] for other in names[: names.index(name)]))


def complete(sizes: Mapping[str, int], order: str) -> list[str]:
    """The axes of `order`, fastest first, those of size 1 that it leaves out behind them.

    Raises:
        ValueError: an axis larger than 1 is not in the order, one is named twice or unknown, or EP and CP are both larger than 1.
    """
    names = order.split("-")
    if len(set(names)) != len(names) or set(names) - set(sizes):
        raise ValueError(f"order {order!r}: expected each of {', '.join(sizes)} at most once")
    if sizes.get("ep", 1) > 1 and sizes.get("cp", 1) > 1:
        raise ValueError("one grid cannot have both EP and CP: attention's has no EP, the experts' no CP")
    for name, size in sizes.items():
        if name not in names:
            if size > 1:
                raise ValueError(f"order {order!r} lacks {name}, whose size is {size}")
            names.append(name)
    return names


def groups(sizes: Mapping[str, int], order: str, name: str) -> list[tuple[int, ...]]:
    """Every group of the axis `name`: ranks in ascending order, groups by their first rank."""
    names = complete(sizes, order)
    strides = {other: axis(sizes, order, other).stride for other in names}
    rest = [range(sizes[other]) for other in names if other != name]
    fixed = [other for other in names if other != name]
    found = []
    for place in itertools.product(*rest):
        start = sum(strides[other] * at for other, at in zip(fixed, place, strict=True))
        found.append(tuple(start + strides[name] * at for at in range(sizes[name])))
    return sorted(found)


def faults(layout: Layout, order: str = ORDER) -> list[str]:
    """Why a layout cannot exist under an order of its axes; empty when it can."""
    found = []
    for title, product in (("TP*CP*PP", layout.tp * layout.cp * layout.pp),
                           ("ETP*EP*PP", layout.etp * layout.ep * layout.pp)):  # fmt: skip
        if layout.world % product:
            found.append(f"{title} = {product} does not divide {layout.world} GPUs")
    if layout.dp % layout.replicate or layout.edp % layout.replicate:
        found.append(f"{layout.replicate} replicas do not divide DP = {layout.dp} and EDP = {layout.edp}")
    if found:
        return found
    if layout.pp > 1 and not order.endswith("pp") and layout.edp != layout.dp:
        found.append(
            f"with PP = {layout.pp} the order must end in pp, or EDP = {layout.edp} must equal DP = {layout.dp}"
        )
    dense, expert = (groups(sizes, order, "pp") for sizes in (layout.dense_sizes(), layout.expert_sizes()))
    if dense != expert:
        found.append("attention and experts disagree on the pipeline groups; put pp last in the order")
    return found


def rules(layout: Layout, *, experts: int, heads: int, kv_heads: int, layers: int) -> list[str]:
    """Why an engine would refuse a layout for a model; empty when it would run it.

    transformers (5.24, distributed/configuration_utils.py and expert_parallel.py): EP is a multiple of TP and divides FSDP*TP, the
    experts divide by EP and fill every rank, no CP, no ETP beside EP (without EP the tensor-parallel plan cuts each expert), no PP beside FSDP or
    token dispatch. Megatron-Core: heads divide by TP, key-value heads or TP by the other, experts by EP.
    """
    found = []
    if heads % layout.tp or (kv_heads % layout.tp and layout.tp % kv_heads):
        found.append(f"TP = {layout.tp} does not divide {heads} heads and {kv_heads} key-value heads")
    if experts and experts % layout.ep:
        found.append(f"EP = {layout.ep} does not divide {experts} experts")
    if not experts and layout.ep > 1:
        found.append(f"EP = {layout.ep} without experts")
    if layout.pp > layers or (layers - 1) // math.ceil(layers / layout.pp) + 1 != layout.pp:
        found.append(f"PP = {layout.pp} leaves a stage of {layers} layers empty")
    if layout.engine == "transformers":
        if kv_heads % layout.tp:
            found.append(f"transformers: TP = {layout.tp} does not divide {kv_heads} key-value heads")
        if layout.ep > 1 and layout.ep % layout.tp:
            found.append(f"transformers: EP = {layout.ep} is not a multiple of TP = {layout.tp}")
        if layout.ep > 1 and layout.fsdp * layout.tp % layout.ep:
            found.append(f"transformers: EP = {layout.ep} does not divide FSDP*TP = {layout.fsdp * layout.tp}")
        if layout.cp > 1:
            found.append("transformers: no context parallelism")
        if experts and layout.etp != (1 if layout.ep > 1 else layout.tp):
            found.append("transformers: experts are cut by TP without EP, never beside it")
        if layout.pp > 1:
            found.append("transformers: no pipeline beside FSDP or token dispatch")
        whole = experts and experts % layout.ep == 0 and layout.efsdp
        if whole and empty_shards(experts // layout.ep, layout.efsdp):
            found.append(
                "transformers: FSDP would leave ranks without an expert, which it cannot load; a larger --dp-replicate avoids it"
            )
    return found


def divisors(number: int) -> list[int]:
    """In ascending order."""
    low = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return low + [number // i for i in reversed(low) if i * i != number]


def megatron(world: int, *, experts: int, node: int, cp: bool) -> Iterator[Layout]:
    """Every layout that Megatron could run and that is worth a thought: TP inside a node, ETP 1 or TP."""
    for tp, pp in itertools.product(divisors(node), divisors(world)):
        for c in divisors(world // (tp * pp)) if cp and world % (tp * pp) == 0 else [1]:
            if world % (tp * pp * c):
                continue
            for etp in sorted({1, tp}) if experts else [tp]:
                for ep in divisors(experts) if experts else [1]:
                    if world % (etp * ep * pp) == 0:
                        yield Layout("megatron", world, tp, c, pp, ep, etp)


def transformers(world: int, *, experts: int, node: int) -> Iterator[Layout]:
    """Every layout of transformers' `DistributedConfig`: TP inside a node, replicas of 1 or of whole nodes."""
    for tp in divisors(node):
        if world % tp:
            continue
        for replicate in divisors(world // tp):
            fsdp = world // tp // replicate
            for ep in divisors(experts) if experts else [1]:
                if fsdp * tp % ep == 0 and (ep == 1 or ep % tp == 0):
                    etp = 1 if ep > 1 else tp
                    yield Layout("transformers", world, tp, 1, 1, ep, etp, replicate, "parameters")
