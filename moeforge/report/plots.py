"""Plots for people, as PNG files: loss over steps, expert load by layer."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MachineLacks, one_line


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a display, and its axes."""
    # matplotlib refuses to be imported where this names something that is not installed, though no backend is used here
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def check_drawing() -> None:
    """Draw an empty figure: what will be plotted after hours of work must not fail then.

    Raises:
        MachineLacks: matplotlib cannot be imported, or cannot draw.
    """
    try:
        figure, _ = _axes(1, 1)
        figure.savefig(io.BytesIO())
    except Exception as error:  # an installation can be broken in any way
        told = f"{type(error).__name__}: {one_line(error)}"
        raise MachineLacks(
            f"matplotlib, which draws the plots, does not work here ({told}); install it anew"
        ) from error


def _save(figure: Any, path: Path) -> None:
    # no version or date inside, so that the same run gives the same bytes
    figure.savefig(path, metadata={"Software": None})


def plot_loss(steps: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss of each step with its running mean, and held-out losses as points.

    Args:
        steps: records with `step` and `loss` (nats a token).
        held_out: the same, from the held-out text.
    """
    figure, (axis,) = _axes(7, 4)
    xs, ys = [r["step"] for r in steps], [r["loss"] for r in steps]
    if ys:
        window = max(len(ys) // 20, 1)
        means = [sum(ys[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(ys))]
        axis.plot(xs, ys, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
        if window > 1:
            axis.plot(xs, means, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} steps")
    if held_out:
        axis.plot([r["step"] for r in held_out], [r["loss"] for r in held_out], "o-", color="tab:red", label="held out")
        first, last = held_out[0]["loss"], held_out[-1]["loss"]
        axis.set_title(f"held-out loss {first:.3f} → {last:.3f}" if len(held_out) > 1 else f"held-out loss {first:.3f}")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def plot_load(loads: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Heat maps of each expert's share of the assignments, layers by experts, side by side on one scale.

    Args:
        loads: title -> [L][E] shares, each row summing to 1. 1 on the scale is an even share.
    """
    figure, axes = _axes(1.5 + 3.2 * len(loads), 5, len(loads))
    scaled = {title: [[share * len(row) for share in row] for row in rows] for title, rows in loads.items()}
    top = max((x for rows in scaled.values() for row in rows for x in row), default=1.0)
    image = None
    for axis, (title, rows) in zip(axes, scaled.items(), strict=True):
        width = max(len(row) for row in rows)
        padded = [list(row) + [float("nan")] * (width - len(row)) for row in rows]
        image = axis.imshow(padded, aspect="auto", cmap="viridis", vmin=0, vmax=max(top, 2.0), interpolation="nearest")
        axis.set_title(title)
        axis.set_xlabel("expert")
        axis.set_ylabel("mixture layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(axes), label="load relative to an even share")
    _save(figure, path)
