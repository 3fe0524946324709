"""What a mixture is, as data: the entries under `mixtures` in config.json, enough to rebuild its modules.

Imports no torch: a plan writes these without building anything. Reading is strict: an unknown key, a value of another kind or
a combination that has no meaning is refused here, with the key and the value, not found hours later.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import BadInput

Select = Literal["topk", "topp", "threshold", "all", "switch", "expert_choice", "fixed"]
"""topk: the K best. topp: the fewest whose probability exceeds `top_p`. threshold: all above `threshold`. all: every one, weighted.
switch: the best one, with a capacity. expert_choice: each expert takes its best tokens. fixed: the label says which."""


@dataclass(frozen=True)
class RouterConfig:
    """How tokens and experts find each other. The switches are orthogonal; :meth:`check` names the combinations without meaning."""

    kind: str = "linear"
    """Where logits come from: linear, cosine (prototypes), label, static, random, or a kind that a package registers. always: one
    expert that every token visits, without logits. joined: the routers of several adapters (moeforge.mixture.joined)."""
    input: Literal["site", "shared"] = "site"
    """Of linear maps. site: each has a router of its own. shared: those of a layer that read one tensor (q, k and v; gate and up) have
    one router and one decision, which lies at the first of them that has experts; o, down and whole networks have their own."""
    select: Select = "topk"
    top_k: int = 2
    score: Literal["softmax", "sigmoid", "sparsegen"] = "softmax"
    """sparsegen: sums to 1 like softmax, with exact zeros, so that threshold 0 takes as many experts as a token needs."""
    sparsity: float = 0.0
    """Of sparsegen: the higher, below 1, the fewer experts; 0 is sparsemax."""
    order: Literal["score_select", "select_score"] = "score_select"
    """Score all experts and choose among the scores, or choose among the logits and score the chosen."""
    renormalise: bool = True
    """Divide the chosen weights by their sum, so that they add up to 1."""
    gate_scale: Literal["prob", "none", "straight_through"] = "prob"
    """Multiply by the weight, by 1, or by 1 with the weight's gradient."""
    factor: float = 1.0
    """On the routed sum (DeepSeek's routed_scaling_factor)."""
    top_p: float = 0.8
    threshold: float = 0.0
    capacity_factor: float | None = None
    """Each expert takes at most factor * T * K / E tokens; None: no limit."""
    groups: int = 1
    """Group-limited top-k (DeepSeek-V3): experts lie in this many groups ..."""
    top_groups: int = 1
    """... of which a token may use this many."""
    bias: bool = False
    """A selection bias per expert, moved by the load and not by gradients (arXiv:2408.15664); it chooses, it does not weigh."""
    logit_bias: bool = False
    """A learnt bias in the linear map."""
    temperature: float = 1.0
    noise: Literal["none", "jitter", "gumbel", "noisy_topk"] = "none"
    """In training only. jitter: inputs times U(1-s, 1+s). gumbel: logits plus logistic noise times s. noisy_topk: learnt scale."""
    noise_scale: float = 0.01
    fallback: Literal["none", "argmax"] = "none"
    """Expert choice and threshold may leave a token without an expert; argmax gives it its best one."""
    causal: bool = True
    """False where selection looks at other tokens: such a router is refused in generation."""
    null_experts: int = 0
    """Experts that compute nothing, behind the real ones: a token may choose to do less."""
    train_select: Select | None = None
    """Another selection in training (MoSA draws at random, LoRA-Mixer uses all); None: the same."""
    init_std: float = 0.02
    scale_at: Literal["output", "input"] = "output"
    """Where the weight acts: on the expert's answer, or on what it is given (Llama 4)."""
    by_label: tuple[int, ...] = ()
    """Experts split by the token's label (its modality, its domain): label 0 chooses among the first by_label[0] experts, label 1
    among the next by_label[1], and so on; scores are normalised inside the group. Empty: labels do not matter."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind of router knows (moeforge.mixture.scores)."""

    def as_json(self) -> dict[str, Any]:
        """Every field, so that a later default does not change what is written."""
        return dataclasses.asdict(self, dict_factory=_lists)

    @classmethod
    def from_json(cls, raw: Any) -> RouterConfig:
        """Read one, strictly; :meth:`check` is the caller's.

        Raises:
            BadInput: an unknown key, or a value of another kind.
        """
        return _read(cls, raw, "router")

    def check(self, experts: int) -> None:
        """Refuse what has no meaning.

        Raises:
            BadInput: names key and value.
        """
        total = experts + self.null_experts

        def refuse(key: str, because: str) -> typing.NoReturn:
            raise BadInput(f"router: {key} = {getattr(self, key)!r}: {because}")

        policies = {self.select, self.train_select or self.select}
        if self.null_experts < 0:
            refuse("null_experts", "cannot be negative")
        if policies & {"topk", "expert_choice"} and not 1 <= self.top_k <= total:
            refuse("top_k", f"must lie between 1 and the number of experts, {total}")
        if "topp" in policies:
            if not 0 < self.top_p <= 1:
                refuse("top_p", "a share of probability lies in (0, 1]")
            if self.order == "select_score":
                refuse("order", "top-p adds up probabilities, so experts are scored first: score_select")
            if self.score != "softmax":
                refuse("score", "top-p adds up probabilities: softmax")
        if self.kind == "always" and (total != 1 or policies != {"all"}):
            refuse("kind", f"one expert that every token visits: select = 'all' and one expert, not {total}")
        if self.kind == "always" and self.input != "site":
            refuse("input", "where all tokens go one way there is no router to share: input = 'site'")
        if ("fixed" in policies) != (self.kind == "label"):
            refuse("select", f"a fixed choice is that of kind 'label' and its only one; kind = {self.kind!r}")
        if self.kind == "label" and (policies != {"fixed"} or self.by_label):
            refuse("kind", "a label is the choice itself: select = 'fixed', no train_select, no by_label")
        if self.score == "sparsegen" and self.order == "select_score":
            refuse("order", "sparsegen scores all experts together: score_select")
        if self.sparsity and self.score != "sparsegen":
            refuse("sparsity", f"belongs to score = 'sparsegen', not {self.score!r}")
        if not self.sparsity < 1:
            refuse("sparsity", "must be below 1")
        if self.groups < 1 or total % self.groups:
            refuse("groups", f"must divide the number of experts, {total}")
        if not 1 <= self.top_groups <= self.groups:
            refuse("top_groups", f"must lie between 1 and groups = {self.groups}")
        if self.groups > 1 and policies != {"topk"}:
            refuse("groups", f"groups limit top-k, not {' and '.join(sorted(policies - {'topk'}))}")
        if "topk" in policies and self.top_k > total // self.groups * self.top_groups:
            refuse(
                "top_k",
                f"{self.top_groups} of {self.groups} groups hold only {total // self.groups * self.top_groups} experts",
            )
        if self.by_label:
            if min(self.by_label) < 1 or sum(self.by_label) != experts:
                refuse("by_label", f"must be positive and add up to the number of experts, {experts}")
            if self.groups > 1:
                refuse("groups", "labels split the experts already (by_label)")
            if self.capacity_factor is not None and policies != {"expert_choice"}:
                refuse("capacity_factor", "a capacity within groups by label is for select = 'expert_choice'")
        self._check_capacity(policies, refuse)
        if self.temperature <= 0:
            refuse("temperature", "must be positive")
        if self.noise != "none" and self.noise_scale <= 0:
            refuse("noise_scale", "must be positive where there is noise")
        if self.init_std < 0:
            refuse("init_std", "cannot be negative")
        if self.fallback != "none" and not policies & {"expert_choice", "threshold"}:
            refuse("fallback", "only expert choice and threshold may leave a token without an expert")
        one = policies <= {"switch"} or (policies <= {"switch", "topk"} and self.top_k == 1)
        if self.gate_scale == "straight_through" and self.renormalise and one and total > 1:
            refuse(
                "gate_scale", "the weight of one expert, renormalised, is 1 and has no gradient: renormalise = false"
            )
        if self.scale_at == "input" and not one:
            refuse(
                "scale_at",
                "what experts are given can be scaled where a token has one expert: select topk with top_k = 1",
            )

    def _check_capacity(self, policies: set[str], refuse: Callable[[str, str], typing.NoReturn]) -> None:
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            refuse("capacity_factor", "must be positive")
        if self.capacity_factor is not None and not policies & {"topk", "switch", "expert_choice"}:
            refuse("capacity_factor", f"select = {self.select!r} has no capacity: topk, switch or expert_choice")
        if "switch" in policies and self.capacity_factor is None:
            refuse("capacity_factor", "Switch routing has a capacity; top-k with top_k = 1 has none")
        if self.capacity_factor is not None and self.select in ("topk", "switch") and self.causal:
            refuse(
                "causal",
                "a capacity counts the other tokens, and an answer depends on how many there are: causal = false",
            )
        if "expert_choice" in policies:
            if self.select == "expert_choice" and self.causal:
                refuse("causal", "expert choice compares tokens with each other, later ones too: causal = false")
            if self.order == "select_score":
                refuse("order", "experts compare scores: score_select")
            if self.bias:
                refuse("bias", "expert choice is balanced by itself")
            if self.null_experts:
                refuse("null_experts", "an expert that computes nothing has nothing to choose")


