"""A checkpoint, whole, as a stock transformers model: for generation, training and evaluation."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .. import registry
from ..checkpoint.base import Checkpoint
from ..checkpoint.expert_adapter import ExpertAdapter
from ..errors import BadInput, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from .weights import WeightMap

COMPRESSION = "moeforge_compression"
"""The `config.json` key of a checkpoint whose weights are stored in a form that one of our compression methods defines:
`{"method": NAME, ...}`."""


def load(
    ref: str | Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model at `ref`, with every weight accounted for, in evaluation mode.

    Where the config says `"moeforge_compression": {"method": NAME, ...}`, the work goes to the method that the registry
    finds under `moeforge.compress`: its `load_model(checkpoint, *, dtype, device, attention) -> PreTrainedModel`, called on an
    instance, gets the open checkpoint (its config included) and may use :func:`moeforge.model.build.build` and
    :class:`moeforge.model.weights.WeightMap`, or :func:`assemble` with a `replace`.

    Args:
        ref: whatever :func:`moeforge.checkpoint.open_checkpoint` takes, or an open checkpoint (left open).
        dtype: floating-point type of the weights; default: the one named in the config, else float32.
        device: where the weights go.
        allow_pickle: accept pickled `.bin` files (tensors only).
        attention: transformers' name of the attention function; default: its own choice.

    Raises:
        BadInput: no such model, a type that transformers does not know, missing, unexpected or misshapen tensors.
    """
    if not isinstance(ref, Checkpoint):
        from ..checkpoint import open_checkpoint

        with open_checkpoint(str(ref), allow_pickle=allow_pickle, compressed=True) as checkpoint:
            return load(checkpoint, dtype=dtype, device=device, attention=attention)
    if isinstance(ref, ExpertAdapter):
        from .adapters import load_adapter

        return load_adapter(ref, dtype=dtype, device=device, attention=attention)
    scheme = ref.config.get(COMPRESSION)
    if scheme is not None:
        if not isinstance(scheme, dict) or not isinstance(scheme.get("method"), str):
            raise BadInput(
                f"{ref.ref}: config.json has {COMPRESSION} = {scheme!r}; expected an object with a method name"
            )
        method = registry.find("moeforge.compress", scheme["method"], "compression method").load()()
        return method.load_model(ref, dtype=dtype, device=device, attention=attention)
    return assemble(ref, dtype=dtype, device=device, attention=attention)


def assemble(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    attention: str | None,
    replace: Callable[[PreTrainedModel, WeightMap, torch.dtype], list[str]] | None = None,
) -> PreTrainedModel:
    """Build the model, fill its weights, tie what is tied; the arguments are those of :func:`load`.

    Args:
        replace: puts modules of its own, with their weights, in place of stock ones, and returns the names that are
            still to be filled.
    """
    import torch

    from .build import build
    from .weights import WeightMap, torch_dtype

    if dtype is None:
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    if not isinstance(dtype, torch.dtype):
        dtype = torch_dtype(str(dtype))
    model = build(checkpoint.config, dtype=dtype, attention=attention)
    weights = WeightMap(checkpoint, model)
    kept = _kept_in_float32(model)
    names = weights.names() if replace is None else replace(model, weights, dtype)
    weights.fill(names, dtype, device, keep=kept)
    weights.retie()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    settings = generation_settings(checkpoint)
    if settings:
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_dict(settings)
        except Exception as error:  # values that transformers refuses in its own types of error
            raise BadInput(f"{checkpoint.ref}: generation_config.json: {one_line(error)}") from error
    return model


def generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The parsed `generation_config.json` of a checkpoint, empty when it has none.

    Raises:
        BadInput: it is not a JSON object.
    """
    for companion in checkpoint.companions():
        if companion.name == "generation_config.json":
            try:
                body = json.loads(companion.read())
            except ValueError as error:
                raise BadInput(f"{checkpoint.ref}: generation_config.json is not JSON: {error}") from error
            if not isinstance(body, dict):
                raise BadInput(f"{checkpoint.ref}: generation_config.json is not an object")
            return body
    return {}


def _kept_in_float32(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Parameters that the architecture wants in float32 whatever the rest is in."""
    import torch

    # the second list holds for every type, the first for float16 only, as in transformers
    listed = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        listed |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(rf"(^|\.){re.escape(part)}(\.|$)") for part in listed]
    return {name: torch.float32 for name in model.state_dict() if any(p.search(name) for p in patterns)}
