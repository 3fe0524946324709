"""The layout of our own runtime: it holds any dense family exactly, as everything outside the experts stays what it is.

config.json keeps the dense config untouched under `base_config` and describes the mixture beside it; tensors outside the experts
keep their names, those of the experts follow from the dense ones (moeforge.checkpoint.expert_names). Stock transformers does not
know the model type and refuses it, which is right: it would compute the dense model without its FFNs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeforge.checkpoint import expert_names
from moeforge.checkpoint.family import FFN_ROLES, Architecture
from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig

from . import described
from .experts import Parent
from .pairs import Pair
from .predicates import Predicate
from .recipe import Matrix
from .targets import Shared, Slot, Target

NAME = "moeforge"
ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh", "quick_gelu", "relu", "relu2",
                         "sigmoid", "tanh", "identity", "linear"})  # fmt: skip
"""What the experts' kernels know (moeforge_kernels.activations, which needs torch)."""
UNSERVED = frozenset(
    {"BertForPreTraining", "BertForNextSentencePrediction", "BertForMultipleChoice", "RobertaForMultipleChoice"}
)
"""Heads that the runtime has no class for."""
ONLY_HERE = "only moeforge's own runtime holds this block"


def pair(family: Architecture, settings: Mapping[str, Any], parent: Parent) -> Pair:
    """This family in our own layout, and what it asks of the config."""
    everyone = [Predicate.parse(rule) for rule in described.find("pairs", "_any")[0]["require"]]
    act = Predicate(
        _act_key(settings), "in", sorted(ACTIVATIONS), "no kernel for experts knows this activation", fatal=True
    )
    return Pair(family.model_type, target(family, parent), (*everyone, act), {})


def target(family: Architecture, parent: Parent) -> Target:
    """The layout for a family's names."""
    before = family.layer.format(layer=0)
    names: dict[str, list[Matrix]] = {}
    for role in parent.matrices:
        names.setdefault(parent.parts[role, 0].called.removeprefix(before), []).append(role)
    fused: list[tuple[str, Matrix]] = [
        (name, role) for name, of in names.items() if len(of) > 1 for role in of if role in family.apart
    ]
    for name, role in fused:
        names.pop(name, None)
        names[family.apart[role]] = [role]
    root = expert_names.root(names)

    def slots(member: str) -> tuple[Slot, ...]:
        return tuple(Slot(expert_names.inside(name, root, member), tuple(of)) for name, of in names.items())

    unsupported: list[Mapping[str, Any]] = [{"verdict": "unsupported", "because": ONLY_HERE}]
    return Target(
        model_type=NAME,
        architecture=architecture(family),
        tensors={},
        layer=family.layer,
        layer_tensors={},
        router=expert_names.below(root, f"{expert_names.ROUTER}.weight"),
        experts=slots(f"{expert_names.EXPERTS}.{{expert}}"),
        copies=(),
        config={},
        renormalises="renormalise",
        shared=Shared(slots(expert_names.SHARED)),
        routed_factor="factor",
        sparse="any",
        keeps_names=True,
        portability={
            "transformers": [
                {"verdict": "exact", "because": "with moeforge installed, which registers the model type"}
            ],
            "vllm": unsupported,
            "llama.cpp": unsupported,
        },
    )


def architecture(family: Architecture) -> str:
    """Our class for a family's: `BertForMaskedLM` -> `MoeforgeForMaskedLM`, `ViTModel` -> `MoeforgeModel`.

    Raises:
        BadInput: there is none.
    """
    if family.kind == "decoder":
        return "MoeforgeForCausalLM"
    named = next(iter(family.heads))
    if named in UNSERVED:
        raise BadInput(f"config.json: architectures = [{named!r}]: moeforge runs no mixture with this head; save the model as one of "
                       f"{', '.join(sorted(set(family.classes) - UNSERVED))}")  # fmt: skip
    return "MoeforgeModel" if named == family.bare else f"Moeforge{named[named.index('For') :]}"


def config(
    family: Architecture,
    base: Mapping[str, Any],
    settings: Mapping[str, Any],
    values: Mapping[str, Any],
    matrices: Iterable[Matrix],
    sparse: Sequence[int],
) -> dict[str, Any]:
    """config.json: the dense config, and what rebuilds the mixture. `values`: what the mixture adds ($experts, $width, ...)."""
    held = frozenset(matrices) & FFN_ROLES
    experts = ExpertsConfig(
        count=values["experts"],
        width=values["width"],
        activation=settings[_act_key(settings)],
        gated="gate" in held,
        bias="up_bias" in held,
    )
    shared = None
    if values["shared_width"]:
        shared = ExpertsConfig(
            width=values["shared_width"], activation=experts.activation, gated=experts.gated, bias=experts.bias
        )
    router = RouterConfig(
        top_k=values["top_k"],
        renormalise=values["norm_topk"],
        factor=float(values["routed_factor"]),
        init_std=values["router_std"],
    )
    mixture = MixtureConfig(layers=tuple(sparse), experts=experts, router=router, shared=shared)
    mixture.check()
    return {
        "model_type": NAME,
        "architectures": [architecture(family)],
        "base_config": dict(base),
        "mixtures": [mixture.as_json()],
        "dtype": values["dtype"],
    }


def _act_key(settings: Mapping[str, Any]) -> str:
    """The setting that names the FFN's activation: a family whose FFN does not use the config's derives another."""
    return "ffn_act" if settings.get("ffn_act") is not None else "hidden_act"
