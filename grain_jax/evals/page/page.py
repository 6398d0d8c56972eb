"""report.html: all results of a checkpoint on one page, the published figures beside them.

The page is one file: its pictures are in it, and it needs no network.
"""

from __future__ import annotations

import base64
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grain_jax import places
from grain_jax.evals import evidence

_PUBLISHED = pathlib.Path(__file__).parent / "published.json"

# Families in the order of the page: title, and what the figures are.
_FAMILIES = {
  "zero_shot": (
    "Zero-shot classification",
    "The class whose prompts are nearest to the image. top-K: its own class is among the K "
    "nearest of all; mean per class: the mean of the classes' top-1. A set's own row is that of "
    "the protocol templates; other protocols have rows of their own.",
  ),
  "composition": (
    "Composition",
    "Share of pictures that are nearer to their caption than to a caption changed in one detail; "
    "chance is 50 % with one false caption. A tie counts as wrong.",
  ),
  "retrieval": (
    "Retrieval",
    "Recall at K: a right caption is among the K nearest of all (image to text), the right image "
    "among the K nearest (text to image).",
  ),
  "grounding": (
    "Grounding",
    "Boxes of the region queries against annotated ones: mean intersection over union (IoU), "
    "share of boxes found at an IoU of 0.5, descriptions retrieved by regions.",
  ),
  "detection": ("Detection", "Average precision (AP) of COCO, through pycocotools."),
  "region_classification": (
    "Region classification",
    "The class of a given box among all, by crop, by region query or by patches.",
  ),
  "fine_grained": (
    "Fine-grained descriptions",
    "The true description of a given box among false ones changed in one attribute.",
  ),
  "segmentation": (
    "Segmentation",
    "Each patch takes the class whose prompt is nearest; IoU of the classes' pixels over the set.",
  ),
  "grouping": (
    "Grouping",
    "Patches grouped without any text; Jaccard: the best IoU of a group with each object.",
  ),
  "validation": (
    "Validation",
    "The training losses on images that are not trained on, without dropout. A contrastive loss "
    "grows with its batch.",
  ),
  "waterbirds": (
    "Waterbirds",
    "Land birds and water birds on both backgrounds; the drop is what a foreign background costs.",
  ),
}
_TERMS = {
  **{f"top{k}": f"top-{k}" for k in (1, 5)},
  **{f"r{k}": f"R@{k}" for k in (1, 5, 10)},
  **{f"ap{x}": f"AP{x}" for x in ("", "50", "75")},
  **{f"ar{x}": f"AR{x}" for x in ("1", "10", "100", "300")},
  "iou": "IoU",
  "miou": "mean IoU",
  "att": "attribute",
  "obj": "object",
  "rel": "relation",
}
_CAPTIONS = {  # of figures, by the name of their file
  "loss_curves": "The run over its steps. A long curve is pale, under its running mean.",
  "contact_sheet": "White, dashed: true boxes. In colour: the box of the region query that is "
  "matched with each, and the description nearest to it among all; under a wrong one, in grey, the "
  "true one.",
  "masks": "By prompts: each patch takes the nearest of the prompts for all classes and for the "
  "background. A class of the picture has one colour in both masks; a class that is not in the "
  "picture is grey, as another class. That is mostly background, which few prompts describe: the "
  "figure says how much. Groups are patches that are alike, found without any text; their colours "
  "mean no class.",
  "region_weights": "Classification by regions: accuracy over the weight of the global embedding.",
}
# On a phone a row of a table is a card: its name, then a line for each of its columns.
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem; }
p { margin: .3rem 0 .8rem; } .quiet { color: #6b6b6b; font-size: .92em; }
.wide { overflow-x: auto; } li { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: .6rem; }
th { text-align: right; font-weight: 600; color: #6b6b6b; padding: .25rem .5rem;
  border-bottom: 2px solid #e3e3e3; vertical-align: bottom; }
td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid #e3e3e3;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td .quiet { display: block; font-size: .8em; }
td.note, td.published { text-align: left; color: #6b6b6b; white-space: normal; min-width: 7rem; }
td.published { min-width: 14rem; } th.note, th.published { text-align: left; }
img { box-sizing: border-box; max-width: 100%; border: 1px solid #e3e3e3; margin: .4rem 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem;
  margin: .6rem 0; }
dt { color: #6b6b6b; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  table, tbody, tr { display: block; } tr.head { display: none; }
  tr { border-bottom: 2px solid #e3e3e3; padding: .5rem 0; }
  td, td.note, td.published { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .1rem 0; min-width: 0; white-space: normal; text-align: right; }
  td:first-child { font-weight: 600; }
  td[data-label]::before { content: attr(data-label); color: #6b6b6b; text-align: left; }
  td.published, td.published::before { display: block; text-align: left; }
  td > div { min-width: 0; overflow-wrap: anywhere; } td:empty { display: none; }
  .wide img { max-width: none; width: 720px; }
}
"""


class Figure(NamedTuple):
  """A published figure: the result that it is to be compared with."""

  key: str  # flat name of the result
  system: str
  value: float  # a fraction, as results are
  source: str


def published() -> list[Figure]:
  """Figures of the papers and of their released notebooks."""
  return [
    Figure(**entry) for entry in json.loads(_PUBLISHED.read_text(encoding="utf-8"))["figures"]
  ]


def write(
  path: pathlib.Path,
  results: Mapping[str, float | int],
  *,
  title: str,
  facts: Mapping[str, str],
  figures: Sequence[pathlib.Path] = (),
  warnings: Sequence[str] = (),
  links: Mapping[str, str] | None = None,
  sets: Mapping[str, str] | None = None,
) -> None:
  """Writes the page, whole or not at all.

  Args:
    path: of the page.
    results: by flat name, FAMILY/.../METRIC; floats are fractions, ints counts.
    title: its heading.
    facts: what is to be known about the model and the run: name -> value.
    figures: PNG files that it shows; they are copied into it.
    warnings: lines about what was left out.
    links: addresses, as seen from the page, of what some of the facts name.
    sets: what the families' rows without a set of their own are of: family -> "scenes/objects".
  """
  parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts, links or {})]
  if warnings:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in warnings)
    parts.append(f"<h2>Left out</h2><ul>{lines}</ul>")
  known = published()
  families = dict.fromkeys(name.partition("/")[0] for name in results)
  order = [name for name in _FAMILIES if name in families]
  for family in order + [name for name in families if name not in _FAMILIES]:
    parts.append(_section(family, results, known, (sets or {}).get(family, "the built data")))
  if figures:
    parts.append("<h2>Figures</h2>")
    parts += [_picture(figure) for figure in figures]
  parts.append(
    '<p class="quiet">Shares are per cent; below a share of decisions stands its 95 % interval '
    "(Wilson), as if they were independent of each other. Chance is what guessing would give, "
    "where that is known. A row over fewer than "
    f'{evidence.FEW} images or decisions says so. "Examples" were counted, of "rows" given; built '
    "data fills its last batch up with empty rows. Published figures are of models trained on far "
    "more data or on other data than a small run: they say where the systems stand, not what this "
    "checkpoint should have.</p>"
  )
  text = (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
  )
  places.write_text(path, text)


def _facts(facts: Mapping[str, str], links: Mapping[str, str]) -> str:
  rows = ""
  for name, value in facts.items():
    shown = html.escape(str(value))
    if name in links:
      shown = f'<a href="{html.escape(links[name])}">{shown}</a>'
    rows += f"<dt>{html.escape(name)}</dt><dd>{shown}</dd>"
  return f"<dl>{rows}</dl>"


def _section(
  family: str, results: Mapping[str, float | int], known: Sequence[Figure], built: str
) -> str:
  """A table of a family: a row for each set, shares and counts as columns."""
  title, about = _FAMILIES.get(family, (family.replace("_", " ").capitalize(), ""))
  rows: dict[str, dict[str, float | int]] = {}
  names: dict[str, dict[str, str]] = {}  # of the results, likewise
  of_row: dict[str, list[Figure]] = {}
  own = {name.partition("/")[2]: v for name, v in results.items() if name.startswith(f"{family}/")}
  parents = {rest.rpartition("/")[0] for rest in own}
  for rest, value in own.items():
    row, _, metric = rest.rpartition("/")
    if rest in parents:  # a share with counts below its own name: `swap_att`, `swap_att/examples`
      row, metric = rest, "accuracy"
    rows.setdefault(row, {})[metric] = value
    names.setdefault(row, {})[metric] = f"{family}/{rest}"
  for figure in known:
    head, _, rest = figure.key.partition("/")
    row = rest.rpartition("/")[0]
    if head == family and row in rows:
      of_row.setdefault(row, []).append(figure)
  columns = dict.fromkeys(metric for row in rows.values() for metric in row)
  shares = [c for c in columns if any(isinstance(r.get(c), float) for r in rows.values())]
  counts = [c for c in columns if c not in shares]
  notes = {row: _notes(own_names, results) for row, own_names in names.items()}
  chances = {row: _chances(own_names, results) for row, own_names in names.items()}
  heads = [(_words(c) if evidence.is_loss(c) else f"{_words(c)}, %", "") for c in shares] + [
    (_words(c), "") for c in counts
  ]
  heads += [("chance, %", "note")] if any(chances.values()) else []
  heads += [("to be said", "note")] if any(notes.values()) else []
  heads += [("published, %", "published")] if of_row else []
  body = ""
  for row, values in sorted(rows.items(), key=lambda item: item[0] != ""):  # the set itself first
    cells = [_share(names[row].get(c), results) for c in shares]
    cells += [_count(values.get(c)) for c in counts]
    cells += [html.escape(chances[row])] if any(chances.values()) else []
    cells += [html.escape(notes[row])] if any(notes.values()) else []
    cells += [_figures(of_row.get(row, []))] if of_row else []
    shown = "".join(_cell(cell, *head) for cell, head in zip(cells, heads, strict=True))
    name = _row_name(row, family, results, built)
    body += f"<tr><td>{html.escape(name)}</td>{shown}</tr>"
  head = "".join(f"<th{_class(kind)}>{html.escape(text)}</th>" for text, kind in heads)
  return (
    f'<h2>{html.escape(title)}</h2><p class="quiet">{html.escape(about)}</p>'
    f'<div class="wide"><table><tr class="head"><th></th>{head}</tr>{body}</table></div>'
  )


def _class(kind: str) -> str:
  return f' class="{kind}"' if kind else ""


def _cell(content: str, label: str, kind: str) -> str:
  """A cell that knows its column, which stands above it or, on a phone, before it."""
  inner = f"<div>{content}</div>" if content else ""
  return f'<td{_class(kind)} data-label="{html.escape(label)}">{inner}</td>'


def _row_name(row: str, family: str, results: Mapping[str, float | int], built: str) -> str:
  """What a row is called: a part of a set that was built stands behind the set's name."""
  if not row:
    return built
  first = row.partition("/")[0]
  outside = f"{family}/{first}/rows" in results or first == "average11"
  own = f"{family}/rows" in results and not outside
  return f"{built} · {_words(row)}" if own else _words(row)


def _words(name: str) -> str:
  """A part of a flat name as it is read: "mean_iou" -> "mean IoU", "image_to_text/r1" -> ..."""
  words = name.replace("_", " ").replace("/", " · ").split()
  return " ".join(_TERMS.get(word, word) for word in words)


def _share(name: str | None, results: Mapping[str, float | int]) -> str:
  """A cell: the share, and below it its interval where one is known."""
  if name is None:
    return ""
  if evidence.is_loss(name):
    return f"{results[name]:.4g}"
  found = evidence.interval_of(name, results)
  shown = f"{100 * results[name]:.1f}"
  if found is None:
    return shown
  return f'{shown}<span class="quiet"> {100 * found[0]:.1f} to {100 * found[1]:.1f}</span>'


def _notes(names: Mapping[str, str], results: Mapping[str, float | int]) -> str:
  """What must be said of a row: {column: name of the result} -> "only 12 images; ..."."""
  few = dict.fromkeys(words for name in names.values() if (words := evidence.few(name, results)))
  guessed = [
    f"{_words(column)} ({evidence.percent(chance)} %)"
    for column, name in names.items()
    if (chance := evidence.chance(name, results)) is not None
  ]
  return "; ".join([*few, *([f"not above chance: {', '.join(guessed)}"] if guessed else [])])


def _chances(names: Mapping[str, str], results: Mapping[str, float | int]) -> str:
  """What guessing would give in a row: "50", or "0.125 (top-1), 0.625 (top-5)"."""
  shares = {column: name for column, name in names.items() if isinstance(results[name], float)}
  known = {
    column: evidence.percent(chance)
    for column, name in shares.items()
    if (chance := evidence.find(name, results).chance) is not None
  }
  if len(known) == len(shares) and len(set(known.values())) == 1:
    return next(iter(known.values()))
  return ", ".join(f"{chance} ({_words(column)})" for column, chance in known.items())


def _count(value: float | int | None) -> str:
  return "" if value is None else f"{value:,}"


def _figures(figures: Sequence[Figure]) -> str:
  shown = [
    f"{html.escape(f.system)} {100 * f.value:.1f} ({html.escape(_words(f.key.rpartition('/')[2]))}"
    f", {html.escape(f.source)})"
    for f in figures
  ]
  return "; ".join(shown)


def _picture(path: pathlib.Path) -> str:
  data = base64.b64encode(path.read_bytes()).decode("ascii")
  name = html.escape(_words(path.stem))
  about = html.escape(_CAPTIONS.get(path.stem, ""))
  return (
    f'<p><b>{name}</b> <span class="quiet">{about}</span></p>'
    f'<div class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></div>'
  )
