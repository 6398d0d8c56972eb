"""What a run looks like: curves, a contact sheet of grounded pictures, a table of results."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, patches
from matplotlib.backends import backend_agg

from grain_jax import places
from grain_jax.evals import evidence, grounding, segmentation
from grain_jax.evals.page import curves, figures

_DPI = 100  # so that one point of layout below is one pixel
# One colour a region, told apart with colour-blind eyes too (Okabe and Ito, 2008), orange first.
_COLORS = ("#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#7F5AA2", "#8C6D1F")
_INK, _QUIET, _GRID = "#222222", "#6B6B6B", "#E3E3E3"
_FIGURE = {"facecolor": "white", "dpi": _DPI}


def write(
  figures_dir: str | pathlib.Path,
  history: Sequence[Mapping[str, Any]],
  *,
  examples: Sequence[grounding.Example] = (),
  segmented: Sequence[segmentation.Example] = (),
  results: Mapping[str, float | int] | None = None,
) -> list[pathlib.Path]:
  """Draws what there is to draw into `figures_dir`, which is made if it does not exist.

  Args:
    figures_dir: folder of the figures.
    history: objects with `step` and metrics by flat name (`metrics.read_jsonl`).
    examples: images of `grounding.evaluate(..., keep=12)`.
    segmented: images of `segmentation.evaluate_built(..., keep=8)`.
    results: by flat name.

  Returns:
    Paths written: `loss_curves.png` if the history has a loss, `contact_sheet.png` and `masks.png`
    if there are examples, `region_weights.png` if weights of regions were tried. Each appears whole
    or not at all.
  """
  figures_dir = places.at(figures_dir)
  figures_dir.mkdir(parents=True, exist_ok=True)
  drawn = {}
  if curves.series(history, "train/loss"):
    drawn["loss_curves.png"] = curves.loss_curves(history)
  if examples:
    drawn["contact_sheet.png"] = contact_sheet(examples)
  if segmented:
    drawn["masks.png"] = figures.mask_sheet(segmented)
  weights = figures.alpha_curves(results or {})
  if weights is not None:
    drawn["region_weights.png"] = weights
  for name, picture in drawn.items():
    png = io.BytesIO()
    picture.savefig(png, format="png", facecolor="white", dpi=_DPI)
    places.write_bytes(figures_dir / name, png.getvalue())
  return [figures_dir / name for name in drawn]


def format_table(results: Mapping[str, float | int]) -> str:
  """Results as text for the terminal, a block an evaluation: fractions as per cent, counts as such.

  What rests on few images, or cannot be told from chance, says so (`evidence.note`).

  Args:
    results: flat names such as `zero_shot/seen/top1`; floats in [-1, 1] are fractions, but
      for losses; ints are counts.

  Returns:
    Lines without a newline at the end.
  """
  if not results:
    return "no results"
  blocks: dict[str, list[tuple[str, str, str]]] = {}
  for name, value in results.items():
    head, _, rest = name.partition("/")
    blocks.setdefault(head if rest else "", []).append(
      (rest or head, _cell(name, value), evidence.note(name, results))
    )
  width = max(len(name) for rows in blocks.values() for name, _, _ in rows)
  right = max(len(text.rstrip(" %")) for rows in blocks.values() for _, text, _ in rows)
  lines = []
  for head, rows in blocks.items():
    lines += [head] if head else []
    for name, text, note in rows:
      number, _, unit = text.partition(" ")
      indent, pad = ("  ", width) if head else ("", width + 2)
      note = f"  ({note})" if note else ""
      lines.append(f"{indent}{name:<{pad}}  {number:>{right}} {unit}".rstrip() + note)
  return "\n".join(lines)


def _cell(name: str, value: float | int) -> str:
  if isinstance(value, (bool, str)) or value is None:
    return str(value)
  if isinstance(value, (int, np.integer)):
    return f"{value:,}"
  if -1 <= value <= 1 and not evidence.is_loss(name):  # a drop may be less than 0
    return f"{100 * value:.1f} %"
  return f"{value:.4g}"


# Layout of the contact sheet in pixels.
_SIDE, _GAP, _TOP, _LINE, _HEADER = 288, 24, 8, 15, 64


def contact_sheet(
  examples: Sequence[grounding.Example], *, columns: int = 4, side: int = _SIDE
) -> figure.Figure:
  """Pictures with boxes, and under each the description that every region retrieves.

  True boxes are white and dashed, predicted ones solid in the colour of their line of text. Under
  a wrong description stands the true one, in grey.

  Args:
    examples: images to show, in this order.
    columns: pictures a row.
    side: longer side of a picture in pixels, after scaling.
  """
  columns = max(1, min(columns, len(examples)))
  rows = [examples[i : i + columns] for i in range(0, len(examples), columns)]
  heights = [
    _TOP + side + 6 + _LINE * max(_lines(example) for example in row) + _GAP for row in rows
  ]
  width = columns * side + (columns + 1) * _GAP
  height = _HEADER + sum(heights)
  picture = figure.Figure(figsize=(width / _DPI, height / _DPI), **_FIGURE)
  canvas = backend_agg.FigureCanvasAgg(picture)
  sheet = _Sheet(picture, canvas.get_renderer(), width, height)
  title, limit = "Regions and the descriptions they retrieve", width - 2 * _GAP
  sheet.text(_GAP, 14, title, size=13, weight="bold", limit=limit)
  sheet.text(
    _GAP,
    37,
    "solid, in colour: predicted box    white, dashed: true box    "
    "under a wrong description: the true one, in grey",
    color=_QUIET,
    limit=limit,
  )
  top = _HEADER
  for row, row_height in zip(rows, heights, strict=True):
    for column, example in enumerate(row):
      _cell_of(sheet, example, _GAP + column * (side + _GAP), top + _TOP, side)
    top += row_height
  return picture


class _Sheet:
  """A figure addressed in pixels from its upper left corner."""

  def __init__(self, picture: figure.Figure, renderer: Any, width: float, height: float):
    self.picture, self.renderer, self.width, self.height = picture, renderer, width, height

  def axes(self, left: float, top: float, width: float, height: float) -> axes.Axes:
    bottom = self.height - top - height
    box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
    return self.picture.add_axes(box)

  def text(
    self,
    left: float,
    top: float,
    text: str,
    *,
    color: str = _INK,
    size: float = 11,
    weight: str = "normal",
    limit: float = math.inf,
  ) -> None:
    """One line, `size` pixels high, cut with an ellipsis where it is wider than `limit` pixels."""
    shown = self.picture.text(
      left / self.width,
      1 - top / self.height,
      text,
      color=color,
      fontsize=size * 72 / _DPI,
      fontweight=weight,
      va="top",
      parse_math=False,
    )
    while text and shown.get_window_extent(self.renderer).width > limit:
      text = text[:-1]
      shown.set_text(text.rstrip() + "…")


def _lines(example: grounding.Example) -> int:
  """Lines of text under a picture: one a region, two where the description is wrong."""
  return sum(1 + _wrong(example, r) for r in range(len(example.boxes)))


def _wrong(example: grounding.Example, region: int) -> bool:
  true = example.descriptions[region]
  return bool(true) and true != example.retrieved[region]


def _cell_of(
  sheet: _Sheet, example: grounding.Example, left: float, top: float, side: float
) -> None:
  """One picture with its boxes, and its lines of text."""
  pixels_high, pixels_wide = example.image.shape[:2]
  scale = side / max(pixels_high, pixels_wide)
  wide, high = pixels_wide * scale, pixels_high * scale
  ax = sheet.axes(left, top, wide, high)
  ax.imshow(example.image, interpolation="bicubic", extent=(0, wide, high, 0), aspect="auto")
  ax.set_axis_off()
  for box in example.boxes:
    _box(ax, box, wide, high, color="#00000090", width=3.2, style="-")
    _box(ax, box, wide, high, color="white", width=1.6, style=(0, (4, 3)))
  taken: list[tuple[float, float]] = []
  for region, box in enumerate(example.predicted):
    color = _COLORS[region % len(_COLORS)]
    _box(ax, box, wide, high, color="white", width=3.4, style="-")
    _box(ax, box, wide, high, color=color, width=2.0, style="-")
  for region, box in enumerate(example.predicted):
    _tag(
      ax, box, wide, high, text=str(region + 1), color=_COLORS[region % len(_COLORS)], taken=taken
    )
  below = top + side + 6
  for region in range(len(example.boxes)):
    color = _COLORS[region % len(_COLORS)]
    found = " ".join(example.retrieved[region].split()) or "(no descriptions)"
    overlap = f"IoU {example.iou[region]:.2f}"
    sheet.text(left, below, str(region + 1), color=color, weight="bold")
    sheet.text(left + 14, below, found, color=color, weight="bold", limit=side - 14 - 62)
    sheet.text(left + side - 54, below, overlap, color=_QUIET)
    below += _LINE
    if _wrong(example, region):
      true = " ".join(example.descriptions[region].split())
      sheet.text(left + 14, below, f"true: {true}", color=_QUIET, limit=side - 14)
      below += _LINE


def _box(
  ax: axes.Axes, box: np.ndarray, wide: float, high: float, *, color: str, width: float, style: Any
) -> None:
  cx, cy, w, h = (float(v) for v in box)
  ax.add_patch(
    patches.Rectangle(
      ((cx - w / 2) * wide, (cy - h / 2) * high),
      w * wide,
      h * high,
      fill=False,
      edgecolor=color,
      linewidth=width * 72 / _DPI,
      linestyle=style,
      joinstyle="miter",
    )
  )


def _tag(
  ax: axes.Axes,
  box: np.ndarray,
  wide: float,
  high: float,
  *,
  text: str,
  color: str,
  taken: list[tuple[float, float]],
) -> None:
  """The region's number in the first corner of its box where no other number stands."""
  size = 15.0
  cx, cy, w, h = (float(v) for v in box)
  corners = [(cx - w / 2, cy - h / 2), (cx + w / 2, cy - h / 2)]
  corners += [(cx - w / 2, cy + h / 2), (cx + w / 2, cy + h / 2)]
  spots = [
    (min(max(x * wide, size / 2), wide - size / 2), min(max(y * high, size / 2), high - size / 2))
    for x, y in corners
  ]
  free = [s for s in spots if all(max(abs(s[0] - t[0]), abs(s[1] - t[1])) >= size for t in taken)]
  x, y = (free or spots)[0]
  taken.append((x, y))
  ax.add_patch(
    patches.Rectangle((x - size / 2, y - size / 2), size, size, facecolor=color, edgecolor="none")
  )
  ax.text(
    x,
    y,
    text,
    color="white",
    fontsize=10 * 72 / _DPI,
    fontweight="bold",
    ha="center",
    va="center_baseline",
  )
