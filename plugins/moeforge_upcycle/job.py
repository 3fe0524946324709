"""A planned conversion: everything that is decided from configs and headers alone, and the ops that follow from it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeforge.checkpoint.architectures import architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.ops import Input, TensorOp
from moeforge.checkpoint.planned import PlannedCheckpoint
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Problem
from moeforge.pipeline.stage import Bound

from . import layers, own, pairs, router
from .dense import examine, like
from .experts import Blueprint, Parent, cast, zeros
from .options import DTYPES, EXPERTS, Options
from .recipe import Brought, ExpertRecipe, Layer, LayerRecipe, LayerStats, Matrix, MixtureShape
from .targets import Target

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
SCALES: dict[str, dict[Matrix, float]] = {
    "down": {"down": 1.0},
    "split": {"up": 0.5, "down": 0.5},
    "cuberoot": {"gate": 1 / 3, "up": 1 / 3, "down": 1 / 3},
    "routed-factor": {},
}
"""--scale -> the power of the output scale that goes into each matrix."""


@dataclass(frozen=True)
class Job:
    """A planned conversion: everything that `run` needs, decided from headers."""

    options: Options
    method: Bound
    parents: tuple[Parent, ...]
    match: pairs.Match
    shape: MixtureShape
    sparse: tuple[int, ...]
    settings: dict[str, Any]
    config: dict[str, Any]
    factors: dict[Matrix, float]
    passed: Mapping[int | None, Sequence[TensorOp]]
    """Layer, or None for what is in no layer -> ops of everything outside the new mixtures."""
    sources: tuple[Checkpoint, ...]
    """What was opened, SRC first: the parents, unless SRC holds them all."""
    brought: Brought | None = None

    @property
    def target(self) -> Target:
        return self.match.pair.target

    @property
    def predicts(self) -> bool:
        """Whether the model says what comes next; encoders do not."""
        return architecture(self.parents[0].checkpoint.config).kind == "decoder"

    @property
    def dtype(self) -> str | None:
        return DTYPES.get(self.options.dtype)

    def planned_ops(self) -> list[TensorOp]:
        """Every op in output order; those of the mixtures have the right headers but must not be run."""
        return self.in_order({index: self.mixture_ops(index, self._blank()) for index in self.sparse})

    def in_order(self, mixtures: Mapping[int, Sequence[TensorOp]]) -> list[TensorOp]:
        """What is in no layer, then layer by layer: the order in which a source is stored, mostly."""
        made = list(self.passed[None])
        for index in range(self.settings["num_hidden_layers"]):
            made += [*self.passed[index], *mixtures.get(index, ())]
        return made

    def mixture_ops(self, index: int, recipe: LayerRecipe, rows: np.ndarray | None = None) -> list[TensorOp]:
        """The ops of one sparse layer. `rows`: [E / tied, D] router rows, None while planning."""
        target, shape, seed = self.target, self.shape, self.options.seed
        dtype, width = self.dtype or self.parents[0].info("up", index).dtype, self.settings["hidden_size"]

        def at(name: str) -> str:
            return target.at(index, name)

        def stream(label: object) -> Any:
            return lambda expert, matrix: router.keyed(seed, "expert", index, label or expert, matrix)

        plan = Blueprint(self.parents, index, self.dtype, self.factors, stream(None))
        ops = plan.routed(target.experts, recipe.experts, at)
        ops.append(self._router(at(target.router), index, dtype, width, rows))
        for name, extra in target.extras.items():
            sizes = tuple(shape.experts if size == "$experts" else size for size in extra["shape"])
            ops.append(zeros(TensorInfo(at(name), extra["dtype"], sizes)))
        if target.shared is not None and (shape.shared_width or target.shared.required):
            filled = recipe.shared is not None
            weight = 2.0 if target.shared.gate else 1.0  # a gate of zeros weighs sigmoid(0) = 1/2
            shared = recipe.shared or ExpertRecipe(neurons=np.arange(idle_width(target, shape)), scale={"down": 0.0})
            # the routed experts hold the whole bias of down
            scaled: dict[Matrix, float] = {"down": weight, "down_bias": 0.0}
            ops += Blueprint(self.parents, index, self.dtype, scaled, stream("shared")).shared(
                target.shared.tensors, shared, at
            )
            if target.shared.gate is not None:
                gate = TensorInfo(at(target.shared.gate), dtype, (1, width))
                ops.append(zeros(gate) if filled else self._random(gate, index, "shared gate"))
        return ops

    def _router(self, name: str, index: int, dtype: str, width: int, rows: np.ndarray | None) -> TensorOp:
        shape, options = self.shape, self.options

        def compute() -> np.ndarray:
            assert rows is not None, "planned only"
            full = router.expand(rows, shape.tied, options.untie, router.keyed(options.seed, "untie", index))
            return cast(full, dtype, name)

        return TensorOp(
            (TensorInfo(name, dtype, (shape.experts, width)),), (), compute, f"router: {options.router_init}"
        )

    def _random(self, output: TensorInfo, index: int, word: str) -> TensorOp:
        def compute() -> np.ndarray:
            rows, width = output.shape
            stream = router.keyed(self.options.seed, word, index)
            return cast(router.random_rows(rows, width, self.options.router_std, stream), output.dtype, output.name)

        return TensorOp((output,), (), compute, word)

    def _blank(self) -> LayerRecipe:
        """A recipe of the right sizes, to plan with before any method has looked at the weights."""
        width, shared = self.shape.width, self.shape.shared_width
        neurons = None if width == self.settings["intermediate_size"] else np.arange(width)
        return LayerRecipe(
            (ExpertRecipe(neurons=neurons),) * self.shape.experts,
            ExpertRecipe(neurons=np.arange(shared)) if shared else None,
        )

    def layer(self, index: int, stats: tuple[LayerStats | None, ...]) -> Layer:
        """What a method sees of a layer."""
        return Layer(
            index=index,
            model_width=self.settings["hidden_size"],
            ffn_width=self.settings["intermediate_size"],
            read=lambda matrix, parent: self.parents[parent].read(matrix, index).astype(np.float32),
            rng=lambda word: router.keyed(self.options.seed, "layer", index, word),
            stats=stats,
            scoring=self.target.scoring,
            matrices=tuple(matrix for matrix in self.parents[0].matrices if not matrix.endswith("_bias")),
            router=None if self.brought is None else functools.partial(self.brought.router, index),
        )


def idle_width(target: Target, shape: MixtureShape) -> int:
    """Width of the shared expert: the method's, or that of a silent one where the layout insists on having it."""
    if shape.shared_width or target.shared is None or not target.shared.required:
        return shape.shared_width
    return shape.width if target.shared.multiple else min(shape.width, 128)


