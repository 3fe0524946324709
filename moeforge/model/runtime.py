"""Models with mixtures: the dense model's own class, with other modules at some places.

A checkpoint of type `moeforge` names its dense class; the class here is made of that one and one of the heads below, so whatever
works on the dense model (generation, gradient checkpointing, adapters, quantisation, device maps, compilation) works on this one.
Only classes registered with transformers are built, never code that a checkpoint brings along.

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)     # after `import moeforge`
    model = moeforge.load(directory)                                         # any source, streamed, strict
    model = mix(dense, [MixtureConfig(experts=ExpertsConfig(count=8))])      # in memory
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import transformers
from transformers import PreTrainedModel

from ..errors import BadInput
from ..mixture.config import MixtureConfig
from .config import MoeforgeConfig
from .layout import weight_rules
from .mixing import LABELS, complete, find_all, install


class Mixed:
    """What a model with mixtures has beside its dense class.

    Attributes:
        base_class: the dense class.
        auto: the name of transformers' Auto class for this head.
        mixtures: where a mixture stands -> (its site, the layer).
        mixture_context: what the mixtures of the text model share (moeforge.mixture.context).
    """

    auto: ClassVar[str]
    base_class: ClassVar[type[PreTrainedModel]]
    config_class = MoeforgeConfig

    def __new__(cls, config: MoeforgeConfig | None = None, *args: Any, **kwargs: Any) -> Any:
        if config is None or hasattr(cls, "base_class"):  # a copy is made without a config
            return object.__new__(cls)
        return object.__new__(cls.of(config))

    def __init__(self, config: MoeforgeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config.base_config, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        _equip(self, config)

    @classmethod
    def of(cls, config: MoeforgeConfig) -> type[Any]:
        """The class of a config.

        Raises:
            BadInput: transformers has no such head for the dense model's type.
        """
        mapping = getattr(transformers, cls.auto)._model_mapping
        base = config.base_config
        known = mapping.get(type(base), ())
        candidates = known if isinstance(known, tuple) else (known,)
        named = getattr(base, "architectures", None) or []
        chosen = next((c for c in candidates if c.__name__ in named), candidates[0] if candidates else None)
        if chosen is None:
            raise BadInput(f"{cls.__name__}: transformers {transformers.__version__} has no {cls.auto} for a dense model of type "
                           f"{getattr(base, 'model_type', None)!r}")  # fmt: skip
        return mixed_class(cls, chosen)

    @classmethod
    def from_pretrained(
        cls, ref: Any, *args: Any, config: Any = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers' own; but a checkpoint that lacks tensors, or holds others, is refused.

        Raises:
            BadInput: names up to three of them.
        """
        if not isinstance(config, MoeforgeConfig):
            return getattr(transformers, cls.auto).from_pretrained(
                ref, *args, output_loading_info=output_loading_info, **kwargs
            )
        if config.packed:
            raise BadInput(
                f"{ref}: its weights are packed by moeforge compress, which no Auto class unpacks; use moeforge.load"
            )
        if not hasattr(cls, "base_class"):
            made = cls.of(config)
            return made.from_pretrained(ref, *args, config=config, output_loading_info=output_loading_info, **kwargs)
        if kwargs.get("key_mapping") is not None:
            raise BadInput(
                f"{ref}: key_mapping renames tensors of dense models; a checkpoint of type moeforge has its names"
            )
        stock = cast(Any, super())
        model, info = stock.from_pretrained(ref, *args, config=config, output_loading_info=True, **kwargs)
        _refuse_strangers(ref, model, info)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: MoeforgeConfig, **kwargs: Any) -> Any:
        if not hasattr(cls, "base_class"):
            return cls.of(config)._from_config(config, **kwargs)
        return cast(Any, super())._from_config(config, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # `generate` refuses what `forward` does not name, and ours is taken before `forward`
        stock = cast(Any, super())
        stock._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name != LABELS})

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any) -> Any:
        rules = weight_rules(model, quantizer=load_config.hf_quantizer)
        load_config = dataclasses.replace(load_config, weight_mapping=rules)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)


class MoeforgeModel(Mixed):
    """A body without a head."""

    auto = "AutoModel"


class MoeforgeForCausalLM(Mixed):
    """A language model."""

    auto = "AutoModelForCausalLM"


class MoeforgeForMaskedLM(Mixed):
    """An encoder that fills in words."""

    auto = "AutoModelForMaskedLM"


