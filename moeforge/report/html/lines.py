"""Loss over steps as SVG that needs no script: the reader's colours, labelled axes, numbers at every point."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .markup import Markup, tag

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 14, 46
POINTS = 600
"""A curve of more is thinned: they would lie on one pixel."""

MARKED = 40
"""Held-out losses that still have room for a mark each."""

Curve = Sequence[Sequence[float]]
"""[step, loss] pairs."""


def loss_chart(steps: Curve, held_out: Curve) -> Markup:
    """Training loss of each step, its running mean, and held-out losses, in nats a token.

    Args:
        steps, held_out: at least one of them not empty.
    """
    every = [*steps, *held_out]
    xs, ys = _axis(0, max(x for x, _ in every)), _axis(min(y for _, y in every), max(y for _, y in every))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT) + LEFT
        return round(across, 1), round(HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def line(curve: Curve, name: str) -> Markup:
        return tag(
            "polyline", class_=name, points=" ".join(f"{x},{y}" for x, y in (at(*point) for point in _thinned(curve)))
        )

    marks = []
    for x in xs:
        marks.append(tag("text", f"{x:g}", x=at(x, ys[0])[0], y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    for y in ys:
        height = at(xs[0], y)[1]
        marks.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
        marks.append(tag("text", f"{y:g}", x=LEFT - 8, y=height + 4, text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    marks.append(tag("text", "step", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    marks.append(
        tag("text", "loss (nats a token)", x=14, y=middle, text_anchor="middle", transform=f"rotate(-90 14 {middle})")
    )
    window = max(len(steps) // 20, 1)
    alone = "mean-loss" if window == 1 else "step-loss"
    curves = [line(steps, alone), line(_means(steps, window), "mean-loss"), line(held_out, "held-loss")]
    for step, loss in held_out if len(held_out) <= MARKED else ():
        x, y = at(step, loss)
        told = f"held out, step {step:g}: {loss:.4f}"
        curves.append(tag("circle", tag("title", told), class_="held-point", cx=x, cy=y, r=4))
    last = f"from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}" if held_out else "not measured"
    label = f"Loss over {xs[-1]:g} steps; held-out loss {last}"
    picture = tag("svg", *marks, *curves, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="lines")
    keys = [
        (alone, "training, each step"),
        ("mean-loss", f"training, mean of {window} steps"),
        ("held-loss", "held out"),
    ]
    shown = [key for key, curve in zip(keys, (steps, steps if window > 1 else (), held_out), strict=True) if curve]
    legend = tag("p", *(tag("span", tag("i", class_=f"key {name}"), told) for name, told in shown), class_="legend")
    return tag("figure", tag("div", picture, class_="canvas"), legend)


def _axis(low: float, high: float) -> list[float]:
    """Round numbers around the values, some five of them."""
    span = high - low or abs(high) or 1.0
    raw = span / 5
    step = next(s for s in (1, 2, 5, 10) if s * 10 ** math.floor(math.log10(raw)) >= raw * 0.999) * 10 ** math.floor(
        math.log10(raw)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _thinned(curve: Curve) -> Curve:
    """Every so many points, the first and the last among them."""
    if len(curve) <= POINTS:
        return curve
    return [curve[round(k * (len(curve) - 1) / (POINTS - 1))] for k in range(POINTS)]


def _means(curve: Curve, window: int) -> list[tuple[float, float]]:
    """The running mean of the latest steps; nothing where that is the curve itself."""
    if window == 1:
        return []
    sums = [0.0]
    for _, loss in curve:
        sums.append(sums[-1] + loss)
    return [
        (step, (sums[at + 1] - sums[max(at + 1 - window, 0)]) / min(at + 1, window))
        for at, (step, _) in enumerate(curve)
    ]
