"""What a proof gives to models that are no language models, encoders of text and of images, and how it compares their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from .comparison import Comparison

if TYPE_CHECKING:
    from .streaming import State, StreamedModel

IMAGES = 2
LONGEST = 128
"""Tokens of a test sequence, or half of the positions that the model has where that is less."""


def batches(model: StreamedModel, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random inputs: ids in two sequences of which one is padded, or pixels.

    Raises:
        BadInput: a model that takes neither.
    """
    random = torch.Generator().manual_seed(seed)
    config: Any = model.module.config
    main = model.module.main_input_name
    if main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return [{main: torch.randn(IMAGES, config.num_channels, height, width, generator=random)}]
    if main != "input_ids":
        raise BadInput(
            f"{model.checkpoint.ref}: {type(model.module).__name__} takes {main}, which no proof can make up"
        )
    length = min(LONGEST, config.max_position_embeddings // 2)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=random)
    mask = torch.ones_like(ids)
    mask[1, length * 3 // 4 :] = 0
    return [{main: ids, "attention_mask": mask}]


def has_head(model: StreamedModel) -> bool:
    """Whether the model is more than the bare one that its class builds upon."""
    return model.module.base_model is not model.module


def compare(models: Sequence[StreamedModel], first: State, second: State, text: bool = False) -> Comparison:
    """What the two models make of one batch, padding left out. There is no `text`."""
    into = Comparison()
    wanted, found = (model.outputs(state) for model, state in zip(models, (first, second), strict=True))
    for name, value in wanted.items():
        pair = [_rows(name, side, first.real) for side in (value, found[name])]
        if name.endswith("logits"):
            into.add(*pair)
        else:
            into.add_values(*pair)
    return into


def _rows(name: str, value: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """[N, V]: one row for each thing that is judged: token, sequence, image."""
    if real is not None and name in ("start_logits", "end_logits"):  # [B, T]: a span is chosen among the tokens
        return value.masked_fill(~real, float(value[real].min()))
    if real is not None and value.ndim == 3:
        return value[real]
    return value.flatten(0, -2)
