"""Is it the same function? Two checkpoints run side by side in float32, from their files, one layer at a time.

Language models on token ids, encoders on padded ids or pixels (moeforge.model.encoders)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.base import Checkpoint
from ..errors import BadInput
from .comparison import Comparison, worst

if TYPE_CHECKING:
    import torch

    from ..pipeline.context import Context
    from .streaming import State, StreamedModel

THRESHOLD = 1e-5
"""Relative logit error below which two float32 models count as one function (rounding alone gives about 4e-7)."""
ROUNDING_DRAWS = 3
TOKENS = 256
HEAD = 32
"""Tokens of which the second model's logits are held at once: its head is run that often less."""
POSITIONS = 8
"""Tokens of which both models' distributions are held in float64 at once."""
LONGEST = 4096
"""A sliding window up to this long is exceeded by one sequence of the test tokens, so that dropping it shows."""


@dataclass(frozen=True)
class LayerProof:
    """How far layer `index` of the two models agrees."""

    index: int
    sparse: bool
    """Whether the second model has experts here."""
    error: float
    """max|h' - h| / max|h| of the hidden states after the layer, with everything before it included."""
    local_error: float
    """max|y' - y| / max|y| of the feed-forward block alone, both given the first model's input to it."""
    finite: bool
    """Whether everything that went into the two errors is a finite number."""


@dataclass(frozen=True)
class Proof:
    """The outcome of :func:`prove`.

    Attributes:
        exact: relative error within the threshold, every block's own error within it, argmax equal on every token, every
            number finite. A relative error above the threshold still passes when `rounding` is as large.
        relative_error: max|dlogit| / max|logit|.
        rounding: the same for the reference against itself, see :func:`rounding_error`; None when it was not needed.
        argmax_equal: share of tokens on which both models prefer the same next token.
        kl, kl_max: mean and largest KL(first || second) per token, in nats.
        text_kl: mean KL over the tokens of real text alone; None without text.
        cross_entropy: mean next-token loss of (first, second) on the real text, in nats; None without text.
        tokens: number of tokens compared; of sequences or images, where a head judges those.
        compared: `logits`, or `hidden states` of a model without a head.
        finite: whether both models gave finite numbers everywhere: in every layer and in every logit.
    """

    exact: bool
    finite: bool
    relative_error: float
    rounding: float | None
    argmax_equal: float
    kl: float
    kl_max: float
    text_kl: float | None
    cross_entropy: tuple[float, float] | None
    tokens: int
    threshold: float
    dtype: str
    seed: int
    layers: tuple[LayerProof, ...]
    seconds: float
    compared: str = "logits"

    @property
    def first_wrong(self) -> LayerProof | None:
        """The first layer whose block or output differs by more than the threshold, if any."""
        for layer in self.layers:
            if not (layer.error <= self.threshold and layer.local_error <= self.threshold):
                return layer
        return None

    def as_json(self) -> dict[str, Any]:
        """For the manifest; numbers that are not finite become None, as JSON has none."""
        return _finite(asdict(self))

    def summary(self) -> str:
        """One line for people."""
        if not self.finite:
            where = next(
                (f"first in layer {layer.index}" for layer in self.layers if not layer.finite),
                f"in the {self.compared}",
            )
            return f"not a function: infinities or NaN, {where}, on {self.tokens} tokens"
        if self.exact:
            rounding = "" if self.rounding is None else f" (rounding alone gives this model {self.rounding:.1e})"
            if self.compared != "logits":
                return f"same function: relative error {self.relative_error:.1e} of {self.tokens} {self.compared}"
            return (
                f"same function: relative error {self.relative_error:.1e}{rounding}, argmax equal on {self.tokens} of "
                f"{self.tokens} tokens, KL {self.kl:.1e}"
            )
        wrong = self.first_wrong
        where = (
            f"; first differing layer {wrong.index} (block {wrong.local_error:.1e}, hidden states {wrong.error:.1e})"
            if wrong
            else ""
        )
        if self.compared != "logits":
            return (
                f"not the same function: relative error {self.relative_error:.1e} (allowed {self.threshold:.0e}) of "
                f"{self.tokens} {self.compared}{where}"
            )
        return (
            f"not the same function: relative error {self.relative_error:.1e} (allowed {self.threshold:.0e}), argmax equal "
            f"on {self.argmax_equal:.1%} of {self.tokens} tokens, KL {self.kl:.1e}{where}"
        )