class MoeforgeForSequenceClassification(Mixed):
    """A text classifier."""

    auto = "AutoModelForSequenceClassification"


class MoeforgeForTokenClassification(Mixed):
    """A classifier of tokens."""

    auto = "AutoModelForTokenClassification"


class MoeforgeForQuestionAnswering(Mixed):
    """Spans that answer a question."""

    auto = "AutoModelForQuestionAnswering"


class MoeforgeForImageClassification(Mixed):
    """An image classifier."""

    auto = "AutoModelForImageClassification"


class MoeforgeForMaskedImageModeling(Mixed):
    """An encoder that fills in parts of images."""

    auto = "AutoModelForMaskedImageModeling"


class MoeforgeForConditionalGeneration(Mixed):
    """A language model that sees."""

    auto = "AutoModelForImageTextToText"


HEADS: tuple[type[Mixed], ...] = tuple(Mixed.__subclasses__())


@functools.cache
def mixed_class(head: type[Mixed], base: type[PreTrainedModel]) -> type[Any]:
    """The class of a dense class's models with mixtures, of the head's name."""
    return type(head.__name__, (head, base), {"__module__": __name__, "__doc__": base.__doc__, "base_class": base,
                                              "config_class": MoeforgeConfig})  # fmt: skip


def head_of(kind: type[PreTrainedModel]) -> type[Mixed]:
    """The head for a dense class: `BertForMaskedLM` -> MoeforgeForMaskedLM, `ViTModel` -> MoeforgeModel.

    Raises:
        BadInput: there is none.
    """
    for head in HEADS:
        known = getattr(transformers, head.auto)._model_mapping.get(kind.config_class, ())
        if kind in (known if isinstance(known, tuple) else (known,)):
            return head
    raise BadInput(
        f"{kind.__name__} is none of the classes that {', '.join(head.auto for head in HEADS)} of transformers build"
    )


def mix(model: PreTrainedModel, entries: Sequence[MixtureConfig], *, copy: bool = True, nested: bool = False) -> Any:
    """Turn a dense model into one with mixtures, in place: modules are replaced, its class and config become those of its kind.

    Args:
        entries: what an entry leaves open is taken from the model: no layers, all of them; width 0, experts like the dense network.
        copy: experts start as copies of the network that they replace (with weights that sum to 1, the model computes the same);
            False: at random.
        nested: see :func:`moeforge.model.mixing.find_all`.

    Raises:
        BadInput: a site that is not there, or a model whose class transformers does not know.
    """
    if isinstance(model, Mixed):
        raise BadInput(f"{type(model).__name__} has mixtures already")
    kind = type(model)
    made = mixed_class(head_of(kind), kind)
    full = [complete(entry, model) for entry in entries]
    base = model.config
    base.architectures = [kind.__name__]
    config = MoeforgeConfig(base, full, architectures=[made.__name__], dtype=model.dtype)
    found = find_all(model, full, nested=nested)
    model.__class__ = made
    _equip(model, config, found, copy=copy)
    return model


def _equip(model: Any, config: MoeforgeConfig, found: Any = None, *, copy: bool = False) -> None:
    install(model, find_all(model, config.mixtures) if found is None else found, copy=copy)
    model.config = config
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "selection_bias"}
    model._weight_conversions = weight_rules(model, loading=False)


def _refuse_strangers(ref: Any, model: Any, info: dict[str, Any]) -> None:
    """Another head than the one that was saved may lack tensors or find too many; a mixture may not."""
    whole = model.config.architectures == [type(model).__name__]
    told = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or ())
        wrong = names if whole else [name for name in names if _of_a_mixture(model, name)]
        if wrong:
            rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            told.append(f"{what.removesuffix('_keys')} {', '.join(wrong[:3])}{rest}")
    if told:
        raise BadInput(f"{ref} does not hold the weights of {type(model).__name__}: {'; '.join(told)}; the checkpoint is "
                       "incomplete or its config.json belongs to another model")  # fmt: skip


def _of_a_mixture(model: Any, name: str) -> bool:
    return any(name.startswith((f"{site.root}.", f"{site.mount}.")) for site, _ in model.mixtures.values())


def register() -> None:
    """Make transformers' Auto classes build models of a MoeforgeConfig."""
    for head in HEADS:
        getattr(transformers, head.auto).register(MoeforgeConfig, head, exist_ok=True)


register()  # by itself where it was imported before the Auto classes were
