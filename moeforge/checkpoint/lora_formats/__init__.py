"""Adapters of LoRA experts that other programs wrote, read as entries and tensors of ours: one format a file, no torch.

mixlora.py   MixLoRA, today's names and its first ones
moe_peft.py  MoE-PEFT's MOLA and LORAMOE
mola.py      MoLA's modified PEFT
peft.py      a plain PEFT LoRA; frozen.py: several of them as the frozen experts of one router
"""

from collections.abc import Mapping
from typing import Any

from ..adapter_layout import Maps
from . import mixlora, moe_peft, mola, peft
from .foreign import Foreign
from .settings import Settings
from .source import Source

__all__ = ["Foreign", "Source", "read"]


def read(source: Source, maps: Maps, config: Mapping[str, Any], *, top_k: int | None = None, drop: frozenset[str] = frozenset()) -> Foreign:  # fmt: skip
    """An adapter of any format that is known, on a base.

    Args:
        maps, config: the base's linear maps and config.json.
        top_k: see moeforge.checkpoint.lora_formats.mola. drop: see moeforge.checkpoint.lora_formats.peft.

    Raises:
        BadInput: an unknown format, or what its own module refuses.
    """
    keys = Settings(source.settings, source.ref)
    kind = keys.one_of("peft_type", (mixlora.PEFT_TYPE, *moe_peft.PREFIX, "LORA"))
    if kind == mixlora.PEFT_TYPE:
        return mixlora.read(source, maps, config)
    if kind in moe_peft.PREFIX:
        return moe_peft.read(source, maps)
    if mola.holds(source.tensors):
        return mola.read(source, maps, top_k=top_k)
    return peft.read(source, maps, drop=drop)
