"""The config of a model with mixtures: the dense model's own, untouched, and what stands at its sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..errors import BadInput
from ..mixture.config import MixtureConfig

MODEL_TYPE = "moeforge"
_OWN = frozenset({"base_config", "mixtures", "model_type", "architectures", "dtype", "quantization_config", "auto_map",
                  "transformers_version", "_name_or_path", "moeforge_compression"})  # fmt: skip
"""What is said about the whole; anything else is a setting of the dense model."""


class MoeforgeConfig(PreTrainedConfig):
    """`config.json` of type `moeforge`.

    Whatever asks for a setting of the dense model (sizes, token ids, the cache's layout, dropout) gets it from `base_config`, and
    whoever changes one changes it there, where the dense model's modules look.

    Args:
        base_config: the dense model's config: a config object, or its JSON with `model_type` and `architectures`.
        mixtures: the entries, parsed or as JSON.

    Raises:
        BadInput: an unknown key, a base that transformers does not know, or an entry without meaning.
    """

    model_type = MODEL_TYPE
    sub_configs = {"base_config": AutoConfig}  # pyright: ignore[reportAssignmentType]
    base_config = None

    def __init__(
        self, base_config: PreTrainedConfig | dict[str, Any] | None = None, mixtures: Sequence[Any] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.mixtures = [MixtureConfig.from_json(m.as_json() if isinstance(m, MixtureConfig) else m) for m in mixtures]
        if isinstance(base_config, dict):
            from .build import parse_config

            if base_config.get("model_type") == MODEL_TYPE:
                raise BadInput(
                    "config.json: base_config is itself of type moeforge; it must be that of the dense model"
                )
            base_config = parse_config(base_config)
        self.base_config = base_config  # from here on, settings are those of the dense model
        for key in [key for key in self.__dict__ if self._shares(key)]:
            del self.__dict__[key]
            if hasattr(type(self), key):
                self.__dict__[key] = getattr(base_config, key)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a parsed `config.json`.

        Raises:
            BadInput: see the class.
        """
        known = _OWN | {"torch_dtype"}
        if unknown := sorted(key for key in config_dict if key not in known and not key.startswith("_")):
            raise BadInput(
                f"config.json of type moeforge: unknown key {unknown[0]!r}; a newer moeforge may have written it"
            )
        if "moeforge_compression" in config_dict:  # packed weights of a native mixture, which base_config describes
            config_dict = {"mixtures": [], **config_dict}
        for key, kind in (("base_config", dict), ("mixtures", list)):
            if not isinstance(config_dict.get(key), kind):
                raise BadInput(f"config.json of type moeforge: {key} = {config_dict.get(key)!r}: expected "
                               f"{'an object' if kind is dict else 'a list'}")  # fmt: skip
        return super().from_dict(config_dict, **kwargs)

    @property
    def packed(self) -> bool:
        """Whether the checkpoint's weights are stored as one of our compression methods defines."""
        return "moeforge_compression" in self.__dict__

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the code lies in this package, so none is copied beside a model that a repository's file led here."""

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The config of the dense model's text tower: what generation and caches look at."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        found = {key: value for key, value in super().to_dict().items() if key in _OWN and value is not None}
        found.pop("_name_or_path", None)
        base = None if self.base_config is None else self.base_config.to_diff_dict()
        if base is not None and "dtype" in found:
            base["dtype"] = found["dtype"]  # the dense model that is written here is stored in this one
        return found | {"base_config": base, "mixtures": [entry.as_json() for entry in self.mixtures]}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: entries name every field, so that a later default does not change an old checkpoint."""
        return self.to_dict()

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """The dense model's own checks; its entries were checked when they were read."""
        if (check := getattr(self.base_config, "validate", None)) is not None:
            check(*args, **kwargs)

    def _shares(self, key: str) -> bool:
        """Whether a key is a setting of the dense model's."""
        base = self.__dict__.get("base_config")
        return base is not None and key not in _OWN and (key in base.__dict__ or key in type(base).attribute_map)

    def __getattr__(self, key: str) -> Any:
        base = self.__dict__.get("base_config")
        if base is None or (key.startswith("__") and key.endswith("__")):
            raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")
        return getattr(base, key)

    def __setattr__(self, key: str, value: Any) -> None:
        if self._shares(key):
            setattr(self.base_config, key, value)
            if not hasattr(type(self), key):
                return
        # what every config has is held twice: it would be found in the class before it is looked for in the base
        super().__setattr__(key, value)


def register() -> None:
    """Make transformers' AutoConfig read `config.json` of type `moeforge`."""
    AutoConfig.register(MODEL_TYPE, MoeforgeConfig, exist_ok=True)


register()  # by itself where it was imported before the Auto classes were
