"""Feed-forward networks that share one frozen base and differ by low-rank deltas (MixLoRA, arXiv:2404.15159; LLaVA-MoLE, 2401.16160).

    u_e = (G + s B_e A_e) x + g,   v_e = (U + s B'_e A'_e) x + c,   h_e = act(u_e) * v_e,   f_e(x) = (W + s B''_e A''_e) h_e + b

    y = f(x) + sum_e w_e (f_e(x) - f(x))          f: the frozen network alone

The last line is sum_e w_e f_e(x) wherever the weights sum to 1, and keeps the frozen network whole where they do not: a top-p that
stops early, Switch's probability, a null expert, a token that no expert took. `base_weight = "paper"` leaves out what it adds.

The base is the module that stood at the site, never copied (packed in 4 bits it stays so), and costs what it costs alone, whatever K:

    G x and U x are the same for all experts of a token: computed once, and each pair adds its own delta;
    sum_e w_e W h_e = W (sum_e w_e h_e): summed first, one product a token. The bias comes with the sum of the weights.

Both hold for gradients too. Magnitudes (DoRA) and dropout on h_e undo the second one: those cost a product a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.activations import activation as find
from moeforge_kernels.combine import combine
from moeforge_kernels.grouped_gemm import grouped_gemm
from moeforge_kernels.lora_network import lora_network
from moeforge_kernels.pairs import Pairs

from ...errors import BadInput
from ..config import ExpertsConfig
from ..low_rank import LowRank
from .base import Experts, Place, Stored
from .feed_forward import FeedForward
from .low_rank import Scales, row_norms, start, weight_of


class LoraFFNExperts(Experts):
    """E deltas over one frozen network of width F.

    Parameters, for every role among gate, up, gate_up and down that has deltas: `{role}_lora_A` [E, r, D] (down: [E, r, F]),
    `{role}_lora_B` [E, F, r] (gate_up: 2F, the gate's rows first; down: D), and with DoRA `{role}_magnitude` [E, outputs].

    Args:
        count, width, ffn_width: E, D, F.
        roles: the network's linear maps, down last.
        names: role -> path of that map below the site's root.
    """

    adopts = True

    def __init__(
        self,
        count: int,
        width: int,
        ffn_width: int,
        options: LowRank,
        *,
        roles: tuple[str, ...],
        names: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.count, self.width, self.ffn_width, self.options = count, width, ffn_width, options
        self.names = {role: names[role] for role in roles}
        self.targets = tuple(role for role in roles if role in options.targets)
        self.scales = options.scale_of(count)
        self._scales = Scales(self.scales)
        sizes = {role: (width, ffn_width) for role in ("gate", "up")}
        sizes |= {"gate_up": (width, 2 * ffn_width), "down": (ffn_width, width)}
        for role in self.targets:
            inputs, outputs = sizes[role]
            self.register_parameter(f"{role}_lora_A", nn.Parameter(torch.empty(count, options.rank, inputs)))
            self.register_parameter(f"{role}_lora_B", nn.Parameter(torch.empty(count, outputs, options.rank)))
            if options.dora:
                self.register_parameter(f"{role}_magnitude", nn.Parameter(torch.empty(count, outputs)))
        self.base: FeedForward | None = None
        if options.frozen:
            self.requires_grad_(False)

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> Self:
        place.require_ffn(config)
        options = LowRank.read(config, without=("share_a",))
        roles = tuple(role for role in ("gate", "up", "gate_up", "down") if role in place.names)
        if not set(roles) & set(options.targets):
            raise BadInput(f"experts of type {config.type!r} at {place.root}: options.targets = {list(options.targets)}: the network has "
                           f"{', '.join(roles)}")  # fmt: skip
        return cls(config.count, place.width, config.width, options, roles=roles, names=place.names)

    def adopt(self, maps: Mapping[str, tuple[str, nn.Module]], activation: str | None) -> None:
        assert activation is not None
        self.base = FeedForward(maps, activation).requires_grad_(False)

    def reset_parameters(self, std: float) -> None:
        start(dict(self.named_parameters(recurse=False)))

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """m = ||W||, with which nothing differs from the base."""
        for role in self.targets if self.options.dora else ():
            getattr(self, f"{role}_magnitude").copy_(self._norms(role))

    def _a(self, role: str) -> Tensor | None:
        return getattr(self, f"{role}_lora_A", None)

    def _b(self, role: str) -> Tensor | None:
        return getattr(self, f"{role}_lora_B", None)

    def _scale(self) -> Tensor:
        return self._scales.beside(next(self.parameters(recurse=False)))

    def _norms(self, role: str) -> Tensor:
        a, b = self._a(role), self._b(role)
        assert a is not None and b is not None and self.base is not None
        return row_norms(weight_of(self.base.map(role)), a, b, self._scale())

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        options = self.options
        low = F.dropout(x, options.dropout, self.training) if options.dropout else x
        if options.dora or (options.dropout and self.training):
            return self._by_pair(x, low, pairs)
        base = self.base
        assert base is not None
        low = low.to(next(self.parameters(recurse=False)).dtype)
        if "gate_up" in base.paths:
            gate, up = base.project("gate_up", x).chunk(2, -1)
            a_gate, b_both = self._a("gate_up"), self._b("gate_up")
            a_up = a_gate
            b_gate, b_up = (None, None) if b_both is None else b_both.split(self.ffn_width, 1)
        else:
            gate = base.project("gate", x) if "gate" in base.paths else None
            up = base.project("up", x)
            a_gate, a_up, b_gate, b_up = self._a("gate"), self._a("up"), self._b("gate"), self._b("up")
        mixed, delta = lora_network(low, gate, up, pairs, a_gate, a_up, b_gate, b_up, self._a("down"), self._b("down"), self._scale(),
                                    activation=base.activation, rest=options.base_weight == "one")  # fmt: skip
        out = self._down(mixed, pairs)
        return out if delta is None else out + delta.to(out.dtype)

    def _down(self, mixed: Tensor, pairs: Pairs) -> Tensor:
        """W mixed, and the bias as often as the weights say."""
        assert self.base is not None
        out = self.base.project("down", mixed)
        bias = getattr(self.base.map("down"), "bias", None)
        if bias is not None and self.options.base_weight == "paper":
            out = out + ((pairs.gates().sum(-1, keepdim=True) - 1) * bias).to(out.dtype)
        return out

    def _by_pair(self, x: Tensor, low: Tensor, pairs: Pairs) -> Tensor:
        """The sum with a whole down product for each pair: what magnitudes and dropout ask for."""
        base, options = self.base, self.options
        assert base is not None
        act = find(base.activation)
        plain = {role: base.project(role, x) for role in base.paths if role != "down"}
        ahead = {
            role: self._adapted(role, value[pairs.token], low[pairs.token], pairs) for role, value in plain.items()
        }

        def inner(values: Mapping[str, Tensor]) -> Tensor:
            if "gate_up" in values:
                gate, up = values["gate_up"].chunk(2, -1)
                return act(gate) * up
            return act(values["gate"]) * values["up"] if "gate" in values else act(values["up"])

        hidden = inner(ahead)
        dropped = F.dropout(hidden, options.dropout, self.training) if options.dropout else hidden
        made = self._adapted("down", base.project("down", hidden), dropped, pairs)
        if options.base_weight == "one":
            still = base.project("down", inner(plain))
            return still + combine(made - still[pairs.token], pairs).to(still.dtype)
        return combine(made, pairs)

    def _adapted(self, role: str, value: Tensor, low: Tensor, pairs: Pairs) -> Tensor:
        """[P, outputs] what a map gives with each pair's delta (and magnitude).

        Args:
            value: [P, outputs] of the frozen map. low: [P, inputs] what the low-rank path reads.
        """
        a, b = self._a(role), self._b(role)
        if a is None or b is None:
            return value
        expert = pairs.expert.clamp_max(self.count - 1)
        scale = self._scale()[expert].unsqueeze(-1)
        real = (pairs.expert < self.count).unsqueeze(-1)
        made = grouped_gemm(grouped_gemm(low.to(a.dtype), a, pairs, gather=False), b, pairs, gather=False)
        delta = torch.where(real, made, torch.zeros((), dtype=made.dtype, device=made.device)) * scale
        magnitude = getattr(self, f"{role}_magnitude", None)
        if magnitude is None:
            return value + delta.to(value.dtype)
        assert self.base is not None
        bias = getattr(self.base.map(role), "bias", None)
        with torch.no_grad():  # no gradient through the norm (arXiv:2402.09353, section 4.3)
            norms = self._norms(role)
        ratio = (magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny))[expert]
        plain = value if bias is None else value - bias
        scaled = (ratio * (plain + delta)).to(value.dtype)
        return scaled if bias is None else scaled + bias

    def stored(self) -> dict[str, Stored]:
        found = {}
        for role in self.targets:
            name = self.names[role]
            for part, leaf in (("lora_A", ".weight"), ("lora_B", ".weight"), ("magnitude", "")):
                parameter = getattr(self, f"{role}_{part}", None)
                if parameter is not None:
                    called = "lora_magnitude_vector" if part == "magnitude" else part
                    found[f"{role}_{part}"] = Stored((f"{name}.{called}{leaf}",), (parameter.shape[1],))
        assert self.base is not None
        return found | {
            f"base.{name}": Stored((name,), (p.shape[0],), shared=True) for name, p in self.base.named_parameters()
        }

    def extra_repr(self) -> str:
        return f"{self.count} LoRA of rank {self.options.rank} over one FFN, D {self.width}, F {self.ffn_width}"