def prove(
    first: Checkpoint,
    second: Checkpoint | Path | str,
    *,
    threshold: float = THRESHOLD,
    tokens: int = TOKENS,
    seed: int = 0,
    text: Sequence[Sequence[int]] = (),
    dtype: str = "float32",
    ctx: Context | None = None,
) -> Proof:
    """Compare two models layer by layer and at what comes out.

    Args:
        first: the reference, usually the dense source.
        second: what should be the same function; a directory is opened and closed here.
        threshold: allowed max|dlogit| / max|logit|.
        tokens: number of random token ids, in two sequences; more when a sliding window has to be exceeded.
        seed: of the random ids.
        text: token ids of real text, one sequence each; language models only.
        dtype: float32 proves; bfloat16 shows the rounding of the stored type.
        ctx: for progress and interruption.

    Raises:
        BadInput: one of the two cannot be run, or their depths differ.
    """
    if not isinstance(second, Checkpoint):
        from ..checkpoint import open_checkpoint

        with open_checkpoint(str(second)) as opened:
            return prove(first, opened, threshold=threshold, tokens=tokens, seed=seed, text=text, dtype=dtype, ctx=ctx)

    from moeforge_kernels.dispatch import using

    # what is proven is the checkpoint: the reference rounds the same on every machine, a fast kernel need not
    with using("reference"):
        return _prove(first, second, threshold, tokens, seed, text, dtype, ctx)


def _prove(first: Checkpoint, second: Checkpoint, threshold: float, tokens: int, seed: int, text: Sequence[Sequence[int]], dtype: str,
           ctx: Context | None) -> Proof:  # fmt: skip
    from . import encoders
    from .streaming import StreamedModel
    from .weights import torch_dtype

    began = time.perf_counter()
    models = [StreamedModel(checkpoint, dtype=torch_dtype(dtype)) for checkpoint in (first, second)]
    if models[0].depth != models[1].depth:
        raise BadInput(
            f"{first.ref} has {models[0].depth} layers, {second.ref} has {models[1].depth}: they cannot be the same function"
        )
    writes = models[0].module.can_generate()
    if writes:
        batches = token_batches(first.config, models[0].module.config.get_text_config().vocab_size, tokens, seed, text)
    else:
        batches, text = encoders.batches(models[0], seed), ()
    states = [model.start(batches) for model in models]
    layers = []
    for index in range(models[0].depth):
        if ctx is not None:
            ctx.check()
        layers.append(_compare_layer(index, models, states))
    compare = _compare_logits if writes else encoders.compare
    apart = [
        compare(models, a, b, text=i >= len(batches) - len(text)) for i, (a, b) in enumerate(zip(*states, strict=True))
    ]
    logits, on_text = Comparison.joined(apart), Comparison.joined(apart[len(batches) - len(text) :])
    error = logits.relative_error
    blocks = all(layer.local_error <= threshold and math.isfinite(layer.error) for layer in layers)
    finite = logits.finite and all(layer.finite for layer in layers)
    exact = blocks and math.isfinite(error) and logits.agreed == logits.tokens
    rounding = None
    if exact and error > threshold and writes:
        # only the sequences in question are run again
        suspects = [s for s, part in zip(states[0], apart, strict=True) if part.difference > threshold * logits.scale]
        rounding = rounding_error(models[0], suspects, seed, logits.scale)
        exact = error <= rounding
    exact = exact and (error <= threshold or rounding is not None)
    return Proof(
        exact=exact and finite,
        finite=finite,
        relative_error=error,
        rounding=rounding,
        argmax_equal=logits.agreed / logits.tokens,
        kl=logits.kl / logits.tokens,
        kl_max=logits.kl_max,
        text_kl=on_text.kl / on_text.tokens if text else None,
        cross_entropy=(on_text.first.loss / on_text.first.tokens, on_text.second.loss / on_text.second.tokens)
        if text
        else None,
        tokens=logits.tokens,
        threshold=threshold,
        dtype=dtype,
        seed=seed,
        layers=tuple(layers),
        seconds=time.perf_counter() - began,
        compared="logits" if writes or encoders.has_head(models[0]) else "hidden states",
    )


