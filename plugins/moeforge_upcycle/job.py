"""A planned conversion: everything that is decided from configs and headers alone, and the ops that follow from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeforge.checkpoint.architectures import architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.family import Architecture, Part
from moeforge.checkpoint.ops import Input, TensorOp
from moeforge.checkpoint.planned import PlannedCheckpoint
from moeforge.checkpoint.tensor import FLOATS, TensorInfo
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Problem
from moeforge.pipeline.stage import Bound

from . import layers, own, pairs, router
from .experts import Blueprint, Parent, cast, zeros
from .options import EXPERTS, Options
from .recipe import ExpertRecipe, Layer, LayerRecipe, LayerStats, Matrix, MixtureShape
from .targets import Target

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
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
    family, settings, parent = examine(checkpoints[0])
    parents = (parent, *(_like(checkpoint, family, settings) for checkpoint in checkpoints[1:]))
    if len(parents) > 1:
        method.method.check_parents(checkpoints, method.options)
    if options.experts is None and not hasattr(method.method, "parents"):
        options = replace(options, experts=EXPERTS)
    shape = method.method.shape(settings["intermediate_size"], options, method.options)
    sparse = layers.select(options.layers, settings["num_hidden_layers"])

    def fits(target: Target) -> Problem | None:
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
    weights_sum = 1.0 if options.norm_topk else shape.top_k * (target.zero_router_weight or 1 / shape.experts)
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
        config = own.config(family, checkpoints[0].config, settings, values, parent.matrices, sparse)
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
    )


def _factors(options: Options, scale: float, weights_sum: float) -> dict[Matrix, float]:
    """What each matrix is multiplied by, so that the routed sum is `scale` times what it was.

    The bias of down belongs to no neuron: every expert has all of it, times what makes its weighted sum come out as one.
    """
    bias = 1 / (weights_sum * (scale if options.scale == "routed-factor" else 1.0))
    made: dict[Matrix, float] = {matrix: scale**power for matrix, power in SCALES[options.scale].items()}
    made["down_bias"] = bias
    return {matrix: factor for matrix, factor in made.items() if factor != 1}


def examine(checkpoint: Checkpoint) -> tuple[Architecture, dict[str, Any], Parent]:
    """The family of a dense checkpoint, its resolved config, and where its roles lie.

    Raises:
        BadInput: a tensor is missing, is not a float, or is not accounted for by the config.
    """
    try:
        family = architecture(checkpoint.config).of_class(checkpoint.config)
    except BadInput as error:
        raise BadInput(f"{checkpoint.ref}: {error}") from None
    settings = family.resolve(checkpoint.config)
    located = family.locate(settings)
    wanted = {part.name for part in located.values()}
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        if not family.is_ignored(name) and (twice := stored.setdefault(family.called(name, wanted), name)) != name:
            raise BadInput(
                f"{checkpoint.ref}: {name} and {twice} are one tensor of a {family.model_type} model; remove one"
            )
    missing = sorted(wanted - set(stored))
    if missing:
        raise BadInput(f"{checkpoint.ref}: a {family.model_type} model of this config has {missing[0]}"
                       f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}, the files do not")  # fmt: skip
    parts = {role: replace(part, name=stored[part.name]) for role, part in located.items()}
    tied = {family.tensors.get("head")} if settings.get("tie_word_embeddings") else set()
    extra = {name: found for name, found in stored.items() if name not in wanted | tied}
    # a head's tensors have no role of their own but their name
    parts |= {(name, None): Part(found, called=name) for name, found in extra.items() if family.belongs(name)}
    left = [found for name, found in extra.items() if not family.belongs(name)]
    lost = [name for name in left if not family.is_another_head(name)]
    if lost:
        raise BadInput(f"{checkpoint.ref}: {lost[0]}{f' and {len(lost) - 1} more tensors' if len(lost) > 1 else ''} "
                       f"would be lost: a {family.model_type} model of this config has no such tensor")  # fmt: skip
    for part in parts.values():
        if checkpoint.tensors[part.name].dtype not in FLOATS:
            raise BadInput(f"{checkpoint.ref}: {part.name} has dtype {checkpoint.tensors[part.name].dtype}; "
                           "a quantised source needs --dequantize")  # fmt: skip
    _check_shapes(checkpoint, parts, settings)
    return family, settings, Parent(checkpoint, parts, tuple(left))


def _check_shapes(
    checkpoint: Checkpoint, parts: Mapping[tuple[str, int | None], Part], settings: Mapping[str, Any]
) -> None:
    """Every tensor has the sizes that the config gives its role.

    Raises:
        BadInput: naming the tensor, both shapes, and the config keys that decide.
    """
    tensors: dict[str, dict[str, Part]] = defaultdict(dict)
    for (role, _), part in parts.items():
        tensors[part.name][role] = part
    for name, roles in tensors.items():
        found, (first, *_) = checkpoint.tensors[name].shape, roles.values()
        if first.shape is None:
            continue
        rows = sum(part.shape[0] for part in roles.values() if part.shape)
        wanted = first.shape if first.rows is None else (rows, *first.shape[1:])
        if found != wanted:
            keys = dict.fromkeys(key for part in roles.values() for key in part.keys)
            said = ", ".join(f"{key} = {settings[key]}" for key in keys)
            raise BadInput(f"{checkpoint.ref}: {name} has shape {list(found)}, which does not hold {' and '.join(roles)} "
                           f"of shape {list(wanted)} ({said})")  # fmt: skip


def _like(checkpoint: Checkpoint, family: Architecture, settings: dict[str, Any]) -> Parent:
    """A further parent, which must have the family and sizes of the first."""
    other, found, parent = examine(checkpoint)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        if found[key] != settings[key]:
            raise BadInput(f"{checkpoint.ref}: {key} = {found[key]}, the first parent has {settings[key]}")
    if other.model_type != family.model_type:
        raise BadInput(
            f"{checkpoint.ref}: model_type = {other.model_type!r}, the first parent is {family.model_type!r}"
        )
    return parent


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