def prepare(checkpoints: Sequence[Checkpoint], method: Bound, options: Options) -> Job:
    """Decide everything that headers decide.

    Args:
        checkpoints: the dense source, then further parents of the experts (same family and sizes).

    Raises:
        BadInput: the source cannot become a mixture exactly, or its tensors and config disagree.
        UsageProblem: the options do not fit each other or the model.
    """
    brought = _brought(checkpoints[0], method, options)
    dense = checkpoints if brought is None else brought.parents
    options = options if brought is None else brought.stage
    family, settings, parent = examine(dense[0])
    parents = (parent, *(like(checkpoint, family, settings) for checkpoint in dense[1:]))
    if len(checkpoints) > 1:
        method.method.check_parents(checkpoints, method.options)
    if options.experts is None and not hasattr(method.method, "parents"):
        options = replace(options, experts=EXPERTS)
    shape = method.method.shape(settings["intermediate_size"], options, method.options)
    sparse = layers.select(options.layers, settings["num_hidden_layers"])

    def fits(target: Target) -> Problem | None:
        if brought is not None and target.scoring != brought.scoring:
            return Problem("router.score", brought.scoring, f"{target.model_type} scores experts by {target.scoring}")
        return unfit(target, shape, sparse, settings["num_hidden_layers"], options)

    match = pairs.choose(
        family.model_type,
        settings,
        options.target,
        fits=fits,
        is_zero=lambda roles: all(_zero(p, roles) for p in parents),
        ours=own.pair(family, settings, parent),
        allow_inexact=options.allow_inexact,
    )
    target = match.pair.target
    # experts that were trained under their router count as they did there
    as_one = options.norm_topk or brought is not None
    weights_sum = 1.0 if as_one else shape.top_k * (target.zero_router_weight or 1 / shape.experts)
    scale = shape.routed_scale / weights_sum
    in_config = options.scale == "routed-factor"
    values = {
        "experts": shape.experts,
        "top_k": shape.top_k,
        "width": shape.width,
        "shared_width": idle_width(target, shape),
        "shared_count": idle_width(target, shape) // shape.width,
        "shared_is_silent": not shape.shared_width,
        "ffn_width": settings["intermediate_size"],
        "routed_factor": scale if in_config else 1.0,
        "norm_topk": options.norm_topk,
        "router_std": options.router_std,
        "dtype": _config_dtype(options, parent),
        "attention_scale": settings["head_dim"] ** -0.5,
        "default_head_dim": settings["hidden_size"] // settings["num_attention_heads"],
        "window": settings.get("sliding_window") if "sliding_attention" in settings["layer_types"] else None,
        **layers.settings(sparse, settings["num_hidden_layers"]),
    }
    if target.model_type == own.NAME:
        config = own.config(family, dense[0].config, settings, values, parent.matrices, sparse)
    else:
        config = pairs.output_config(match.pair, settings, values)
    return Job(
        options=options,
        method=method,
        parents=parents,
        match=match,
        shape=shape,
        sparse=sparse,
        settings={**settings, **values},
        config=config,
        factors=_factors(options, scale, weights_sum),
        passed=_passed(parents, match, sparse, DTYPES.get(options.dtype), method),
        sources=tuple(checkpoints),
        brought=brought,
    )


