"""Curves of a run over its steps: losses, learning rate, gradient norm, evaluations, speed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, ticker
from matplotlib.backends import backend_agg

from grain_jax.evals.page import figures

_SMOOTHED_FROM = 120  # points from which a running mean is drawn over the raw line


def series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
  """(step, value) of one metric by rising step; of a step written twice (a resumed run), the last.

  Values that are not finite are left out.
  """
  points = {entry["step"]: entry[name] for entry in history if name in entry}
  return sorted(
    (step, float(v)) for step, v in points.items() if v is not None and math.isfinite(v)
  )


def loss_curves(history: Sequence[Mapping[str, Any]]) -> figure.Figure:
  """Losses, learning rate, gradient norm, evaluations and speed over steps: what there is of it."""
  names = sorted({name for entry in history for name in entry})
  losses = ["train/loss"] + [n for n in names if n.startswith("train/loss_")]
  panels = [
    ("loss", losses, 1.0),
    ("learning rate", ["train/learning_rate"], 1.0),
    (_GRADIENT_NORM, ["train/gradient_norm"], 1.0),
    ("evaluation, %", _headlines(names), 100.0),
    ("samples a second", ["train/samples_per_second"], 1.0),
  ]
  panels = [panel for panel in panels if any(series(history, name) for name in panel[1])]

  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  size = (5.0 * columns, 4.2 * rows)
  picture = figure.Figure(figsize=size, layout="constrained", facecolor="white", dpi=100)
  backend_agg.FigureCanvasAgg(picture)
  for i, (title, shown, scale) in enumerate(panels):
    ax = picture.add_subplot(rows, columns, i + 1)
    _panel(ax, title)
    for j, name in enumerate(shown):
      color = figures.INK if name == "train/loss" else figures.COLORS[j % len(figures.COLORS)]
      _curve(ax, series(history, name), label=_label(name), color=color, scale=scale)
    ax.set_xlim(left=0)
    if title == _GRADIENT_NORM and all(v > 0 for _, v in series(history, shown[0])):
      ax.set_yscale("log")  # the first steps' is a hundred times the others'
    else:
      ax.set_ylim(bottom=0)
    if len(shown) > 1:
      ax.legend(edgecolor="none", framealpha=0.9, fontsize=9, labelcolor=figures.INK)
  return picture


def _headlines(names: Sequence[str]) -> list[str]:
  """Results that the curves show, a colour each: of built data, then the first of outside sets."""
  sets = [n.removesuffix("rows") for n in names if re.fullmatch(r"[a-z_]+/[^/]+/rows", n)]
  main = [n for n in names if n.endswith(("/top1", "/r1")) and n.startswith(tuple(sets))]
  return [*(n for n in _HEADLINES if n in names), *main][: len(figures.COLORS)]


_GRADIENT_NORM = "gradient norm"
# What the panel of evaluations shows, of what a run has evaluated on built data.
_HEADLINES = (
  "zero_shot/top1",
  "zero_shot/seen/top1",
  "zero_shot/unseen/top1",
  "retrieval/image_to_text/r1",
  "retrieval/text_to_image/r1",
  "grounding/mean_iou",
  "grounding/description_top1",
  "composition/average",
  "segmentation/miou",
)
_LABELS = {
  "train/loss": "total",
  "zero_shot/top1": "zero-shot",
  "zero_shot/seen/top1": "zero-shot, seen pairs",
  "zero_shot/unseen/top1": "zero-shot, unseen pairs",
  "retrieval/image_to_text/r1": "image to text R@1",
  "retrieval/text_to_image/r1": "text to image R@1",
  "grounding/mean_iou": "mean IoU",
  "grounding/description_top1": "region to description",
}


def _label(name: str) -> str:
  words = name.removeprefix("train/loss_").removesuffix("/top1").removesuffix("/r1")
  return _LABELS.get(name, words.replace("_", " ").replace("/", " · "))


def _panel(ax: axes.Axes, title: str) -> None:
  ax.set_title(title, loc="left", fontsize=11, color=figures.INK)
  ax.set_xlabel("step", color=figures.QUIET, fontsize=9)
  ax.grid(axis="y", color=figures.GRID, linewidth=0.8)
  ax.set_axisbelow(True)
  ax.tick_params(colors=figures.QUIET, labelsize=9, length=0, which="both")
  ax.xaxis.set_major_locator(ticker.MaxNLocator(nbins=5, integer=True))
  ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  for side, spine in ax.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(figures.GRID)


def _curve(
  ax: axes.Axes, points: list[tuple[int, float]], *, label: str, color: str, scale: float
) -> None:
  """One line; a long one is drawn pale, with its running mean over it."""
  if not points:
    return
  steps, values = (np.asarray(column, float) for column in zip(*points, strict=True))
  values = values * scale
  marker = "o" if len(points) < 30 else ""
  if len(points) < _SMOOTHED_FROM:
    ax.plot(steps, values, color=color, label=label, linewidth=1.6, marker=marker, markersize=3)
    return
  window = max(3, len(points) // 50)
  mean = np.convolve(values, np.ones(window) / window, mode="valid")
  middle = steps[(window - 1) // 2 : (window - 1) // 2 + len(mean)]
  ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
  ax.plot(middle, mean, color=color, label=label, linewidth=1.6)
