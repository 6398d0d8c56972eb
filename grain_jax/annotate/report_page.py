"""HTML of the report on annotations: figures as tables and SVG, images with their boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax.annotate import report_counts
from grain_jax.data.building import figures

_FREQUENT = 20  # descriptions
_MOST_BARS = 20  # of counts an image; the last bar is of all that are more
_BAR, _PALE = "#0072B2", "#B8CFE0"
_PARTS = (
  ("images", "images"), ("many", "how many an image"), ("scores", "scores"),
  ("missing", "without a box"), ("dropped", "dropped"), ("frequent", "most frequent"),
  ("text_only", "text only"), ("cost", "time and cost"),
)  # fmt: skip
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 1.5rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: .8rem 0 .1rem; }
p { margin: .3rem 0 .8rem; } a { color: #00558a; } .quiet { color: #595959; font-size: .9em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid #e3e3e3; }
th { color: #595959; font-weight: 600; vertical-align: bottom; }
td .quiet { overflow-wrap: anywhere; }
.number { text-align: right; } td.number { white-space: nowrap; }
.key { display: grid; gap: .8rem; margin-bottom: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.key div { border: 1px solid #e3e3e3; padding: .5rem .7rem; }
.key b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts, .images { display: grid; gap: 1.2rem; align-items: start; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.charts svg { width: 100%; max-width: 30rem; height: auto; }
.images { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; border: 1px solid #e3e3e3; } figcaption { padding: .4rem .6rem .6rem; }
.picture { position: relative; aspect-ratio: 1; background: #f3f3f3; }
.picture img, .picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.picture img { object-fit: contain; }
ul, ol { margin: .2rem 0; padding-left: 1.3rem; } .regions { list-style: none; padding: 0; }
.regions b { display: inline-block; min-width: 1.2em; padding: 0 .2em; margin-right: .4em;
  text-align: center; border: 2px solid; border-radius: 3px; font-size: .8em; }
.lost { color: #a32100; } .lost ul { list-style: none; padding: 0; margin: 0; }
"""


class Shown(NamedTuple):
  """An image of the contact sheet."""

  key: str
  jpeg: str  # base64
  size: tuple[int, int]  # (width, height)
  captions: list[str]
  regions: list[Mapping[str, Any]]
  without_box: list[str]  # descriptions


def page(
  name: str,
  counts: report_counts.Counts,
  asked: report_counts.Asked | None,
  stages: report_counts.Chain,
  shown: Sequence[Shown],
) -> str:
  """The page.

  Args:
    name: of what was annotated.
    counts: of the lines of the last stage.
    asked: what the detector said; None: there was none.
    stages: manifests of all stages.
    shown: images of the contact sheet.
  """
  names = " → ".join(one["stage"] for one in stages.manifests)
  parts = [
    f"<h1>{figures.escaped(name)}: annotations</h1>",
    f'<p class="quiet">{figures.escaped(names)}. Read it before you spend more: are the boxes '
    "around what their descriptions say, and do the descriptions say what is there?</p>",
    _key_figures(counts, asked),
    f'<p class="quiet">{" · ".join(f"<a href=#{at}>{about}</a>" for at, about in _PARTS)}</p>',
    f"<h2 id=images>{len(shown)} images, chosen by chance</h2>",
    '<p class="quiet">By a hash of their keys. In red: descriptions without a box.</p>',
    f'<div class="images">{"".join(map(_figure, shown))}</div>',
    "<h2 id=many>How many an image</h2>",
    _per_image(counts),
    *_scores(counts, asked),
    *_missing(counts, asked),
    *_dropped(stages),
    *_frequent(counts),
    *_text_only(counts),
    *_spent(stages),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{figures.escaped(name)}: annotations</title><style>{_STYLE}</style></head>"
    f"<body>{''.join(parts)}</body></html>\n"
  )