def _brought(source: Checkpoint, method: Bound, options: Options) -> Brought | None:
    """What SRC holds beside a dense model, for a method that takes it; None for the others.

    Raises:
        BadInput: the method takes dense checkpoints, and SRC is an adapter of LoRA experts.
    """
    if hasattr(method.method, "bring"):
        return method.method.bring(source, options, method.options)
    if isinstance(source, ExpertAdapter):
        raise BadInput(f"{source.ref}: an adapter of LoRA experts, and --method {method.name} takes dense checkpoints; --method lora makes "
                       "whole experts of these")  # fmt: skip
    return None


def _factors(options: Options, scale: float, weights_sum: float) -> dict[Matrix, float]:
    """What each matrix is multiplied by, so that the routed sum is `scale` times what it was.

    The bias of down belongs to no neuron: every expert has all of it, times what makes its weighted sum come out as one.
    """
    bias = 1 / (weights_sum * (scale if options.scale == "routed-factor" else 1.0))
    made: dict[Matrix, float] = {matrix: scale**power for matrix, power in SCALES[options.scale].items()}
    made["down_bias"] = bias
    return {matrix: factor for matrix, factor in made.items() if factor != 1}


def unfit(target: Target, shape: MixtureShape, sparse: Sequence[int], count: int, options: Options) -> Problem | None:
    """What the request asks of a layout that it lacks; None when it has everything."""
    name = target.model_type
    reason = layers.why_not(target.sparse, sparse, count)
    if reason is not None:
        return Problem("layers", options.layers, f"{name} cannot have just these layers sparse: {reason}")
    if shape.shared_width and target.shared is None:
        return Problem("shared_width", shape.shared_width, f"{name} has no shared expert")
    if target.shared is not None and target.shared.multiple and shape.shared_width % shape.width:
        return Problem("shared_width", shape.shared_width, f"{name} needs a multiple of the expert width {shape.width}")
    if options.scale == "routed-factor" and target.routed_factor is None:
        return Problem("scale", options.scale, f"{name} has no factor on the routed sum; use --scale down")
    if not options.norm_topk and target.renormalises is True:
        return Problem("norm_topk", False, f"{name} always makes the top-k weights sum to one")
    return None


