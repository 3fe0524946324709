"""From a parsed `config.json` to a stock transformers model whose weights take no memory yet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoint.anatomy import TOP_K, plain_config
from ..checkpoint.architectures import EXPERT_COUNTS
from ..errors import BadInput, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CAUSAL = "AutoModelForCausalLM"
HEADS = {
    CAUSAL: "a causal language model",
    "AutoModelForImageTextToText": "a language model that sees",
    "AutoModelForMaskedLM": "a masked language model",
    "AutoModelForSequenceClassification": "a classifier of texts",
    "AutoModelForTokenClassification": "a classifier of tokens",
    "AutoModelForQuestionAnswering": "a model that answers with spans",
    "AutoModelForImageClassification": "a classifier of images",
    "AutoModelForMaskedImageModeling": "a model that fills in images",
    "AutoModel": "a model without a head",
}
"""transformers' Auto classes that are looked through for the class of a checkpoint, and what they build."""


def build(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> PreTrainedModel:
    """The model that `config` describes: parameters on the meta device, buffers real, eval mode.

    It is of the class that `architectures` names, where that is one of those of :data:`HEADS`, else a causal language model. Only
    classes registered with transformers are used, never code that a checkpoint brings along.

    Args:
        dtype: floating-point type of the parameters.
        attention: transformers' name of the attention function (`sdpa`, `eager`, ...); default: its own choice.

    Raises:
        BadInput: transformers has no such model for this config, or refuses its values.
    """
    import transformers
    from transformers.initialization import no_init_weights

    parsed = parse_config(config)
    head = head_of(parsed, config.get("architectures") or ())
    _check_top_k(config)
    with _parameters_on_meta(), no_init_weights():
        try:
            model = getattr(transformers, head).from_config(parsed, dtype=dtype, attn_implementation=attention)
            model.tie_weights()  # part of the initialisation that is skipped here
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise BadInput(
                f"config.json of type {config.get('model_type')!r} does not build {HEADS[head]}: {one_line(error)}"
            ) from error
    return model.eval()


def head_of(config: PreTrainedConfig, named: Sequence[str]) -> str:
    """The name of the Auto class that builds one of the named classes; that of causal language models where none does.

    A decoder's bare body counts as none: nothing here runs one, and its head is missed by name.
    """
    import transformers

    for name in named:
        for head in HEADS:
            known = getattr(transformers, head)._model_mapping.get(type(config), ())
            if any(kind.__name__ == name for kind in (known if isinstance(known, tuple) else (known,))):
                return CAUSAL if head == "AutoModel" and _is_decoder(config) else head
    return CAUSAL


def require_generation(config: Mapping[str, Any], ref: str) -> None:
    """Refuse what is no language model, where text is to be continued or its loss to be measured.

    Raises:
        BadInput: names what it is.
    """
    head = head_of(parse_config(config), config.get("architectures") or ())
    if head not in (CAUSAL, "AutoModelForImageTextToText"):
        raise BadInput(
            f"{ref}: {', '.join(config['architectures'])} is {HEADS[head]}; this needs a causal language model"
        )


def _is_decoder(config: PreTrainedConfig) -> bool:
    import transformers

    causal, masked = (getattr(transformers, head)._model_mapping for head in (CAUSAL, "AutoModelForMaskedLM"))
    return type(config) in causal and type(config) not in masked


def parse_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object of a parsed `config.json`.

    Raises:
        BadInput: no `model_type`, one that the installed transformers does not know, or values it refuses.
    """
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise BadInput(
            f"config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know; "
            "moeforge runs no code from checkpoints: upgrade transformers or convert the model to a native type"
        )
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
    except BadInput:
        raise
    except Exception as error:  # strict config classes raise their own types, none of them public
        raise BadInput(f"config.json of type {kind!r} is refused by transformers: {one_line(error)}") from error


def _check_top_k(config: Mapping[str, Any]) -> None:
    """A router that is to choose more experts than there are fails only when it runs.

    Raises:
        BadInput: names both keys.
    """
    settings = plain_config(config)
    counts = {key: settings[key] for key in EXPERT_COUNTS if isinstance(settings.get(key), int)}
    active = {key: settings[key] for key in TOP_K if isinstance(settings.get(key), int)}
    for key, experts in counts.items():
        for name, top_k in active.items():
            if experts > 1 and top_k > experts:
                raise BadInput(
                    f"config.json: {name} = {top_k} is more than {key} = {experts}; correct whichever is wrong"
                )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are moved to the meta device as modules register them; buffers are left alone.

    A plain `torch.device("meta")` would also take the buffers that no checkpoint holds (rotary frequencies) and leave
    them without values. Large uninitialised tensors, which only weights are, never exist.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # a parameter already on meta keeps its identity: that is how tied weights stay tied
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original


class _LargeOnMeta(TorchFunctionMode):
    """`torch.empty` of a million elements or more gives a tensor without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = dict(kwargs or {})
        if func is torch.empty and made.get("device") is None:
            size = made.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if math.prod(size) >= 1 << 20:
                made["device"] = "meta"
        return func(*args, **made)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers, found by structure: the one module list as long as the model is deep.

    Raises:
        BadInput: no such list, or several.
    """
    depth = model.config.get_text_config().num_hidden_layers
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == depth
             and any(p.ndim >= 2 for p in module.parameters())]  # fmt: skip
    outer = [(n, m) for n, m in found if not any(n.startswith(other + ".") for other, _ in found)]
    if len(outer) != 1:
        raise BadInput(
            f"{type(model).__name__}: expected one list of {depth} decoder layers, found {[n for n, _ in outer]}; "
            "this model cannot be run layer by layer"
        )
    return outer[0]


def ffn_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward modules of a decoder layer by child name: every child with matrices that is not attention.

    Usually one (`mlp`); two where a shared expert stands beside the sparse block. Their outputs are summed.
    """
    return {
        name: child
        for name, child in layer.named_children()
        if "attention" not in type(child).__name__.lower() and any(p.ndim >= 2 for p in child.parameters())
    }


def is_sparse(ffn: Mapping[str, nn.Module]) -> bool:
    """True when the feed-forward modules hold experts: some parameter with a leading expert axis."""
    return any(p.ndim == 3 for module in ffn.values() for p in module.parameters())