@dataclass(frozen=True)
class ExpertsConfig:
    """What is chosen among. `type` names the class; the other fields say how large, `options` what only that type knows."""

    type: str = "ffn"
    count: int = 1
    width: int = 0
    """F."""
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureConfig:
    """One entry of `mixtures`: the same mixture at a site of some layers."""

    site: str = "ffn"
    """What it replaces or stands beside; moeforge.model.sites finds it by structure."""
    layers: tuple[int, ...] = ()
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    shared: ExpertsConfig | None = None
    """What every token visits beside the routed experts, with weight 1; its count is 1."""
    keep: bool = False
    """Whether the module that stood at the site stays and its answer is added."""

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            BadInput: names key and value.
        """
        if self.experts.count < 1:
            raise BadInput(f"mixture at {self.site}: experts.count = {self.experts.count}: must be at least 1")
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise BadInput(
                f"mixture at {self.site}: layers = {list(self.layers)}: must be distinct layer numbers from 0"
            )
        if self.shared is not None and self.shared.count != 1:
            raise BadInput(
                f"mixture at {self.site}: shared.count = {self.shared.count}: there is one shared expert, of any width"
            )
        self.router.check(self.experts.count)

    def as_json(self) -> dict[str, Any]:
        """The entry as it is written: every field, so that a later default does not change an old checkpoint."""
        return dataclasses.asdict(self, dict_factory=_lists)

    @classmethod
    def from_json(cls, raw: Any) -> MixtureConfig:
        """Read an entry.

        Raises:
            BadInput: an unknown key, a value of another kind, or no meaning.
        """
        made = _read(cls, raw, "mixtures")
        made.check()
        return made


def _lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def _read(kind: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise BadInput(f"{where}: expected an object, found {raw!r}")
    known = {item.name for item in dataclasses.fields(kind)}
    if unknown := sorted(set(raw) - known):
        raise BadInput(
            f"{where}: unknown key {unknown[0]!r}; a newer moeforge may have written it; known are {', '.join(sorted(known))}"
        )
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in raw.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        return _value(next(part for part in parts if part is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, where)
    if origin is Literal:
        good = value in parts
    elif origin is tuple:
        good = isinstance(value, list | tuple) and all(type(item) is parts[0] for item in value)
        value = tuple(value) if good else value
    elif hint is float:
        good = type(value) in (int, float)
        value = float(value) if good else value
    elif hint in (int, bool, str):
        good = type(value) is hint
    else:
        good = isinstance(value, Mapping)
    if not good:
        expected = " or ".join(map(repr, parts)) if origin is Literal else getattr(hint, "__name__", str(hint))
        raise BadInput(f"{where} = {value!r}: expected {expected}")
    return value