def _key_figures(counts: report_counts.Counts, asked: report_counts.Asked | None) -> str:
  figures = [
    ("images", f"{counts.images:,}"),
    ("descriptions an image", _ratio(counts.descriptions, counts.images)),
    ("boxes an image", _ratio(counts.regions, counts.images)),
    ("descriptions without a box", _share(counts.without_box, counts.different)),
    ("images with text only", _share(counts.text_only, counts.images)),
    ("false captions", f"{counts.negatives:,}"),
  ]
  if asked is None:
    figures[3] = ("descriptions without a box", "no detector yet")
  return (
    '<div class="key">' + "".join(f"<div><b>{v}</b>{name}</div>" for name, v in figures) + "</div>"
  )


def _per_image(counts: report_counts.Counts) -> str:
  charts = (
    ("Descriptions an image", counts.descriptions_per_image, counts.descriptions),
    ("Boxes an image", counts.boxes_per_image, counts.regions),
  )
  drawn = []
  for title, table, total in charts:
    last = min(max(table, default=0), _MOST_BARS)
    values = [sum(n for k, n in table.items() if min(k, _MOST_BARS) == i) for i in range(last + 1)]
    labels = [str(i) for i in range(last + 1)]
    if max(table, default=0) > _MOST_BARS:
      labels[-1] = f"{_MOST_BARS}+"
    about = f"{title}: {total:,} in all, mean {_ratio(total, counts.images)}"
    drawn.append(_chart(about, values, labels, every=1 if last <= 10 else 5))
  return f'<div class="charts">{"".join(drawn)}</div>'


def _scores(counts: report_counts.Counts, asked: report_counts.Asked | None) -> Iterable[str]:
  yield "<h2 id=scores>Scores</h2>"
  labels = [f"{i / report_counts.BINS:.2g}" for i in range(report_counts.BINS)]
  charts = [_chart("Boxes by score, those of the source among them", counts.region_scores, labels)]
  if asked is not None:
    about = f"Descriptions by the score of their best box; threshold {asked.threshold:g}"
    charts.append(_chart(about, asked.scores, labels, least=asked.threshold))
  yield f'<div class="charts">{"".join(charts)}</div>'
  if asked is not None:
    rows = [
      [f"{threshold:g}", _share(above, asked.asked), _share(asked.asked - above, asked.asked)]
      for threshold, above in asked.above.items()
    ]
    yield "<h3>What another threshold would leave</h3>"
    yield _table(["threshold", "descriptions with a box", "without"], rows, numbers=(0, 1, 2))


def _missing(counts: report_counts.Counts, asked: report_counts.Asked | None) -> Iterable[str]:
  yield "<h2 id=missing>Descriptions without a box</h2>"
  if asked is None:
    yield "<p>No detector has looked for them yet.</p>"
    return
  yield (
    f"<p>{counts.without_box:,} of {counts.different:,} descriptions "
    f"({_share(counts.without_box, counts.different)}) have no box: a measure of what the "
    "describer makes up, and of what the detector does not know. (Equal descriptions of an image "
    "count once.)</p>"
  )
  under = asked.asked - asked.found - asked.without_candidate
  rest = counts.without_box - under - asked.without_candidate
  rows = [
    ["named by the describer and looked for by the detector", f"{asked.asked:,}", ""],
    ["found", f"{asked.found:,}", _share(asked.found, asked.asked)],
    ["best box not above the threshold", f"{under:,}", _share(under, asked.asked)],
    ["of these less than 0.05 under it", f"{asked.near:,}", _share(asked.near, asked.asked)],
    ["no box in the image at all", f"{asked.without_candidate:,}",
     _share(asked.without_candidate, asked.asked)],
    ["images with half of their descriptions or more not found", f"{asked.images_half:,}",
     f"{_share(asked.images_half, asked.images)} of images"],
  ]  # fmt: skip
  if rest > 0:  # in images that failed, or nothing of them can be read
    rows.append(["never looked for (see Dropped)", f"{rest:,}", ""])
  yield "<h3>Where the two stages disagree</h3>" + _table(["", "", ""], rows, numbers=(1, 2))
  rows = [
    [f"{words} words", f"{all_:,}", _share(without, all_)]
    for words, (all_, without) in sorted(counts.by_words.items())
  ]
  yield "<h3>By length</h3>"
  yield _table(["", "descriptions", "without a box"], rows, numbers=(1, 2))


