"""Figures of evaluations beside the contact sheet of `report`: masks, and weights of regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import axes, colors, figure, patches, ticker
from matplotlib.backends import backend_agg

from grain_jax.evals import segmentation

INK, QUIET, GRID = "#222222", "#6B6B6B", "#E3E3E3"
# Told apart with colour-blind eyes too (Okabe and Ito, 2008).
COLORS = ("#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#7F5AA2", "#8C6D1F")
_BACKGROUND, _IGNORED, _OTHER = "#F2F2F2", "#BDBDBD", "#8A8A8A"


def mask_sheet(examples: Sequence[segmentation.Example]) -> figure.Figure:
  """A row for each image: the picture, its true mask, the mask by prompts, the groups.

  Args:
    examples: images to show, in this order.
  """
  rows = len(examples)
  picture = figure.Figure(
    figsize=(11.5, 0.9 + 2.3 * rows), layout="constrained", facecolor="white", dpi=100
  )
  picture.suptitle(explain_masks(examples), x=0.005, ha="left", fontsize=9, color=QUIET)
  backend_agg.FigureCanvasAgg(picture)
  grid = picture.add_gridspec(rows, 5, width_ratios=(1, 1, 1, 1, 0.9))
  titles = ("picture", "true mask", "by prompts (top-down)", "groups (bottom-up)")
  for row, example in enumerate(examples):
    cells = [picture.add_subplot(grid[row, column]) for column in range(5)]
    color = _colors_of(example)
    cells[0].imshow(example.image, interpolation="bicubic")
    cells[1].imshow(_painted(example.true, color), interpolation="nearest")
    cells[2].imshow(_painted(example.predicted, color), interpolation="nearest")
    cells[3].imshow(_groups(example.groups), interpolation="nearest")
    for title, ax in zip(titles, cells, strict=False):
      if row == 0:
        ax.set_title(title, fontsize=10, color=INK, loc="left")
    for ax in cells:
      ax.set_axis_off()
    legend = {
      example.labels[label]: value for label, value in color.items() if label in example.labels
    }
    shown = [
      patches.Patch(facecolor=value, edgecolor=QUIET, linewidth=0.5, label=_truncate(name))
      for name, value in {**legend, "another class": _OTHER}.items()
    ]
    cells[4].legend(
      handles=shown, loc="center left", fontsize=8, frameon=False, labelcolor=INK, borderpad=0
    )
  return picture


def explain_masks(examples: Sequence[segmentation.Example]) -> str:
  """What the grey of the masks by prompts is, counted on these images; two lines."""
  other = background = 0
  ignored = any((example.true == segmentation.IGNORED).any() for example in examples)
  for example in examples:
    known = example.true != segmentation.IGNORED
    grey = known & ~np.isin(example.predicted, np.unique([0, *example.true[known]]))
    other, background = other + grey.sum(), background + (grey & (example.true == 0)).sum()
  where = f"; {background / other:.0%} of it is background in truth" if other else ""
  return (
    f"dark grey, by prompts: another class, one that is not in the picture{where}\n"
    f"{'lighter grey: not annotated; ' if ignored else ''}groups: colours tell them apart and mean "
    "no class"
  )


def alpha_curves(results: Mapping[str, float | int]) -> figure.Figure | None:
  """Top-1 over the weight of the global embedding, a line for each set; None where none was tried.

  Args:
    results: by flat name; `zero_shot/SET/regions/alpha=A/top1` are drawn.
  """
  lines: dict[str, list[tuple[float, float]]] = {}
  for name, value in results.items():
    parts = name.split("/")
    if len(parts) == 5 and parts[2] == "regions" and parts[4] == "top1":
      lines.setdefault(parts[1], []).append((float(parts[3].removeprefix("alpha=")), value))
  if not lines:
    return None
  picture = figure.Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white", dpi=100)
  backend_agg.FigureCanvasAgg(picture)
  ax = picture.add_subplot()
  for i, (name, points) in enumerate(lines.items()):
    alphas, shares = (np.asarray(c, float) for c in zip(*sorted(points), strict=True))
    ax.plot(alphas, 100 * shares, color=COLORS[i % len(COLORS)], label=name, marker="o", ms=3)
  ax.set_xlabel("weight of the global embedding", color=QUIET, fontsize=9)
  ax.set_title("zero-shot top-1, %", loc="left", fontsize=11, color=INK)
  ax.xaxis.set_major_locator(ticker.MultipleLocator(0.2))
  tidy(ax)
  ax.legend(edgecolor="none", fontsize=9, labelcolor=INK)
  return picture


def tidy(ax: axes.Axes) -> None:
  """The house's look: horizontal grid alone, no frame but the bottom."""
  ax.grid(axis="y", color=GRID, linewidth=0.8)
  ax.set_axisbelow(True)
  ax.tick_params(colors=QUIET, labelsize=9, length=0)
  for side, spine in ax.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(GRID)


def _colors_of(example: segmentation.Example) -> dict[int, str]:
  """A colour for the background and each true class; what else is predicted shares one."""
  true = [int(v) for v in np.unique(example.true) if v not in (0, segmentation.IGNORED)]
  found = {label: COLORS[i % len(COLORS)] for i, label in enumerate(true)}
  return {0: _BACKGROUND, **found}


def _painted(mask: np.ndarray, color: Mapping[int, str]) -> np.ndarray:
  """A mask in its labels' colours: f64 [H, W, 3]."""
  table = np.tile(colors.to_rgb(_OTHER), (256, 1))
  table[segmentation.IGNORED] = colors.to_rgb(_IGNORED)
  for label, value in color.items():
    table[label] = colors.to_rgb(value)
  return table[mask]


def _groups(groups: np.ndarray) -> np.ndarray:
  table = np.asarray([colors.to_rgb(c) for c in COLORS])
  return table[groups % len(COLORS)]


def _truncate(text: str) -> str:
  return text if len(text) <= 22 else text[:21] + "…"
