"""From recipes to tensor operations: what an expert is made of becomes which bytes go where.

A copy stays a byte-range copy to all experts at once; anything else is one small pure function of one source matrix.
Shapes: gate and up [W, D], down [D, W]; their biases [W], [W], [D]. Where a family stores matrices [in, out], its experts do too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.family import FFN, FFN_BIASES, Part
from moeforge.checkpoint.ops import Input, TensorOp
from moeforge.checkpoint.tensor import NUMPY_DTYPES, TensorInfo
from moeforge.errors import MoeforgeError

from .recipe import ExpertRecipe, Matrix
from .targets import Slot

Stream = Callable[[int, Matrix], np.random.Generator]
"""(expert, matrix) -> the random stream of its perturbation."""


@dataclass(frozen=True)
class Parent:
    """A dense checkpoint whose roles have been located."""

    checkpoint: Checkpoint
    parts: Mapping[tuple[str, int | None], Part]
    left_out: tuple[str, ...] = ()
    """Tensors of heads that the model at hand does not have."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What its feed-forward networks are made of; down is the last matrix."""
        return tuple(role for role in (*FFN, *FFN_BIASES) if (role, 0) in self.parts)

    def input(self, role: str, layer: int | None, rows: slice | None = None) -> Input:
        """The role's weights, or rows of them."""
        part = self.parts[role, layer]
        if part.rows is not None:
            start = part.rows.start
            rows = part.rows if rows is None else slice(start + rows.start, start + rows.stop)
        return Input(self.checkpoint, part.name, rows)

    def info(self, role: str, layer: int | None) -> TensorInfo:
        """dtype and shape of the role's weights, under the name of the tensor that holds them."""
        part = self.parts[role, layer]
        whole = self.checkpoint.tensors[part.name]
        if part.rows is None:
            return whole
        return TensorInfo(part.name, whole.dtype, (part.rows.stop - part.rows.start, *whole.shape[1:]))

    def read(self, role: str, layer: int | None) -> np.ndarray:
        """The role's weights in their own dtype, a matrix as [out, in]."""
        part = self.parts[role, layer]
        found = self.checkpoint.read(part.name, part.rows)
        return found.T if part.transposed else found


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`values` in the safetensors dtype `dtype`.

    Raises:
        MoeforgeError: a value is infinite or not a number, or becomes so (float16 ends at 65504).
    """
    wanted = NUMPY_DTYPES[dtype]
    with np.errstate(over="ignore"):
        result = values.astype(wanted, copy=False)
    finite = np.isfinite(result)
    if not finite.all():
        bad = values[~finite].astype(np.float64)
        if not np.isfinite(bad).all():
            raise MoeforgeError(
                f"{name}: {len(bad)} of {values.size} values are infinite or not a number; the source or an option is broken"
            )
        raise MoeforgeError(f"{name}: {np.abs(bad).max():.4g} does not fit {wanted}; use --dtype bf16 or f32")
    return result


@dataclass(frozen=True)
class Blueprint:
    """Everything that the experts of one layer share: where they come from and how they are written."""

    parents: Sequence[Parent]
    layer: int
    dtype: str | None
    """Output dtype; None keeps the first parent's, in which experts of all parents are written."""
    factors: Mapping[Matrix, float]
    """The output scale, distributed over the matrices."""
    stream: Stream

    def routed(
        self, slots: Sequence[Slot], recipes: Sequence[ExpertRecipe], at: Callable[[str], str]
    ) -> list[TensorOp]:
        """The ops that write the routed experts; `at` turns a slot's name into a full name."""
        made = []
        for slot in slots:
            if slot.stacked:
                made.append(self._joined(slot, [at(slot.name)], recipes, stack=True))
                continue
            names = [at(slot.name.format(expert=e)) for e in range(len(recipes))]
            made += self._written(slot, names, recipes)
        return made

    def shared(self, slots: Sequence[Slot], recipe: ExpertRecipe, at: Callable[[str], str]) -> list[TensorOp]:
        """The ops that write the one shared expert."""
        return [op for slot in slots for op in self._written(slot, [at(slot.name)], [recipe])]

    def _written(self, slot: Slot, names: Sequence[str], recipes: Sequence[ExpertRecipe]) -> list[TensorOp]:
        """One tensor an expert, of one matrix or of several."""
        if len(slot.of) == 1:
            return self._separate(slot.of[0], names, recipes)
        return self._fused(slot, names, recipes)

    def _make(self, matrix: Matrix, expert: int, recipe: ExpertRecipe, stored: np.ndarray, dtype: str) -> np.ndarray:
        """One matrix of one expert from the parent's matrix: take neurons, perturb, scale, round once."""
        values, axis = stored, self._axis(matrix)
        if recipe.neurons is not None and axis is not None:
            values = np.take(stored, recipe.neurons, axis=axis)
        factor = self._factor(matrix, recipe)
        part = self.parents[recipe.parent].parts[matrix, self.layer]
        # what overflows is refused by `cast`, which knows the tensor
        with np.errstate(over="ignore", invalid="ignore"):
            if recipe.perturb is not None and axis is not None:
                values = values.astype(np.float32)
                turned = recipe.perturb(matrix, values.T if part.transposed else values, self.stream(expert, matrix))
                values = turned.T if part.transposed else turned
            if factor != 1:
                values = values.astype(np.float32) * np.float32(factor)
        return np.ascontiguousarray(cast(values, dtype, f"expert {expert} from {part.name}"))

    def _axis(self, matrix: Matrix) -> int | None:
        """The axis of the neurons as stored; None for the bias of down, which belongs to no neuron."""
        if matrix == "down_bias":
            return None
        return int((matrix == "down") is not self.parents[0].parts[matrix, self.layer].transposed)

    def _factor(self, matrix: Matrix, recipe: ExpertRecipe) -> float:
        if matrix == "down_bias":
            return self.factors.get(matrix, 1.0)
        own: dict[Matrix, Matrix] = {"gate_bias": "gate", "up_bias": "up"}  # a bias is scaled as its matrix is
        of = own.get(matrix, matrix)
        return self.factors.get(of, 1.0) * recipe.scale.get(of, 1.0)

    def _info(self, name: str, matrix: Matrix, recipe: ExpertRecipe) -> TensorInfo:
        source, axis = self.parents[0].info(matrix, self.layer), self._axis(matrix)
        shape = list(source.shape)
        if recipe.neurons is not None and axis is not None:
            shape[axis] = len(recipe.neurons)
        return TensorInfo(name, self.dtype or source.dtype, tuple(shape))

    def _separate(self, matrix: Matrix, names: Sequence[str], recipes: Sequence[ExpertRecipe]) -> list[TensorOp]:
        """One tensor an expert. Experts that are equal are made once; those cut from one parent share one reading."""
        made: list[TensorOp] = []
        cut: dict[int, list[list[int]]] = {}
        for experts in self._equal((matrix,), recipes):
            recipe = recipes[experts[0]]
            if self._perturbed(matrix, recipe):
                made.append(self._computed(matrix, names, recipes, [experts]))
            elif self._factor(matrix, recipe) == 0:
                made.append(zeros(*(self._info(names[e], matrix, recipes[e]) for e in experts)))
            elif (rows := self._range(matrix, recipe)) is not None:
                made.append(self._ranged(matrix, names, recipes, experts, rows))
            else:
                cut.setdefault(recipe.parent, []).append(experts)
        return made + [self._computed(matrix, names, recipes, groups) for groups in cut.values()]

    def _equal(self, matrices: Sequence[Matrix], recipes: Sequence[ExpertRecipe]) -> list[list[int]]:
        """The experts in groups that hold the same values in these matrices."""
        groups: dict[tuple, list[int]] = {}
        for expert, recipe in enumerate(recipes):
            cut = recipe.neurons is not None and any(self._axis(matrix) is not None for matrix in matrices)
            alone = expert if any(self._perturbed(matrix, recipe) for matrix in matrices) else None
            neurons = recipe.neurons.tobytes() if cut and recipe.neurons is not None else None
            factors = tuple(self._factor(matrix, recipe) for matrix in matrices)
            groups.setdefault((recipe.parent, neurons, factors, alone), []).append(expert)
        return list(groups.values())

    def _perturbed(self, matrix: Matrix, recipe: ExpertRecipe) -> bool:
        return recipe.perturb is not None and self._axis(matrix) is not None

    def _range(self, matrix: Matrix, recipe: ExpertRecipe) -> slice | None:
        """The contiguous rows that a recipe takes; None when it takes columns or scattered rows."""
        neurons, axis = recipe.neurons, self._axis(matrix)
        if neurons is None or axis is None:
            return slice(0, self.parents[recipe.parent].info(matrix, self.layer).shape[0])
        if axis == 0 and np.array_equal(neurons, np.arange(neurons[0], neurons[0] + len(neurons))):
            return slice(int(neurons[0]), int(neurons[0]) + len(neurons))
        return None

    def _ranged(self, matrix: Matrix, names: Sequence[str], recipes: Sequence[ExpertRecipe], experts: Sequence[int],
                rows: slice) -> TensorOp:  # fmt: skip
        """The same rows to all of `experts`, unchanged or scaled."""
        recipe = recipes[experts[0]]
        parent = self.parents[recipe.parent]
        source = parent.info(matrix, self.layer)
        outputs = tuple(self._info(names[e], matrix, recipe) for e in experts)
        whole = rows.stop - rows.start == source.shape[0]
        inputs = (parent.input(matrix, self.layer, None if whole else rows),)
        factor, dtype = self._factor(matrix, recipe), outputs[0].dtype
        note = f"{'copied' if whole else f'rows {rows.start}..{rows.stop} copied'} to {len(experts)} experts"
        if factor == 1 and dtype == source.dtype:
            return TensorOp(outputs, inputs, note=note)
        bare = ExpertRecipe(recipe.parent, scale=recipe.scale)
        return TensorOp(outputs, inputs, lambda stored: self._make(matrix, experts[0], bare, stored, dtype),
                        f"{note}, times {factor:g} as {dtype}")  # fmt: skip

    def _computed(self, matrix: Matrix, names: Sequence[str], recipes: Sequence[ExpertRecipe],
                  groups: Sequence[Sequence[int]]) -> TensorOp:  # fmt: skip
        """Groups of equal experts, each made once, from one reading of their parent's matrix."""
        experts = [expert for group in groups for expert in group]
        first = recipes[experts[0]]
        outputs = tuple(self._info(names[e], matrix, recipes[e]) for e in experts)
        dtype = outputs[0].dtype

        def compute(stored: np.ndarray) -> list[np.ndarray]:
            made = []
            for group in groups:
                made += [self._make(matrix, group[0], recipes[group[0]], stored, dtype)] * len(group)
            return made

        note = "perturbed copy" if first.perturb is not None else f"{len(groups)} cuts to {len(experts)} experts"
        return TensorOp(outputs, (self.parents[first.parent].input(matrix, self.layer),), compute, note)

    def _fused(self, slot: Slot, names: Sequence[str], recipes: Sequence[ExpertRecipe]) -> list[TensorOp]:
        """Several matrices of an expert in one tensor each; experts that are equal are made once."""
        made = []
        for experts in self._equal(slot.of, recipes):
            own = [names[expert] for expert in experts]
            made.append(
                self._whole(slot, own, recipes[experts[0]])
                or self._joined(slot, own, [recipes[experts[0]]], first=experts[0])
            )
        return made

    def _whole(self, slot: Slot, names: Sequence[str], recipe: ExpertRecipe) -> TensorOp | None:
        """A copy of the source's own fused tensor, where that is what the expert holds."""
        parent = self.parents[recipe.parent]
        parts = [parent.parts[matrix, self.layer] for matrix in slot.of]
        source = parent.checkpoint.tensors[parts[0].name]
        same = len({part.name for part in parts}) == 1 and source.shape[0] == sum(
            p.rows.stop - p.rows.start for p in parts if p.rows
        )
        changed = (
            recipe.neurons is not None
            or recipe.perturb is not None
            or any(self._factor(m, recipe) != 1 for m in slot.of)
        )
        dtype = self.dtype or self.parents[0].info(slot.of[0], self.layer).dtype
        if not same or changed or dtype != source.dtype:
            return None
        outputs = tuple(TensorInfo(name, dtype, source.shape) for name in names)
        return TensorOp(outputs, (Input(parent.checkpoint, source.name),), note=f"copied to {len(names)} experts")

    def _joined(self, slot: Slot, names: Sequence[str], recipes: Sequence[ExpertRecipe], *, stack: bool = False,
                first: int = 0) -> TensorOp:  # fmt: skip
        """All experts in one tensor [E, rows, columns], or the several matrices of one expert (number `first`, and those equal to
        it) in one [rows, columns] each."""
        sources = list(dict.fromkeys((recipe.parent, matrix) for recipe in recipes for matrix in slot.of))
        inputs = tuple(self.parents[parent].input(matrix, self.layer) for parent, matrix in sources)
        infos = [self._info(names[0], matrix, recipes[0]) for matrix in slot.of]
        shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
        if stack:
            shape = (len(recipes), *shape)
        outputs = tuple(TensorInfo(name, infos[0].dtype, shape) for name in names)
        dtype = infos[0].dtype

        def compute(*arrays: np.ndarray) -> np.ndarray:
            stored = dict(zip(sources, arrays, strict=True))
            made = np.empty(shape, NUMPY_DTYPES[dtype])
            for expert, recipe in enumerate(recipes):
                place = made[expert] if stack else made
                row = 0
                for matrix in slot.of:
                    part = self._make(matrix, first + expert, recipe, stored[recipe.parent, matrix], dtype)
                    place[row : row + len(part)] = part
                    row += len(part)
            return made

        return TensorOp(
            outputs, inputs, compute, f"{len(recipes)} experts in one tensor" if stack else "matrices in one tensor"
        )


def zeros(*outputs: TensorInfo) -> TensorOp:
    """Equal tensors of zeros."""
    first = outputs[0]
    return TensorOp(outputs, (), lambda: np.zeros(first.shape, NUMPY_DTYPES[first.dtype]), "zeros")
