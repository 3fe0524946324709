"""Run a model with one layer in memory at a time.

The model is the stock transformers class. Its forward runs twice: once with every decoder layer replaced by a recorder
(so embeddings, masks, positions and multipliers are transformers' own), once with the layers replaced by what they were
found to compute (for the last norm, the head and its scaling). In between, layer by layer: read the weights, run every
batch through, free them. One pass over the checkpoint serves any amount of text; peak memory is the largest of one layer,
the embedding and the head, plus the batches' hidden states, whatever the depth.

    model = StreamedModel(checkpoint)
    states = model.start(batches)
    for index in range(model.depth):
        with model.layer(index) as layer:        # a stock decoder layer with its weights: hook it as you like
            for state in states:
                model.advance(state, layer)
    for state in states:
        logits = model.logits(state)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.base import Checkpoint
from .build import build, decoder_layers, ffn_modules, is_sparse
from .weights import WeightMap


@dataclass
class State:
    """One batch on its way through the layers."""

    inputs: dict[str, torch.Tensor]
    """What the model is given: `input_ids` [B, T] int64, for encoders with an `attention_mask`, or `pixel_values` [B, C, H, W]."""
    hidden: torch.Tensor
    """[B, T, D]: the input of layer `index`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Further arguments of each layer (mask, positions), as the stock forward passes them."""
    index: int = 0

    @property
    def ids(self) -> torch.Tensor:
        """[B, T] int64 token ids."""
        return self.inputs["input_ids"]

    @property
    def real(self) -> torch.Tensor | None:
        """[B, T] bool: which tokens are no padding; None: all of them."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    @property
    def shown(self) -> torch.Tensor:
        """The hidden states of what is no padding: [B, T, D], or [N, D] where there is some."""
        return self.hidden if self.real is None else self.hidden[self.real]


class StreamedModel:
    """A model whose layers come and go.

    Args:
        checkpoint: a Checkpoint; closed by its owner, not here.
        dtype: floating-point type of weights and activations.
        device: where layers run.

    Attributes:
        module: the stock transformers model; parameters on the meta device.
        depth: L, number of decoder layers.

    Raises:
        BadInput: the config or the tensors are not those of a model that transformers knows.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.module = build(checkpoint.config, dtype=dtype)
        self.weights = WeightMap(checkpoint, self.module)
        self._prefix, self._layers = decoder_layers(self.module)
        self.depth = len(self._layers)
        self._own = list(self._layers)
        self._holding = False
        self._held: set[str] = set()
        self._answers_tuples = False
        for buffer_name, buffer in self.module.named_buffers():
            owner = self.module.get_submodule(buffer_name.rpartition(".")[0])
            owner._buffers[buffer_name.rpartition(".")[2]] = buffer.to(self.device)
        for name, module in self.module.named_modules():
            inside = name == self._prefix or name.startswith(self._prefix + ".")
            if not inside and module._parameters:
                self._lend([f"{name}.{leaf}".lstrip(".") for leaf in (*module._parameters, *module._buffers)], module)

    def _lend(self, names: list[str], module: nn.Module) -> None:
        """A module outside the layers holds weights only while it runs."""
        names = [name for name in names if name in self.weights]

        def fill(*_: Any) -> None:
            if not self._held.issuperset(names):
                self.weights.fill(names, self.dtype, self.device)
                if self._holding:
                    self._held.update(names)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(lambda *_: None if self._holding else self.weights.free(names), always_call=True)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block, what is read outside the layers (the head, say) stays in memory for the next use."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            self.weights.free(self._held)
            self._held.clear()

    @torch.no_grad()
    def start(self, batches: Sequence[torch.Tensor | Mapping[str, torch.Tensor]]) -> list[State]:
        """The states of some batches, of token ids [B, T] or of all that the model is given, ready for layer 0. Batches may differ
        in shape."""
        states = []
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            first: list[torch.Tensor] = []

            def record(hidden: torch.Tensor, *args: Any, _calls=calls, _first=first, **kwargs: Any) -> torch.Tensor:
                _first.append(hidden)
                _calls.append((args, kwargs))
                return _first[0]  # what is handed on may be its first row, where layers answer with a tuple

            with self._replaced(record):
                # the base model stops before the head
                self.module.base_model(**self._arguments(inputs))
            states.append(State(inputs, first[0], calls))
        self._tell(None)
        return states

    def _tell(self, real: torch.Tensor | None) -> None:
        """Routers of a model with mixtures learn which tokens are padding; in between nobody says."""
        context = getattr(self.module, "mixture_context", None)
        if context is not None:
            context.begin(real)

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the model is called with; models of pixels know no cache."""
        cache = {} if "pixel_values" in inputs else {"use_cache": False}
        return {name: value.to(self.device) for name, value in inputs.items()} | cache

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, which are freed at the end of the `with` block."""
        names = self.weights.under(f"{self._prefix}.{index}")
        self.weights.fill(names, self.dtype, self.device)
        try:
            yield self._own[index]
        finally:
            self.weights.free(names)

    @torch.no_grad()
    def advance(self, state: State, layer: nn.Module) -> None:
        """Run one batch through the layer that its hidden states have reached."""
        args, kwargs = state.calls[state.index]
        self._tell(state.real)
        answer = layer(state.hidden, *args, **kwargs)
        self._tell(None)
        self._answers_tuples = isinstance(answer, tuple)
        state.hidden = _first(answer)
        state.index += 1

    @torch.no_grad()
    def logits(self, state: State, positions: slice = slice(None)) -> torch.Tensor:
        """[B, T, V] logits of a state that has been through every layer, or those of some positions."""
        if state.index != self.depth:
            raise ValueError(f"state has been through {state.index} of {self.depth} layers")
        last = state.hidden[:, positions]
        answer = (last,) if self._answers_tuples else last
        with self._replaced(lambda hidden, *args, **kwargs: answer):
            # zeros in place of the embeddings, so that the table is not read again
            return self.module(inputs_embeds=torch.zeros_like(last), use_cache=False).logits

    @torch.no_grad()
    def outputs(self, state: State) -> dict[str, torch.Tensor]:
        """What a model that is no language model makes of a state that has been through every layer: its head's `logits`
        (`start_logits`, ...), or `last_hidden_state` [B, T, D] and `pooler_output` [B, D] of one without a head."""
        if state.index != self.depth:
            raise ValueError(f"state has been through {state.index} of {self.depth} layers")
        answer = (state.hidden,) if self._answers_tuples else state.hidden
        with self._replaced(lambda hidden, *args, **kwargs: answer):
            found = self.module(**self._arguments(state.inputs))
        wanted = ("logits", "last_hidden_state", "pooler_output", "reconstruction")
        return {name: value for name, value in found.items() if name.endswith(wanted)}

    def run(
        self,
        batches: Sequence[torch.Tensor | Mapping[str, torch.Tensor]],
        on_layer: Callable[[int, nn.Module, list[State]], None] | None = None,
    ) -> list[State]:
        """All batches through all layers.

        Args:
            on_layer: called with (index, layer with weights, states before the layer); what it hooks onto the layer it
                must remove by the next call.
        """
        states = self.start(batches)
        for index in range(self.depth):
            with self.layer(index) as layer:
                if on_layer is not None:
                    on_layer(index, layer, states)
                for state in states:
                    self.advance(state, layer)
        return states

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every decoder layer computes `forward` meanwhile."""
        for layer in self._own:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._own:
                del layer.forward


