"""A text whose tokens can be asked where they went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .heat import site_labels
from .markup import Markup, data, join, tag


def tokens_section(found: Mapping[str, Any]) -> Markup:
    shown, of = len(found["tokens"]), found["of"]
    told = f"{shown} tokens." if shown == of else f"The first {shown} of {of} tokens."
    spec = {
        "tokens": found["tokens"], "ids": found["ids"], "sites": site_labels(found["sites"]), "counts": found["counts"],
        # thousandths: no picture shows more
        "routes": [[[value if at % 2 == 0 else round(1000 * value) for at, value in enumerate(token)] for token in rows]
                   for rows in found["routes"]],
    }  # fmt: skip
    caption = ("Point at a token, or move with the arrow keys, to see its experts and their weights in every layer. The number under a token is "
               "its heaviest expert in the chosen layer; its colour, how much the chosen expert weighs. Arrows up and down change the layer.")  # fmt: skip
    figure = tag(
        "figure", tag("figcaption", told, " ", caption), class_="tokens", id="tokens-map", data_from="tokens-data"
    )
    return join([figure, data("tokens-data", spec)])
