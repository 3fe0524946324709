"""How a method says what every expert is made of. A method declares recipes; the stage turns them into tensor ops.

Whatever the method, an expert is: some neurons (rows of gate and up, columns of down) of one parent's FFN, multiplied
by scales, perhaps perturbed. A recipe is that sentence with the blanks filled in, so a plain copy becomes a byte-range
copy and everything else one small pure function of one layer's weights.

Shapes: D model width, F dense FFN width, E routed experts, K active per token, W expert width, S shared width, G groups'
granularity (shards one FFN is cut into).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.tensor import TensorInfo

Matrix = Literal["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]
"""What an expert is made of; a plain FFN has no gate, and most have no biases."""
Perturb = Callable[[Matrix, np.ndarray, np.random.Generator], np.ndarray]
"""(which matrix, its float32 values: gate and up [W, D], down [D, W], gate_bias and up_bias [W], however they are stored; a
generator keyed by seed, layer and expert) -> new float32 values of the same shape. The bias of down belongs to no neuron."""


@dataclass(frozen=True)
class MixtureShape:
    """The sizes of every mixture a method builds: known from F and the options alone."""

    experts: int
    top_k: int
    width: int
    """W, width of a routed expert."""
    shared_width: int = 0
    """S, width of the always-active shared expert; 0 for none."""
    tied: int = 1
    """How many consecutive experts share one router row (virtual groups: G). `experts % tied == 0`."""
    routed_scale: float = 1.0
    """a: what the routed sum must be multiplied by for the function to be preserved when top-k weights sum to one."""
    exact: bool = True
    """Whether the method preserves the dense function for every router (given weights that sum to one)."""
    why_inexact: str = ""

    @property
    def rows(self) -> int:
        """Independent router rows: one for each expert, or for each virtual group."""
        return self.experts // self.tied


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert: neurons of a parent's FFN.

    `neurons` is None for all of them in order (then the bytes are copied), else int64 indices [W] into F.
    """

    parent: int = 0
    neurons: np.ndarray | None = None
    scale: dict[Matrix, float] = field(default_factory=dict)
    perturb: Perturb | None = None


@dataclass(frozen=True)
class LayerRecipe:
    """One mixture: its experts in order, its shared expert, and its router when the method decides it."""

    experts: tuple[ExpertRecipe, ...]
    shared: ExpertRecipe | None = None
    router: np.ndarray | None = None
    """[E / tied, D] float32, or None: the stage's `--router-init` makes it. Measured on parent 0's samples, if there are any."""


@dataclass(frozen=True)
class LayerStats:
    """What a calibration pass measured at one layer, on the true router input (see moeforge.model.streaming).

    Fields are None where no method or router asked for them.
    """

    activation: np.ndarray | None = None
    """[F] float64: mean over tokens of |act(gate) * up| (times the norm of the neuron's down column, by the user)."""
    rate: np.ndarray | None = None
    """[F] float64: share of tokens in which the neuron is among the most active 10 %."""
    samples: np.ndarray | None = None
    """[N, D] float32: a deterministic sample of router inputs."""
    labels: np.ndarray | None = None
    """[N] int64: domain of each sample."""
    domain_sums: np.ndarray | None = None
    """[domains, D] float64 sums of router inputs, and with `domain_counts` [domains] their centroids."""
    domain_counts: np.ndarray | None = None
    gram: np.ndarray | None = None
    """[D, D] float64: X'X over all tokens."""
    activations: np.ndarray | None = None
    """[N, F] float32 hidden activations of the samples (for neuron matching and co-activation)."""


@dataclass(frozen=True)
class Layer:
    """What a method may look at when it writes the recipe of one layer."""

    index: int
    model_width: int
    ffn_width: int
    read: Callable[[Matrix, int], np.ndarray]
    """(matrix, parent) -> float32 weights: gate, up [F, D]; down [D, F], however they are stored. Reads from disk each time."""
    rng: Callable[[str], np.random.Generator]
    """A generator keyed by the seed, this layer and the given word: independent of order and threads."""
    stats: tuple[LayerStats | None, ...] = (None,)
    """Calibration results of each parent."""
    scoring: str = "softmax"
    """How the layout scores router logits: `softmax` or `sigmoid`."""
    matrices: tuple[Matrix, ...] = ("gate", "up", "down")
    """Which of these the FFN has, down last."""
    router: Callable[[], np.ndarray] | None = None
    """[E, D] float32 router rows that SRC brings; None where it is dense."""


@dataclass(frozen=True)
class Brought:
    """What SRC brings where it is no dense checkpoint but holds experts and their routers already.

    Attributes:
        parents: one dense checkpoint an expert: SRC as it is where every token visits that one.
        stage: the stage's options as SRC settles them: experts, top_k, layers, norm_topk.
        scoring: how the routers score, `softmax` or `sigmoid`.
        router: layer -> its rows, [E, D] float32.
    """

    parents: tuple[Checkpoint, ...]
    stage: Any
    scoring: str
    router: Callable[[int], np.ndarray]


class UpcycleMethod(Protocol):
    """What `moeforge upcycle --method NAME` needs, beside moeforge.pipeline.stage.Method."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    api_version: ClassVar[int]
    Options: ClassVar[type]

    def shape(self, ffn_width: int, stage: Any, options: Any) -> MixtureShape:
        """Sizes from the stage's options (`experts`, `top_k`, ...) and the method's own.

        Raises:
            UsageProblem: they do not divide, naming the numbers.
        """
        ...

    def needs(self, stage: Any, options: Any) -> frozenset[str]:
        """Names of the LayerStats fields that must be measured first; empty for most methods."""
        ...

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Any) -> LayerRecipe: ...

    # optional: work_bytes(model_width, ffn_width, options) -> bytes that `recipe` holds at once; nothing to speak of without it


class SeveralParents(UpcycleMethod, Protocol):
    """What a method needs besides when its experts come from several checkpoints. SRC is parent 0.

    Such a method counts its experts itself: the stage's `experts` is None where `--experts` is not given.
    """

    def parents(self, options: Any) -> Sequence[str]:
        """Refs of the further parents; they must have SRC's family and sizes."""
        ...

    def check_parents(self, checkpoints: Sequence[Checkpoint], options: Any) -> None:
        """Look at the configs and vocabularies of all parents.

        Raises:
            BadInput: they do not go together.
        """
        ...

    def merge(self, role: str, output: TensorInfo, options: Any) -> Callable[..., np.ndarray] | None:
        """How a tensor outside the mixtures is made from all parents' tensors of that role; None: SRC's is taken."""
        ...


class FromExperts(UpcycleMethod, Protocol):
    """What a method needs besides when SRC holds the experts already."""

    def bring(self, source: Checkpoint, stage: Any, options: Any) -> Brought:
        """What is in SRC, from its headers.

        Raises:
            BadInput: it holds no experts, or such as no mixture of whole FFNs is.
            UsageProblem: the stage's options say otherwise.
        """
        ...


def chosen_neurons(layer: Layer, word: str, count: int) -> np.ndarray:
    """[count] int64, ascending: a random set of the layer's neurons, named by `word`."""
    return np.sort(layer.rng(word).choice(layer.ffn_width, count, replace=False))


def neuron_index(matrix: Matrix, neurons: np.ndarray) -> tuple[slice | np.ndarray, ...]:
    """What selects these neurons in a matrix: rows of gate and up, columns of down."""
    return (slice(None), neurons) if matrix == "down" else (neurons,)