def ffn_calls(layer: nn.Module, run: Callable[[], None]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the feed-forward block of a decoder layer is given and what it answers, for every forward inside `run()`.

    What it is given is the true router input: after attention, residual and norm.

    Returns:
        one ([..., D], [..., D]) for each forward; the answers of several modules (sparse block and shared expert) are summed.
    """
    inputs: list[torch.Tensor] = []
    outputs: list[list[torch.Tensor]] = []
    handles = []
    for position, (entrance, exit) in enumerate(ffn_ends(layer)):
        answers: list[torch.Tensor] = []
        outputs.append(answers)
        if position == 0:
            handles.append(entrance.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        # a copy: what is added to it afterwards may be added in place
        handles.append(exit.register_forward_hook(lambda _, __, out, to=answers: to.append(_first(out).clone())))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [(x, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
            for x, *parts in zip(inputs, *outputs, strict=True)]  # fmt: skip


def ffn_output(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a layer's feed-forward block answers to `inputs` [B, T, D]."""
    total: torch.Tensor | None = None
    for entrance, exit in ffn_ends(layer):
        out = _first(entrance(inputs))
        if exit is not entrance:
            out = exit(out)
        total = out if total is None else total + out
    assert total is not None
    return total


def ffn_ends(layer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(module that gets the block's input, module that gives its answer) for each of the modules whose answers are summed.

    A dense block that is spread over two modules (BERT's `intermediate` and `output`, which also normalises) begins with the
    first and ends with the last matrix of the second.
    """
    parts = ffn_modules(layer)
    if len(parts) != 2 or is_sparse(parts):
        return [(module, module) for module in parts.values()]
    first, last = parts.values()
    inner = [module for module in last.modules() if any(p.ndim >= 2 for p in module.parameters(recurse=False))]
    return [(first, inner[-1])]


def _first(out: Any) -> torch.Tensor:
    """The hidden states of a module that may also return router logits."""
    return out[0] if isinstance(out, tuple) else out