def rounding_error(model: StreamedModel, reference: Sequence[State], seed: int, scale: float | None = None) -> float:
    """How far a model is from itself when every layer's input is rounded once more: max|dlogit| / max|logit|.

    Some tokens lie where a real model magnifies float32 rounding a hundredfold (SmolLM2-135M: 6e-5), and two orders of
    summation of one function then differ by more than the threshold. The largest of a few draws of such roundings, each
    of one unit in the last place, is what no proof can go below.

    Args:
        reference: states that went through every layer undisturbed.
        seed: of the roundings.
        scale: max|logit|, where it is known from more tokens than these.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    drawn = model.start([state.ids.repeat(ROUNDING_DRAWS, 1) for state in reference])
    for index in range(model.depth):
        with model.layer(index) as layer:
            for state in drawn:
                unit = torch.finfo(state.hidden.dtype).eps * torch.randn(state.hidden.shape, generator=random)
                state.hidden = state.hidden * (1 + unit.to(state.hidden))
                model.advance(state, layer)
    difference = largest = 0.0
    with model.holding():
        for plain, rounded in zip(reference, drawn, strict=True):
            for start in range(0, plain.ids.shape[1], HEAD):
                rows = slice(start, start + HEAD)
                wanted = model.logits(plain, rows)
                largest = worst(largest, float(wanted.abs().max()))
                difference = worst(difference, float((model.logits(rounded, rows) - wanted).abs().max()))
    return difference / (scale or largest)


def warm_up() -> threading.Thread:
    """Import what a proof needs in a thread, while the files to be proven are still being written: about 3 s of CPU."""

    def load() -> None:

        from . import streaming  # noqa: F401

    thread = threading.Thread(target=load, name="moeforge-warm-up", daemon=True)
    thread.start()
    return thread


def token_lengths(config: Mapping[str, Any], tokens: int = TOKENS) -> list[int]:
    """Lengths of the sequences of random ids that a proof runs."""
    lengths = [max(2, tokens // 2)] * 2
    window = config.get("sliding_window")
    if isinstance(window, int) and lengths[0] <= window <= LONGEST:
        lengths.append(window + window // 4 + 2)
    return lengths


def token_batches(
    config: dict[str, Any], vocabulary: int, tokens: int, seed: int, text: Sequence[Sequence[int]] = ()
) -> list[torch.Tensor]:
    """Random ids, then the text: batches [1, T] without padding.

    One random sequence is longer than the model's sliding window (up to `LONGEST`): a dropped window changes nothing on
    shorter ones.

    Raises:
        BadInput: text with ids outside the vocabulary.
    """
    import torch

    rng = np.random.default_rng(seed)
    batches = [
        torch.from_numpy(rng.integers(0, vocabulary, size=(1, length))) for length in token_lengths(config, tokens)
    ]
    for ids in text:
        if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < vocabulary:
            raise BadInput(
                f"text of {len(ids)} tokens does not fit a vocabulary of {vocabulary}; is this its tokenizer?"
            )
        batches.append(torch.tensor([list(ids)], dtype=torch.int64))
    return batches


def _compare_layer(index: int, models: Sequence[StreamedModel], states: Sequence[list[State]]) -> LayerProof:
    """Advance both models by one layer. The first one's weights are gone before the second one's are read."""
    import torch

    from .build import ffn_modules, is_sparse
    from .streaming import ffn_calls, ffn_output

    def advance(model: StreamedModel, layer: torch.nn.Module, batch: list[State]) -> None:
        for state in batch:
            model.advance(state, layer)

    with models[0].layer(index) as layer:
        calls = ffn_calls(layer, lambda: advance(models[0], layer, states[0]))
    with models[1].layer(index) as layer:
        advance(models[1], layer, states[1])
        sparse = is_sparse(ffn_modules(layer))
        with torch.no_grad():
            local = _sizes([ffn_output(layer, x) for x, _ in calls], [y for _, y in calls])
    hidden = _sizes([s.shown for s in states[1]], [s.shown for s in states[0]])
    # where the difference and the reference are finite, so is the other side
    finite = all(map(math.isfinite, (*hidden, *local)))
    return LayerProof(index, sparse, _ratio(*hidden), _ratio(*local), finite)


def _sizes(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> tuple[float, float]:
    """(max|found - wanted|, max|wanted|) over all batches; NaN if any element is."""
    return _largest([f - w for f, w in zip(found, wanted, strict=True)]), _largest(wanted)


def _ratio(difference: float, scale: float) -> float:
    """difference / scale; infinite when one of them is not finite, or when the reference is zero and the difference is not."""
    if not (math.isfinite(difference) and math.isfinite(scale)):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _largest(tensors: Sequence[torch.Tensor]) -> float:
    """max|x|, NaN if any element is (python's `max` would lose it)."""
    values = [float(t.abs().max()) for t in tensors]
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _compare_logits(models: Sequence[StreamedModel], first: State, second: State, text: bool = False) -> Comparison:
    """The logits on one sequence, side by side.

    All logits of one model and those of `HEAD` positions of the other are in memory, and one head at a time.
    """
    import torch

    whole = models[0].logits(first).flatten(0, 1)
    targets = torch.full_like(first.ids, -1)
    if text:
        targets[:, :-1] = first.ids[:, 1:]
    targets, found = targets.flatten(), Comparison()
    with models[1].holding():
        for start in range(0, first.ids.shape[1], HEAD):
            other = models[1].logits(second, slice(start, start + HEAD)).flatten(0, 1)
            for at in range(0, len(other), POSITIONS):
                rows = slice(start + at, start + min(at + POSITIONS, len(other)))
                found.add(whole[rows], other[at : at + POSITIONS], targets[rows] if text else None)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
