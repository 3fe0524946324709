"""Scores and selection joined: hidden states -> Routing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.dispatch import wished
from moeforge_kernels.pairs import Pairs, pairs_from_list, pairs_from_slots
from moeforge_kernels.routing import OP as ROUTING

from ..errors import BadInput
from . import select
from .config import RouterConfig
from .context import Force
from .routing import Routing
from .scores import make_scores


class Router(nn.Module):
    """Logits are float32 whatever the model computes in, autocast included: bfloat16 ties on one token in 200, and a tie sends it
    elsewhere. What ties all the same goes to the lowest index.

    Parameters are those of its kind of scores (`weight` [E', D] for a linear one); `noise_weight` [E', D] for noisy top-k. The
    buffer `selection_bias` [E'] stays float32 when the model is cast: its steps are below what bfloat16 resolves.

    Args:
        config: which policy; checked.
        width: D.
        experts: E, without null experts. E' counts them too.

    Raises:
        BadInput: a kind that nobody registered, or an option that it does not take.
    """

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, width: int, experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.total = experts + config.null_experts
        self.scores = make_scores(config, width, self.total)
        shapes = self.scores.parameters()
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if config.noise == "noisy_topk":
            self.noise_weight = nn.Parameter(torch.empty(self.total, width))
        self.register_buffer("selection_bias", torch.zeros(self.total) if config.bias else None)
        bounds = [0, *accumulate(config.by_label)] if config.by_label else [0, experts]
        self.spans = tuple(pairwise(bounds))
        """(first, behind the last) expert of each label; one span for all where labels do not matter."""
        self.shares = {k: tuple(select.Share.of(config.capacity_factor, k, stop - start) for start, stop in self.spans)
                       for k in (1, config.top_k)}  # fmt: skip
        plain = not (config.null_experts or config.by_label or config.groups > 1) and config.capacity_factor is None
        self.routes = plain and config.score in ("softmax", "sigmoid")
        """Whether the op `routing` makes the same choice as the config's top-k."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with `init_std`, vectors and learnt noise zero."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.ndim > 1 and name != "noise_weight":
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, *, real: Tensor | None = None, labels: Tensor | None = None,
                force: Force | None = None) -> Routing:  # fmt: skip
        """[T, D] -> Routing; padding (`real` False) and tokens with a label that has no experts go to no expert.

        Args:
            force: another choice than the config's: that expert (modulo E), or the label's, alone and with weight 1; or all experts
                by their scores, whatever the config's gate_scale.

        Raises:
            BadInput: the policy needs labels, and nobody gave any.
        """
        config = self.config
        policy = config.train_select if self.training and config.train_select is not None else config.select
        if isinstance(force, int):
            return self._fixed(x, real, torch.full((len(x),), force % self.experts, device=x.device), 1.0)
        if force == "label":
            return self._fixed(x, real, self._known(labels), 1.0)
        if policy == "fixed":
            return self._fixed(x, real, self._known(labels), config.factor)
        if force == "all":
            policy = "all"
        with _without_autocast(x.device.type):
            logits, seen = self._logits(x)
        real, allowed = self._eligible(x, real, labels)
        if allowed is not None:
            logits, seen = logits.masked_fill(~allowed, select.NEVER), seen.masked_fill(~allowed, select.NEVER)
        probabilities = select.score(seen, config.score, config.sparsity)
        if policy == "expert_choice":
            pairs = self._experts_choose(probabilities, real, allowed)
        else:
            pairs = self._tokens_choose(
                policy, seen, probabilities, real, "prob" if force == "all" else config.gate_scale
            )
        routing = Routing(pairs, logits, probabilities, real, config.by_label)
        return routing.scaling_inputs() if config.scale_at == "input" else routing

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E'] without noise and temperature, and with them."""
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        noise = config.noise if self.training else "none"
        if noise == "jitter":
            x = x * (1 + config.noise_scale * (2 * torch.rand_like(x) - 1))
        logits = seen = self.scores(x, {name: getattr(self, name).to(wide) for name in self.names}, self.training)
        if noise == "gumbel":
            uniform = torch.rand_like(logits).clamp_min(torch.finfo(wide).tiny)
            seen = logits + config.noise_scale * (uniform.log() - torch.log1p(-uniform))
        elif noise == "noisy_topk":
            scale = F.softplus(F.linear(x, self.noise_weight.to(wide))) + config.noise_scale
            seen = logits + torch.randn_like(logits) * scale
        return logits, seen / config.temperature if config.temperature != 1 else seen

    def _eligible(self, x: Tensor, real: Tensor | None, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(which tokens are routed [T], which experts each may choose [T, E']); None: all."""
        if not self.config.by_label:
            return real, None
        labels = self._known(labels)
        experts = torch.arange(self.total, device=x.device)
        owner = sum(((experts >= start).long() for start, _ in self.spans[1:]), torch.zeros_like(experts))
        valid = (labels >= 0) & (labels < len(self.spans))
        # null experts are everyone's; a token that goes nowhere may look at all, as a softmax over nothing is no number
        allowed = (owner == labels.unsqueeze(-1)) | (experts >= self.experts) | ~valid.unsqueeze(-1)
        return valid if real is None else valid & real, allowed

    def _known(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            key = "by_label" if self.config.by_label else "select"
            raise BadInput(
                f"router: {key} = {getattr(self.config, key)!r}: needs a label for every token and was given none; "
                "pass labels to MixtureContext.begin"
            )
        return labels

    def _tokens_choose(self, policy: str, seen: Tensor, probabilities: Tensor, real: Tensor | None,
                       gate_scale: select.GateScale) -> Pairs:  # fmt: skip
        config = self.config
        by_logit = config.order == "select_score"
        if self.routes and policy == "topk" and gate_scale == "prob":
            at_once = self._at_once(seen, by_logit, real)
            if at_once is not None:
                return at_once
        preference = (seen if by_logit else probabilities).detach()
        if self.selection_bias is not None:
            preference = preference + self.selection_bias
        if self.config.by_label:
            preference = preference.masked_fill(seen == select.NEVER, select.NEVER)
        if config.groups > 1:
            preference = select.limit_to_groups(preference, config.groups, config.top_groups)
        if real is not None:
            preference = preference.masked_fill(~real.unsqueeze(-1), select.NEVER)
        choose: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "topk": lambda: select.top_k(preference, config.top_k),
            "switch": lambda: select.top_k(preference, 1),
            "topp": lambda: select.top_p(preference, probabilities, config.top_p),
            "threshold": lambda: select.above(preference, config.threshold, fallback=config.fallback == "argmax"),
            "all": lambda: select.everyone(preference),
        }
        index, chosen = choose[policy]()
        over = seen if by_logit and config.score == "softmax" else None
        weight = select.weigh(index, chosen, probabilities, over, renormalise=config.renormalise)
        if config.capacity_factor is not None and policy in ("topk", "switch"):
            share = self.shares[1 if policy == "switch" else config.top_k][0]
            quota = share.quota(len(seen)) if real is None else share.quota_of(real.sum())
            chosen = select.within_capacity(index, chosen, self.experts, quota)
        weight = select.gate(weight, chosen, gate_scale, config.factor)
        # null experts answer nothing: their pairs are left out, what they weigh is gone
        index = index.masked_fill(~chosen, self.experts).clamp_max(self.experts)
        return pairs_from_slots(index, weight, self.experts)

    def _at_once(self, seen: Tensor, by_logit: bool, real: Tensor | None) -> Pairs | None:
        """The config's top-k as one compiled call instead of twenty, for the few tokens of a decoding step; None where that cannot run,
        is not wished for, or would choose otherwise: among what is no number or may not be chosen."""
        config, backend = self.config, ROUTING.backends["cpu"]
        how: dict[str, Any] = {"score": config.score, "select_first": by_logit, "renormalise": config.renormalise, "factor": config.factor,
                               "bias": self.selection_bias, "real": real}  # fmt: skip
        if wished() is not None or backend.why_not(seen, config.top_k, **how) is not None:
            return None
        known = [seen] if self.selection_bias is None else [seen, self.selection_bias]
        if not all(bool(values.isfinite().all()) for values in known):
            return None
        return backend.function(seen, config.top_k, **how)

    def _experts_choose(self, probabilities: Tensor, real: Tensor | None, allowed: Tensor | None) -> Pairs:
        config = self.config
        eligible = torch.ones_like(probabilities, dtype=torch.bool) if allowed is None else allowed
        if real is not None:
            eligible = eligible & real.unsqueeze(-1)
        found = select.expert_choice(probabilities, eligible, self.spans, self.shares[config.top_k], renormalise=config.renormalise,
                                     fallback=config.fallback == "argmax")  # fmt: skip
        weight = select.gate(found.weight, found.token < len(probabilities), config.gate_scale, config.factor)
        return pairs_from_list(found.token, found.expert, weight, len(probabilities), self.experts)

    def _fixed(self, x: Tensor, real: Tensor | None, labels: Tensor, factor: float) -> Routing:
        valid = (labels >= 0) & (labels < self.experts)
        real = valid if real is None else valid & real
        index = labels.masked_fill(~real, self.experts).unsqueeze(-1)
        weight = x.new_full(index.shape, factor, dtype=torch.promote_types(x.dtype, torch.float32))
        return Routing(pairs_from_slots(index, weight, self.experts), None, None, real)

    @torch.no_grad()
    def balance_bias(self, counts: Tensor, rate: float) -> None:
        """One step of balancing without a loss: an expert with less than the mean load is preferred a little more, one with more a
        little less (arXiv:2408.15664, algorithm 1). Nothing happens where there is no bias.

        Args:
            counts: [E] tokens that each expert got in the step, over all micro-batches and ranks.
            rate: how much; the paper's u, 0.001.
        """
        if self.selection_bias is not None:
            counts = counts.to(self.selection_bias)
            self.selection_bias[: self.experts] += rate * (counts.mean() - counts).sign()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        kept = self.selection_bias
        super()._apply(fn, recurse)
        if kept is not None and self.selection_bias is not None and self.selection_bias.dtype != kept.dtype:
            self.selection_bias = kept.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        c = self.config
        null = f" + {c.null_experts} null" if c.null_experts else ""
        return f"{c.kind}, {c.score}, {c.select}, {self.experts} experts{null}"


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    # the meta device, on which shapes are worked out, has none
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
