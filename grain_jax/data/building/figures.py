"""Pieces of pages with images: boxes over them, lists, texts as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from grain_jax.data.building import tally

MOST = 12  # boxes or texts of an image that are shown
_LONGEST = 300  # characters of a text
# Told apart with colour-blind eyes too (Okabe and Ito, 2008), orange first.
_COLORS = ("#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#7F5AA2", "#8C6D1F")


def box_over(number: int, box: Sequence[float], size: tuple[int, int]) -> str:
  """A box over a picture of a size, in its colour and with its number, on white."""
  width, height = size
  ymin, xmin, ymax, xmax = (x * side for x, side in zip(box, (height, width) * 2, strict=True))
  place = f'x="{xmin:.1f}" y="{ymin:.1f}" width="{xmax - xmin:.1f}" height="{ymax - ymin:.1f}"'
  rects = "".join(
    f'<rect {place} fill="none" stroke="{color}" stroke-width="{wide}" '
    'vector-effect="non-scaling-stroke"/>'
    for color, wide in (("#fff", 4), (color_of(number), 2))
  )
  x, y = min(xmin + 4, width - 9), min(ymin + 15, height - 3)
  return (
    f'{rects}<text x="{x:.1f}" y="{y:.1f}" font-size="14" font-weight="700" paint-order="stroke" '
    f'stroke="#fff" stroke-width="4" fill="{color_of(number)}">{number + 1}</text>'
  )


def listed(tag: str, items: Iterable[str]) -> str:
  """A list of HTML lines, of which MOST are shown; '' where there is none."""
  lines = list(items)
  if not lines:
    return ""
  more = f"<li class=quiet>and {len(lines) - MOST} more</li>" if len(lines) > MOST else ""
  body = "".join(f"<li>{line}</li>" for line in lines[:MOST])
  return f"<{tag}>{body}{more}</{tag.split()[0]}>"


def color_of(number: int) -> str:
  """Of a box and its description."""
  return _COLORS[number % len(_COLORS)]


def numbered(number: int, description: str) -> str:
  """A description with its box's number, in its colour."""
  return f'<b style="border-color:{color_of(number)}">{number + 1}</b>{escaped(description)}'


def escaped(text: str) -> str:
  """A text as HTML, cut where it is very long."""
  text = tally.printable(text)
  return html.escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")