def _dropped(stages: report_counts.Chain) -> Iterable[str]:
  yield "<h2 id=dropped>Dropped</h2>"
  rows = []
  for one in stages.manifests:
    losses = sorted(one["losses"].items(), key=lambda entry: (-entry[1]["count"], entry[0]))
    for name, entry in losses:
      what, _, why = name.partition("/")
      first = ", ".join(map(figures.escaped, entry["first"][:3]))
      told = f'{figures.escaped(why.replace("_", " "))}<br><span class="quiet">{first}</span>'
      rows.append(
        [figures.escaped(one["stage"]), figures.escaped(what), told, f"{entry['count']:,}"]
      )
  if not rows:
    yield "<p>Nothing was dropped.</p>"
    return
  yield _table(["stage", "what", "why, and the first of them", "number"], rows, numbers=(3,))


def _frequent(counts: report_counts.Counts) -> Iterable[str]:
  rows = [
    [figures.escaped(text), f"{images:,}", _share(without, images)]
    for text, (images, without) in counts.frequent(_FREQUENT)
  ]
  about = " (rare ones were left out while counting)" if counts.approximate else ""
  yield f"<h2 id=frequent>Most frequent descriptions{about}</h2>"
  if rows:
    yield _table(["description", "images", "without a box"], rows, numbers=(1, 2))
  else:
    yield "<p>There are none.</p>"


def _text_only(counts: report_counts.Counts) -> Iterable[str]:
  yield "<h2 id=text_only>Images with text only</h2>"
  keys = ", ".join(map(figures.escaped, counts.text_only_keys))
  more = ", ..." if counts.text_only > len(counts.text_only_keys) else ""
  yield (
    f"<p>{counts.text_only:,} of {counts.images:,} images "
    f"({_share(counts.text_only, counts.images)}) have no box: they teach GRAIN nothing about "
    f"regions.{f' First: {keys}{more}' if keys else ''}</p>"
  )


def _spent(stages: report_counts.Chain) -> Iterable[str]:
  yield "<h2 id=cost>Time and cost</h2>"
  rows = [
    ["images", *(f"{one['counts'].get('read', 0):,}" for one in stages.manifests)],
    ["failed", *(f"{one['counts'].get('failed', 0):,}" for one in stages.manifests)],
    ["hours of work", *(f"{one['seconds'] / 3600:,.2f}" for one in stages.manifests)],
    ["seconds an image", *(_number(_pace(one)) for one in stages.manifests)],
    ["hours a million images", *(_number(_pace(one) / 0.0036) for one in stages.manifests)],
  ]
  for name in dict.fromkeys(name for one in stages.manifests for name in one["totals"]):
    spent = (one["totals"].get(name) for one in stages.manifests)
    rows.append(
      [figures.escaped(name.replace("_", " ")), *("" if x is None else _number(x) for x in spent)]
    )
  header = ["", *(figures.escaped(one["stage"]) for one in stages.manifests)]
  yield _table(header, rows, numbers=range(1, len(header)))
  yield '<p class="quiet">Work is that of all workers, added up.</p>'
  if stages.lost:
    yield (
      f'<p class="lost">{figures.escaped(stages.lost)}, which the first of these stages was given, '
      "has no manifest of a stage (any more): its time and drops are missing here.</p>"
    )


def _pace(manifest: Mapping[str, Any]) -> float:
  """Seconds of work an image."""
  return manifest["seconds"] / max(1, manifest["counts"].get("read", 0))


