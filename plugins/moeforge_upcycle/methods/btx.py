"""Several checkpoints of one architecture become the experts of one mixture (Branch-Train-MiX)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.checkpoint.architectures import FFN, architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.tensor import NUMPY_DTYPES, TensorInfo
from moeforge.errors import BadInput, UsageProblem
from moeforge.options import opt

from .. import align
from ..recipe import ExpertRecipe, Layer, LayerRecipe, MixtureShape

VOCABULARY = frozenset({"embed", "head"})
"""Roles with a row for each token."""
MAY_DIFFER = frozenset({"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range",
                        "attention_dropout", "pretraining_tp", "max_position_embeddings"})  # fmt: skip
"""Settings in which parents need not agree: they do not change what a layer computes."""


@dataclass(frozen=True)
class Options:
    expert: tuple[str, ...] = opt("a further checkpoint: expert 1, 2, ... (SRC is expert 0)", metavar="REF")
    trunk: Literal["average", "base"] = opt(
        "what attention, norms and embeddings become: the mean over all checkpoints, or those of SRC", default="average"
    )
    align: Literal["none", "weights", "activations"] = opt(
        "reorder each expert's neurons to match SRC's; needed before experts are merged later, changes nothing now",
        default="none",
    )

    def __post_init__(self) -> None:
        if not self.expert:
            raise UsageProblem("--expert: give at least one checkpoint beside SRC")


class BTX:
    name = "btx"
    summary = "one expert from each of several checkpoints; the rest is averaged"
    reference = "Branch-Train-MiX, arXiv:2403.07816; neuron matching after Git Re-Basin, arXiv:2209.04836"
    api_version = 1
    Options = Options

    def parents(self, options: Options) -> tuple[str, ...]:
        """Refs of the checkpoints beside SRC."""
        return options.expert

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        experts = 1 + len(options.expert)
        if stage.experts not in (experts, type(stage).experts):
            raise UsageProblem(f"--experts {stage.experts}, but SRC and {len(options.expert)} --expert make {experts}")
        if stage.top_k > experts:
            raise UsageProblem(f"--top-k {stage.top_k} is more than the {experts} checkpoints")
        return MixtureShape(
            experts,
            stage.top_k,
            ffn_width,
            exact=False,
            why_inexact="experts of different checkpoints around an averaged trunk; the same function only where all "
            "checkpoints are identical",
        )

    def check_parents(self, checkpoints: Sequence[Checkpoint], options: Options) -> None:
        """Refuse parents that cannot share a trunk: another architecture, other settings, another vocabulary.

        Raises:
            BadInput: naming the checkpoint, the key and both values.
        """
        first = checkpoints[0]
        wanted = architecture(first.config).resolve(first.config)
        tokens = _vocabulary(first)
        for other in checkpoints[1:]:
            found = architecture(other.config).resolve(other.config)
            for key in sorted((wanted.keys() | found.keys()) - MAY_DIFFER):
                if wanted.get(key) != found.get(key):
                    raise BadInput(
                        f"{other.ref}: {key} = {found.get(key)!r}, SRC has {wanted.get(key)!r}; experts must come from one architecture"
                    )
            if found["vocab_size"] > wanted["vocab_size"]:
                raise BadInput(
                    f"{other.ref}: vocab_size = {found['vocab_size']} is more than SRC's {wanted['vocab_size']}; "
                    "make the checkpoint with the largest vocabulary SRC"
                )
            theirs = _vocabulary(other)
            if tokens and theirs:
                for index in range(min(wanted["vocab_size"], found["vocab_size"])):
                    if tokens.get(index) != theirs.get(index) and index in tokens and index in theirs:
                        raise BadInput(
                            f"{other.ref}: token {index} is {theirs[index]!r}, in SRC it is {tokens[index]!r}; "
                            "rows of different tokens cannot be averaged"
                        )

    def merge(self, role: str, output: TensorInfo, options: Options) -> Callable[..., np.ndarray] | None:
        """How a tensor outside the mixtures is made from all parents' tensors; None: SRC's is taken.

        Rows of tokens that only some vocabularies have are averaged over those that have them.
        """
        if options.trunk == "base" or (role in FFN and options.align != "none"):
            return None

        def average(*arrays: np.ndarray) -> np.ndarray:
            # float64: the mean of equal float32 values is then that value, to the bit
            total = arrays[0].astype(np.float64)
            holders = np.ones((len(total), *[1] * (total.ndim - 1)))
            for array in arrays[1:]:
                if array.shape != total.shape and role not in VOCABULARY:
                    raise BadInput(
                        f"{output.name}: shapes {list(total.shape)} and {list(array.shape)} cannot be averaged"
                    )
                total[: len(array)] += array
                holders[: len(array)] += 1
            return (total / holders).astype(NUMPY_DTYPES[output.dtype])

        return average

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return align.NEEDS[options.align]

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        def neurons(parent: int) -> np.ndarray | None:
            if options.align == "none" or parent == 0:
                return None
            order = align.align(options.align, layer, parent)
            return None if np.array_equal(order, np.arange(len(order))) else order

        return LayerRecipe(tuple(ExpertRecipe(parent, neurons(parent)) for parent in range(shape.experts)))


def _vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Token id -> token, from tokenizer.json; empty where that file is lacking or holds no table."""
    for companion in checkpoint.companions():
        if companion.name == "tokenizer.json":
            try:
                body = json.loads(companion.read())
                table = body["model"]["vocab"]
                items = table.items() if isinstance(table, dict) else ((entry[0], i) for i, entry in enumerate(table))
                found = {int(index): str(token) for token, index in items}
                return found | {int(entry["id"]): str(entry["content"]) for entry in body.get("added_tokens") or ()}
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise BadInput(f"{checkpoint.ref}: tokenizer.json cannot be read: {error!r}") from error
    return {}
