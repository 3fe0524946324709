"""Several checkpoints of one architecture become the experts of one mixture (Branch-Train-MiX)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.checkpoint.architectures import architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.family import BOOKKEEPING, FFN_ROLES, Architecture
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.vocabulary import first_difference, vocabulary
from moeforge.errors import BadInput, UsageProblem
from moeforge.options import opt

from .. import align, merge
from ..experts import cast
from ..recipe import ExpertRecipe, Layer, LayerRecipe, MixtureShape

VOCABULARY = frozenset({"embed", "head"})
"""Roles with a row for each token."""
MAY_DIFFER = frozenset({"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range",
                        "attention_dropout", "pretraining_tp", "max_position_embeddings"})  # fmt: skip
"""Settings in which parents need not agree: they do not change what a layer computes."""


@dataclass(frozen=True)
class Options:
    expert: tuple[str, ...] = opt("a further checkpoint: expert 1, 2, ... (SRC is expert 0)", metavar="REF", reads=True)
    trunk: Literal["average", "base", "slerp", "task-vector"] = opt(
        "what attention, norms and embeddings become: the mean over all checkpoints, those of the base, the middle of the arc "
        "between the checkpoints, or the base plus the sum of what each checkpoint changed",
        default="average",
    )
    base: str | None = opt(
        "checkpoint that all experts started from, for --trunk base and task-vector; no expert itself (default: SRC)",
        default=None,
        metavar="REF",
        reads=True,
    )
    trunk_scale: float = opt("how much of the summed changes --trunk task-vector adds to the base", default=1.0)
    align: Literal["none", "weights", "activations"] = opt(
        "reorder each expert's neurons to match SRC's; needed before experts are merged later, changes nothing now",
        default="none",
    )

    def __post_init__(self) -> None:
        if not self.expert:
            raise UsageProblem("--expert: give at least one checkpoint beside SRC")
        if self.base is not None and self.trunk not in ("base", "task-vector"):
            raise UsageProblem(
                f"--base {self.base} has no effect on --trunk {self.trunk}; use --trunk base or task-vector"
            )
        if self.trunk_scale != 1 and self.trunk != "task-vector":
            raise UsageProblem(
                f"--trunk-scale {self.trunk_scale:g} has no effect on --trunk {self.trunk}; use task-vector"
            )
        if not math.isfinite(self.trunk_scale):
            raise UsageProblem(f"--trunk-scale {self.trunk_scale:g}: must be a finite number")


class BTX:
    name = "btx"
    summary = "one expert from each of several checkpoints; the rest is merged"
    reference = (
        "Branch-Train-MiX, arXiv:2403.07816; neuron matching after Git Re-Basin, arXiv:2209.04836; "
        "task vectors, arXiv:2212.04089"
    )
    api_version = 1
    Options = Options

    def parents(self, options: Options) -> tuple[str, ...]:
        """Refs of the checkpoints beside SRC: the further experts, then the base."""
        return (*options.expert, *([] if options.base is None else [options.base]))

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        experts = 1 + len(options.expert)
        if stage.experts not in (None, experts):
            raise UsageProblem(
                f"--experts {stage.experts}, but SRC and {len(options.expert)} --expert make {experts}; leave it out"
            )
        if stage.top_k > experts:
            raise UsageProblem(f"--top-k {stage.top_k} is more than the {experts} checkpoints")
        return MixtureShape(
            experts,
            stage.top_k,
            ffn_width,
            exact=False,
            why_inexact="experts of different checkpoints around a common trunk; the same function only where all "
            "checkpoints are identical",
        )

    def check_parents(self, checkpoints: Sequence[Checkpoint], options: Options) -> None:
        """Refuse parents that cannot share a trunk: another architecture, other settings, another vocabulary.

        Raises:
            BadInput: naming the checkpoint, the key and both values.
        """
        first = checkpoints[0]
        family = architecture(first.config)
        wanted = deciding(family, first.config)
        size = first.config.get("vocab_size", 0)
        tokens = vocabulary(first)
        for other in checkpoints[1:]:
            found = deciding(family, other.config)
            for key in sorted(wanted.keys() | found.keys()):
                if wanted.get(key) != found.get(key):
                    raise BadInput(
                        f"{other.ref}: {key} = {found.get(key)!r}, SRC has {wanted.get(key)!r}; experts must come from one architecture"
                    )
            theirs_size = other.config.get("vocab_size", 0)
            if theirs_size > size:
                raise BadInput(
                    f"{other.ref}: vocab_size = {theirs_size} is more than SRC's {size}; "
                    "make the checkpoint with the largest vocabulary SRC"
                )
            theirs = vocabulary(other)
            index = first_difference(tokens, theirs, theirs_size)
            if index is not None:
                raise BadInput(
                    f"{other.ref}: token {index} is {theirs[index]!r}, in SRC it is {tokens[index]!r}; "
                    "rows of different tokens cannot be averaged"
                )

    def merge(self, role: str, output: TensorInfo, options: Options) -> Callable[..., np.ndarray] | None:
        """How a tensor outside the mixtures is made from all parents' tensors; None: SRC's is taken.

        Rows of tokens that only some vocabularies have are made from those that have them (see moeforge_upcycle.merge).
        """
        if (options.trunk == "base" and options.base is None) or (role in FFN_ROLES and options.align != "none"):
            return None

        def merged(*arrays: np.ndarray) -> np.ndarray:
            for array in arrays[1:]:
                if array.shape != arrays[0].shape and role not in VOCABULARY:
                    raise BadInput(
                        f"{output.name}: shapes {list(arrays[0].shape)} and {list(array.shape)} cannot be merged"
                    )
            base = arrays[0] if options.base is None else arrays[-1]
            parents = arrays[: 1 + len(options.expert)]
            if options.trunk == "average":
                made = merge.average(parents)
            elif options.trunk == "slerp":
                made = merge.slerp(parents)
            else:
                scale = options.trunk_scale if options.trunk == "task-vector" else 0.0
                made = merge.task_vector(parents, base, scale)
            return cast(made, output.dtype, output.name)

        return merged

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return align.NEEDS[options.align]

    def work_bytes(self, model_width: int, ffn_width: int, options: Options) -> int:
        return align.work_bytes(options.align, model_width, ffn_width)

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        def neurons(parent: int) -> np.ndarray | None:
            if options.align == "none" or parent == 0:
                return None
            order = align.align(options.align, layer, parent)
            return None if np.array_equal(order, np.arange(len(order))) else order

        return LayerRecipe(tuple(ExpertRecipe(parent, neurons(parent)) for parent in range(shape.experts)))


def deciding(family: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config decides the function, whichever transformers wrote it: the family's settings as resolved, and keys
    that the family does not list, as nobody knows what those do.

    What only says how layers alternate counts through `layer_types` and `no_rope_layers`, and a window only where some
    layer slides.
    """
    found = family.resolve(config)
    alternates = {*(family.layer_types or {}).values(), *(family.no_rope_layers or {}).values()}
    if family.layer_types and "sliding_attention" not in found["layer_types"]:
        alternates.add("sliding_window")
    listed = {*family.settings, *family.required} - BOOKKEEPING - MAY_DIFFER - alternates
    derived = {"rope", "layer_types", "head_dim", "num_key_value_heads", "no_rope_layers"}
    kept = {key: found.get(key) for key in listed | derived}
    kept["rope"] = {key: value for key, value in found["rope"].items() if value is not None}
    strange = {key: config[key] for key in family.unknown_keys(config) if key not in MAY_DIFFER}
    # a switch that is off is as good as one that an older version did not write
    return kept | {key: value for key, value in strange.items() if value is not None and value is not False}
