"""The options of every verb that opens a checkpoint, for its `Options` to inherit; `run.pin` reads them, too."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import opt


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Shows weights as they are stored, or has a word of its own for decoding them."""

    allow_pickle: bool = opt("read .bin files through torch's restricted unpickler", default=False)


@dataclass(frozen=True, kw_only=True)
class Decoding(Reading):
    """Needs plain weights."""

    dequantize: bool = opt("dequantise a quantised source instead of refusing it", default=False)
