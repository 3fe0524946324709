"""An adapter of LoRA experts as the dense checkpoint that it is where its weights are the same for every token: computed while it is read.

    W' = W + sum_e w_e s_e B_e A_e                                  in float32, rounded once
    W' = (1 - sum_e w_e) W + sum_e w_e W_e                          with magnitudes (DoRA, arXiv:2402.09353), where
    W_e = diag(m_e / ||W + s_e B_e A_e||_row) (W + s_e B_e A_e)

The experts of a whole feed-forward network are mixed behind its activation: of those, one with weight 1 is dense and a sum of several is
not. Weights do not depend on the token of plain LoRA, of a single expert, of a router that looks at nothing (`static`), and of a route
that is forced.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint.adapter_layout import deciders, maps_of, root_of, router_of, stored_at
from ..checkpoint.base import Checkpoint
from ..checkpoint.digest import PREFIX
from ..checkpoint.expert_adapter import ExpertAdapter, plain_tensors
from ..checkpoint.expert_names import ROUTER
from ..checkpoint.linear_maps import linear_maps
from ..checkpoint.lora_formats.places import places
from ..checkpoint.low_rank import BLOCK, product_rows, whole_blocks
from ..checkpoint.quantized import coded_by
from ..checkpoint.tensor import NUMPY_DTYPES, Companion, Extent, TensorInfo
from ..errors import BadInput
from ..mixture.config import MixtureConfig
from ..mixture.low_rank import LowRank


@dataclass(frozen=True)
class Delta:
    """What one expert changes in one matrix.

    Attributes:
        entry: the number of its mixture. layer, expert: where it stands there.
        a, b, magnitude: names of its tensors; no magnitude without DoRA.
        scale: s.
    """

    entry: int
    layer: int
    expert: int
    a: str
    b: str
    magnitude: str | None
    scale: float


def entries_of(adapter: ExpertAdapter) -> list[MixtureConfig]:
    """Its mixtures.

    Raises:
        BadInput: one has no meaning.
    """
    return [MixtureConfig.from_json(raw) for raw in adapter.entries]


def deltas_of(adapter: ExpertAdapter) -> dict[str, list[Delta]]:
    """Name of a matrix of the base -> what the experts change in it, by expert; those that change nothing are left out.

    Raises:
        BadInput: two mixtures change one matrix.
    """
    maps = linear_maps(adapter.base.config, plain_tensors(adapter.base), adapter.base.ref)
    found: dict[str, list[Delta]] = {}
    for number, entry in enumerate(entries_of(adapter)):
        config = entry.experts
        scales = LowRank.read(config).scale_of(config.count)
        leaves: dict[tuple[int, str], dict[tuple[int | None, str], str]] = defaultdict(dict)
        for place in places([adapter.entries[number]], maps, adapter.ref):
            if place.leaf.startswith("lora_"):
                expert = 0 if config.count == 1 else place.expert
                leaves[place.layer, place.module][expert, place.leaf] = place.name
        for (layer, module), names in leaves.items():
            matrix = f"{module}.weight"
            if matrix in found:
                raise BadInput(f"{adapter.ref}: mixtures: two of them change {matrix}; only one of them can be merged")
            found[matrix] = []
            for e in range(config.count):
                a, b = names.get((e, "lora_A.weight")) or names[None, "lora_A.weight"], names[e, "lora_B.weight"]
                magnitude = names.get((e, "lora_magnitude_vector"))
                if scales[e] or magnitude:
                    found[matrix].append(Delta(number, layer, e, a, b, magnitude, scales[e]))
    return found


def expert_number(adapter: ExpertAdapter, asked: str) -> int:
    """The expert of that number, or of that name where it was imported under one.

    Raises:
        BadInput: there is none.
    """
    names = [row.get("name") for row in adapter.settings.get("experts") or ()]
    if asked in names:
        return names.index(asked)
    most = max(entry.experts.count for entry in entries_of(adapter))
    if asked.isdecimal() and int(asked) < most:
        return int(asked)
    known = f" or a name ({', '.join(map(str, names))})" if names else ""
    raise BadInput(f"{adapter.ref}: no expert {asked!r}: give a number from 0 to {most - 1}{known}")


def forced(adapter: ExpertAdapter, expert: int) -> dict[int, int]:
    """Number of an entry -> the expert that every token visits there, wherever a router has more than one to choose from.

    Raises:
        BadInput: a site has fewer experts.
    """
    found = {}
    for number, entry in enumerate(entries_of(adapter)):
        if entry.experts.count == 1 and entry.router.null_experts == 0:
            continue
        if expert >= entry.experts.count:
            raise BadInput(f"{adapter.ref}: no expert {expert} at site {entry.site!r} of layers {list(entry.layers)}: experts.count = "
                           f"{entry.experts.count}; merge one that every layer has")  # fmt: skip
        found[number] = expert
    return found


def constant(entry: MixtureConfig) -> bool:
    """Whether the weights of the experts are the same for every token, whatever the router has learnt."""
    router = entry.router
    if router.kind == "always":
        return True
    if (
        router.capacity_factor is not None
        or router.by_label
        or router.select not in ("topk", "topp", "all", "threshold")
    ):
        return False  # the weights depend on other tokens, or on labels
    if router.kind in ("static", "random"):
        return True
    sure = router.score != "sigmoid" or router.renormalise or router.gate_scale != "prob"
    return entry.experts.count == 1 and router.null_experts == 0 and router.select != "threshold" and sure


class MergedExperts(Checkpoint):
    """See the module.

    Args:
        adapter: closed with this one.
        routes: number of an entry -> the expert that every token visits there with weight 1 (see :func:`forced`).
        dtype: what the matrices that change are rounded to; None: the base's.

    Raises:
        BadInput: the weights of a site depend on the token, experts of a network are mixed, or the base's weights are codes.
    """

    def __init__(
        self, adapter: ExpertAdapter, routes: Mapping[int, int] | None = None, dtype: str | None = None
    ) -> None:
        self.adapter, self._routes = adapter, dict(routes or {})
        self.ref, self.root = adapter.ref, adapter.root
        self.config: dict[str, Any] = dict(adapter.base.config)
        self.tensors: Mapping[str, TensorInfo] = adapter.base.tensors
        coded = coded_by(self.config)
        if coded is not None:
            raise BadInput(f"{self.ref}: the weights of the base {adapter.base.ref} are codes ({coded}), to which nothing can be added; "
                           "pass --dequantize")  # fmt: skip
        self._entries = entries_of(adapter)
        self._weights: dict[tuple[int, int], Sequence[float]] = {}
        for number, entry in enumerate(self._entries):
            self._require_dense(number, entry)
        self._maps = linear_maps(self.config, self.tensors, adapter.base.ref)
        self._turned = {f"{one.path}.weight" for one in self._maps.values() if one.transposed}
        self._deltas = {name: kept for name, deltas in deltas_of(adapter).items() if (kept := self._kept(deltas))}
        changed = {n: replace(self.tensors[n], dtype=dtype or self.tensors[n].dtype) for n in self._deltas}
        self.tensors = {**self.tensors, **changed}
        for name in self._deltas.keys() & self._turned:
            if any(delta.magnitude for delta in self._deltas[name]):
                raise BadInput(
                    f"{self.ref}: options.dora: magnitudes on {name}, stored input by output, are not merged"
                )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the matrices that differ from the base's."""
        return frozenset(self._deltas)

    def _require_dense(self, number: int, entry: MixtureConfig) -> None:
        router, count = entry.router, entry.experts.count
        where = f"{self.ref}: site {entry.site!r} of layers {list(entry.layers)}"
        if entry.keep or entry.shared is not None:
            raise BadInput(
                f"{where}: keep = {entry.keep}, shared = {entry.shared is not None}: what stands beside the experts is not merged"
            )
        if number not in self._routes and not constant(entry):
            raise BadInput(f"{where}: {count} experts under a router of kind {router.kind!r}, select = {router.select!r}: their weights "
                           "depend on the token, and no dense matrix is that; --expert merges one of them, and `moeforge upcycle "
                           "--method lora` makes whole FFNs of those of ffn")  # fmt: skip
        if entry.experts.type == "lora" or number in self._routes or router.kind == "always":
            return
        if count > 1 or router.factor != 1:
            raise BadInput(f"{where}: a weighted sum of networks ({count} experts, factor = {router.factor:g}) is mixed behind the activation, and "
                           "no dense network is that; --expert merges one of them")  # fmt: skip

    def _kept(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Those that take part."""
        return [d for d in deltas if self._routes.get(d.entry, d.expert) == d.expert]

    def _weight(self, delta: Delta) -> float:
        if delta.entry in self._routes or self._entries[delta.entry].router.kind == "always":
            return 1.0
        key = delta.entry, delta.layer
        if key not in self._weights:
            self._weights[key] = self._routed(*key)
        return self._weights[key][delta.expert]

    def _routed(self, number: int, layer: int) -> Sequence[float]:
        """What the router says of any token."""
        import torch

        from ..mixture.router import Router
        from .weights import to_torch

        entry = self._entries[number]
        keeper = deciders(self.adapter.entries, self.ref).get((entry.site, layer))
        raw = stored_at(self.adapter.entries[number], keeper)
        here = maps_of(raw, layer, self._maps, self.ref)
        router = Router(entry.router, next(iter(here.values())).inputs, entry.experts.count).eval()
        prefix = f"{root_of(here)}.{ROUTER}."
        state = dict(router.named_parameters()) | dict(router.named_buffers())
        with torch.no_grad():
            for name, _ in router_of(raw, layer, self._maps, self.ref):
                state[name.removeprefix(prefix)].copy_(to_torch(self.adapter.read(name)))
            return router(torch.zeros(1, router.scores.width)).pairs.gates()[0].tolist()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        base, deltas = self.adapter.base.read(name, rows), self._deltas.get(name)
        if deltas is None:
            return base
        wide = np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
        start, stop, _ = (rows or slice(None)).indices(self.tensors[name].shape[0])
        base = base.astype(wide, copy=False)
        rest = 1 - sum(self._weight(delta) for delta in deltas if delta.magnitude)
        merged = base * wide.type(rest)
        for delta in deltas:
            scale, weight = delta.scale, self._weight(delta)
            if delta.magnitude is None:
                merged += self._product(name, delta, scale * weight, start, stop, wide)
                continue
            own = self._product(name, delta, scale, start, stop, wide)
            own += base
            size = self.adapter.read(delta.magnitude, rows).astype(wide)
            norms = np.maximum(np.linalg.norm(own, axis=1), np.finfo(wide).tiny)
            own *= (wide.type(weight) * size / norms)[:, None]
            merged += own
        return self._rounded(name, merged)

    def _rounded(self, name: str, merged: np.ndarray) -> np.ndarray:
        """
        Raises:
            BadInput: a value beyond the largest number of the dtype (float16 ends at 65504).
        """
        dtype = self.tensors[name].dtype
        with np.errstate(over="ignore"):
            made = merged.astype(NUMPY_DTYPES[dtype], copy=False)
        if dtype == "F16" and not np.isfinite(made).all() and np.isfinite(largest := np.abs(merged).max()):
            raise BadInput(
                f"{self.ref}: {name} merged holds {largest:.4g}, beyond the largest F16 number; ask for bf16 or f32"
            )
        return made

    def _product(self, name: str, delta: Delta, scale: float, start: int, stop: int, wide: np.dtype[Any]) -> np.ndarray:
        """Rows `start` to `stop` of `scale` B A as the base stores that matrix."""
        blocks, read = whole_blocks(start, stop), self.adapter.read
        if name in self._turned:  # the base holds W^T, and (B A)^T = A^T B^T
            left, right = np.ascontiguousarray(read(delta.a).T[blocks]), read(delta.b).T
        else:
            left, right = read(delta.b, blocks), read(delta.a)
        return product_rows(left.astype(wide), right.astype(wide), scale, start, stop)

    def read_memory(self, name: str, nbytes: int) -> int:
        deltas = self._deltas.get(name)
        if deltas is None:
            return self.adapter.base.read_memory(name, nbytes)
        info, item = self.tensors[name], 8 if self.adapter.base.tensors[name].dtype == "F64" else 4
        factors = max(
            self.adapter.tensors[d.a].nbytes
            + self.adapter.tensors[d.b].nbytes
            + item * (self.adapter.tensors[d.a].size + self.adapter.tensors[d.b].size)
            for d in deltas
        )
        # wide: the base, the sum, one product with a block of it, and with magnitudes the squares
        count = nbytes // NUMPY_DTYPES[info.dtype].itemsize
        base = self.adapter.base.read_memory(name, count * NUMPY_DTYPES[self.adapter.base.tensors[name].dtype].itemsize)
        return max(base, 2 * nbytes + item * (4 * count + BLOCK * math.prod(info.shape[1:])) + factors)

    def extent(self, name: str) -> Extent | None:
        return None if name in self._deltas else self.adapter.base.extent(name)

    def companions(self) -> Sequence[Companion]:
        return self.adapter.companions()

    def provenance(self) -> dict[str, Any]:
        found = self.adapter.provenance()
        if not self._routes:
            return found
        seen = hashlib.sha256(f"{found['digest']} {sorted(self._routes.items())}".encode())
        return found | {"digest": f"{PREFIX}{seen.hexdigest()}", "expert": max(self._routes.values())}

    def close(self) -> None:
        self.adapter.close()