def _number(number: float) -> str:
  return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def _chart(
  title: str, values: Sequence[int], labels: Sequence[str], *, every: int = 2, least: float = 0.0
) -> str:
  """A bar for each value, of which those below `least` (of scores) are pale; its SVG."""
  width, height, left, bottom, top = 360, 190, 8, 26, 22
  step = (width - 2 * left) / max(1, len(values))
  most = max(values, default=0) or 1
  bars, highest = [], values.index(max(values)) if values else 0
  for i, (value, label) in enumerate(zip(values, labels, strict=True)):
    x, tall = left + i * step, (height - bottom - top) * value / most
    color = _PALE if (i + 1) / len(values) <= least + 1e-9 else _BAR
    bars.append(
      f'<rect x="{x + 1:.1f}" y="{height - bottom - tall:.1f}" width="{max(1, step - 2):.1f}" '
      f'height="{tall:.1f}" fill="{color}"><title>{label}: {value:,}</title></rect>'
    )
    if i % every == 0 or i == len(values) - 1 and label.endswith("+"):
      bars.append(
        f'<text x="{x + step / 2:.1f}" y="{height - 9}" text-anchor="middle" font-size="12" '
        f'fill="#595959">{label}</text>'
      )
    if i == highest and value:
      anchor = "start" if i < 2 else "end" if i > len(values) - 3 else "middle"
      place = {"start": x, "end": x + step, "middle": x + step / 2}[anchor]
      bars.append(
        f'<text x="{place:.1f}" y="{top - 6}" text-anchor="{anchor}" font-size="12" '
        f'fill="#222">{value:,}</text>'
      )
  axis = height - bottom + 0.5
  return (
    f'<div><h3>{title}</h3><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    f'{"".join(bars)}<path d="M{left} {axis}H{width - left}" stroke="#999"/></svg></div>'
  )


def _figure(shown: Shown) -> str:
  width, height = shown.size
  boxes = [
    figures.box_over(i, r["box"], shown.size) for i, r in enumerate(shown.regions[: figures.MOST])
  ]
  regions = [
    figures.numbered(i, region["description"])
    + f' <span class="quiet">{region["score"]:.2f}</span>'
    for i, region in enumerate(shown.regions)
  ]
  alt = figures.escaped(shown.captions[0]) if shown.captions else ""
  lost = figures.listed("ul", map(figures.escaped, shown.without_box))
  return (
    f'<figure><div class="picture"><img src="data:image/jpeg;base64,{shown.jpeg}" width="{width}" '
    f'height="{height}" alt="{alt}"><svg viewBox="0 0 {width} {height}" aria-hidden="true">'
    # In reverse, so that the first ones lie on top.
    f"{''.join(reversed(boxes))}</svg></div><figcaption>"
    f'<div class="quiet">{figures.escaped(shown.key)}</div>'
    f"{figures.listed('ol', map(figures.escaped, shown.captions))}"
    f"{figures.listed('ul class=regions', regions)}"
    f"{f'<div class=lost>no box: {lost}</div>' if lost else ''}</figcaption></figure>"
  )


def _table(
  header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()
) -> str:
  """A table of HTML cells; columns of `numbers` to the right."""
  right = set(numbers)

  def line(tag: str, cells: Sequence[str]) -> str:
    cells = [
      f"<{tag}{' class=number' if i in right else ''}>{cell}</{tag}>"
      for i, cell in enumerate(cells)
    ]
    return f"<tr>{''.join(cells)}</tr>"

  body = "".join(line("td", row) for row in rows)
  head = line("th", header) if any(header) else ""
  return f'<div class="wide"><table>{head}{body}</table></div>'


def _ratio(a: float, b: float) -> str:
  return f"{a / b:.2f}" if b else "0"


def _share(a: float, b: float) -> str:
  return f"{100 * a / b:.1f} %" if b else "-"