def _zero(parent: Parent, roles: Collection[str]) -> bool:
    """Whether the tensors of these roles are all zero. Biases are small: reading them is cheap."""
    found = [key for key in parent.parts if key[0] in roles]
    if isinstance(parent.checkpoint, PlannedCheckpoint):
        return False
    return bool(found) and not any(parent.read(role, layer).any() for role, layer in found)


def _config_dtype(options: Options, parent: Parent) -> str:
    return CONFIG_DTYPES[DTYPES.get(options.dtype) or parent.info("up", 0).dtype]


def _passed(
    parents: Sequence[Parent], match: pairs.Match, sparse: Sequence[int], dtype: str | None, method: Bound
) -> dict[int | None, list[TensorOp]]:
    """Ops of all tensors that do not become experts: embeddings, norms, attention, and the FFN of layers that stay dense.

    Raises:
        BadInput: a tensor has no home in the target.
    """
    target, first = match.pair.target, parents[0]
    moved = target.matrices
    made: dict[int | None, list[TensorOp]] = defaultdict(list)
    whole: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for (role, layer), part in first.parts.items():
        if (role in moved and layer in sparse) or role in match.dropped:
            continue
        if target.keeps_names:
            whole[part.called].append((role, layer))
            continue
        if role in moved and layer is not None:
            name = target.at(layer, target.dense_ffn[role])
        else:
            name = target.name(role, layer)
        if name is None:
            raise BadInput(f"{first.checkpoint.ref}: {part.name} would be lost: {target.model_type} has no home for it")
        made[layer].append(_pass(parents, [(role, layer)], name, dtype, method))
    for name, roles in whole.items():
        made[roles[0][1]].append(_pass(parents, roles, name, dtype, method))
    return made


def _pass(
    parents: Sequence[Parent], roles: Sequence[tuple[str, int | None]], name: str, dtype: str | None, method: Bound
) -> TensorOp:
    """One tensor of some roles that lie one after the other in each parent, as it is or merged over the parents."""
    first = parents[0].info(*roles[0])
    rows = [parents[0].info(*role).shape[0] for role in roles]
    output = TensorInfo(name, dtype or first.dtype, (sum(rows), *first.shape[1:]) if len(roles) > 1 else first.shape)
    merge = getattr(method.method, "merge", lambda *_: None)
    merges = [
        merge(role, replace(output, shape=parents[0].info(role, layer).shape), method.options) for role, layer in roles
    ]
    if any(found is not None for found in merges):
        inputs = tuple(parent.input(*role) for role in roles for parent in parents)

        def compute(*arrays: np.ndarray) -> np.ndarray:
            made = []
            for index, found in enumerate(merges):
                own = arrays[index * len(parents) : (index + 1) * len(parents)]
                made.append(cast(own[0], output.dtype, name) if found is None else found(*own))
            return made[0] if len(made) == 1 else np.concatenate(made)

        return TensorOp((output,), inputs, compute, "merged")
    whole = (parents[0].input(*roles[0]),) if len(roles) == 1 else (Input(parents[0].checkpoint, first.name),)
    if output.dtype == first.dtype:
        return TensorOp((output,), whole)
    return TensorOp((output,), whole, lambda stored: cast(stored, output.dtype, name), f"as {output.dtype}")
