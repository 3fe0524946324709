"""What training measured: loss, the load of the experts, and who they work for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .heat import Map, Scale, beside, extremes, heat_map, site_labels, top, within
from .lines import loss_chart
from .markup import Markup, fold, join, number, table, tag

CELLS = 60_000
"""Of the heat maps of one section together; measurements beyond them are in `--json`."""
BUSY = 4.0
"""Times its even share from which on an expert has the last colour."""
HELD_OUT = 200
"""Rows of the table of held-out losses."""


def loss_section(training: Mapping[str, Any]) -> Markup:
    steps, held_out = training["steps"], training["held_out"]
    rows = [
        (f"{step:g}", f"{loss:.4f}", number(math.exp(min(loss, 700)), 4)) for step, loss in _spread(held_out, HELD_OUT)
    ]
    return join([
        tag("p", "Measured by the run in ", tag("code", training["from"]), ".", _distance(training.get("distances", ()))),
        tag("div", loss_chart(steps, held_out),
            table(("after step", "loss", "perplexity"), rows, "Held-out text, nats a token", numbers=0) if rows else "", class_="beside"),
    ])  # fmt: skip


def _distance(distances: Sequence[Sequence[float]]) -> str:
    """How far from its teacher the model was, in words: it is no loss on text, so it has no place among the curves."""
    if not distances:
        return ""
    (first, far), (last, near) = distances[0], distances[-1]
    return f" Distance from the teacher, T² KL: {number(far)} nats a token in step {first:g}, {number(near)} in step {last:g}."


def load_section(
    training: Mapping[str, Any] | None, evaluated: Mapping[str, Any] | None, tokens: Mapping[str, Any] | None
) -> Markup:
    """Each expert's share of the assignments of its layer: of every measurement, of the evaluation, and of the given text."""
    measured = list((training or {}).get("loads", ()))
    # the last and the first are what a reader compares
    ordered = [*measured[-1:], *measured[:-1][:1], *reversed(measured[1:-1])]
    if evaluated is not None and "load" in evaluated:
        ordered.insert(0, evaluated["load"])
    if tokens is not None:
        title = f"the given text, {len(tokens['tokens'])} tokens"
        ordered.insert(
            1,
            {"title": title, "load": tokens["load"], "sites": tokens["sites"], "entropy": [None] * len(tokens["load"])},
        )
    maps = list(within((_load_map(load) for load in ordered), CELLS))
    most = top(one.values for one in maps)
    # a single expert with ten times its share would leave all others one colour
    scale = Scale(
        "load relative to an even share", min(max(2.0, most), BUSY), kind="even", unit="×", clipped=most > BUSY
    )
    caption = "How much of a layer's work each expert gets. 1 is an even share; 0 is an idle expert."
    picture = heat_map("load-map", maps, scale, row="layer", column="expert", choice="measured on", caption=caption)
    return join([beside(picture, _load_table(ordered[0]), maps), _more(len(maps), len(ordered), "measurements")])


def _even(load: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[share * len(row) for share in row] for row in load]


def _load_map(load: Mapping[str, Any]) -> Map:
    return Map(load["title"], site_labels(load["sites"]), _even(load["load"]))


def _load_table(load: Mapping[str, Any]) -> Markup:
    rows = []
    for name, row, nats in zip(site_labels(load["sites"]), _even(load["load"]), load["entropy"], strict=True):
        busy, least = extremes(row) or (0, 0)
        idle = sum(value == 0 for value in row)
        rows.append(
            (name, f"{row[busy]:.2f} (expert {busy})", f"{row[least]:.2f} (expert {least})", idle, number(nats))
        )
    head = ("layer", "busiest, × even", "least, × even", "idle experts", "router entropy (nats)")
    return table(head, rows, f"Load by layer: {load['title']}")


def specialisation_section(found: Mapping[str, Any]) -> Markup:
    """Who works for whom: lift of a label's share over the mean of all labels."""
    names, rows = found["labels"], site_labels(found["sites"])
    met = [at for at, lift in enumerate(found["lift"]) if any(value is not None for row in lift for value in row)]
    maps = [Map(str(names[at]), rows, found["lift"][at]) for at in met]
    shown = list(within(maps, CELLS))
    caption = ("Lift: an expert's share of the assignments of one label, over its mean share across labels (each label counts the same). "
               "2 is twice as often as on average, 0.5 half as often, 1 no preference.")  # fmt: skip
    # of two labels none can have more than twice the mean
    scale = Scale("lift, logarithmic", float(min(max(len(met), 2), 4)), kind="ratio", unit="×")
    picture = heat_map("lift-map", shown, scale, row="layer", column="expert", choice="label", caption=caption)
    cells = [(row, *("–" if values[at] is None else f"{values[at]:.1%}" for at in met)) for row, values in
             zip(rows, found["separation"], strict=True)]  # fmt: skip
    told = ("Separation: the share of a label's assignments that would have to go to other experts for it to be routed as the mean of all "
            "labels is. 0\u00a0% where experts do not care what a text is about.")  # fmt: skip
    numbers = tag(
        "div",
        tag("p", told, class_="note"),
        table(("layer", *(names[at] for at in met)), cells, "Separation by layer and label"),
    )
    unmet = [str(name) for at, name in enumerate(names) if at not in met]
    about = f"Measured on {found['title']}." + (f" It holds nothing of {', '.join(unmet)}." if unmet else "")
    return join([tag("p", about), beside(picture, numbers, shown), _more(len(shown), len(maps), "labels")])


def _more(shown: int, of: int, what: str) -> Markup | str:
    """Says so where a page has not all of them."""
    if shown == of:
        return ""
    return tag("p", f"{shown} of {of} {what} are shown; ", tag("code", "--json"), " has all of them.", class_="note")


def eval_section(found: Mapping[str, Any]) -> Markup:
    """The scalars of `eval --json`, and the tasks of lm-eval."""
    rows = [(name.replace("_", " "), number(held, 5) if isinstance(held, float) else str(held)) for name, held in found.items()
            if isinstance(held, int | float | str)]  # fmt: skip
    tasks = [(task, metric, number(held, 4) if isinstance(held, float) else str(held)) for task, metrics in (found.get("lm_eval") or {}).items()
             for metric, held in metrics.items()]  # fmt: skip
    parts = [table(("measure", "value"), rows, "Evaluation")]
    if tasks:
        parts.append(
            fold("tasks of lm-evaluation-harness", table(("task", "metric", "value"), tasks, "lm-eval", numbers=2))
        )
    return join(parts)


def _spread(curve: Sequence[Sequence[float]], most: int) -> Sequence[Sequence[float]]:
    if len(curve) <= most:
        return curve
    return [curve[round(k * (len(curve) - 1) / (most - 1))] for k in range(most)]
