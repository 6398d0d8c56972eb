"""preview.html of a built dataset: some images with their boxes and texts, and what was dropped.

The page is one file: its pictures are in it, and it needs no network. It takes no part in what a
dataset is: neither shards nor fingerprint depend on it.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from grain_jax import schema
from grain_jax.data import decoding, records
from grain_jax.data.building import figures, tally

NAME = "preview.html"
_COUNT = 24  # images
_SEED = 0  # of which ones
_SIDE = 360  # pixels of the longer side of a picture
_EXAMPLES = 5  # of a kind of loss, with what was given
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 1.5rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: .8rem 0 .1rem; }
p { margin: .3rem 0 .8rem; } .quiet { color: #595959; font-size: .9em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid #e3e3e3; }
th { color: #595959; font-weight: 600; } .number { text-align: right; white-space: nowrap; }
.hints li { margin-bottom: .3rem; } .hints { background: #fff6dd; padding: .6rem 1rem .6rem 2rem; }
.images { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; border: 1px solid #e3e3e3; } figcaption { padding: .4rem .6rem .6rem; }
td:first-child { white-space: nowrap; }
.picture { position: relative; aspect-ratio: 1; background: #f3f3f3; }
.picture img, .picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.picture img { object-fit: contain; }
ul, ol { margin: .2rem 0; padding-left: 1.3rem; } .regions { list-style: none; padding: 0; }
.regions b { display: inline-block; min-width: 1.2em; padding: 0 .2em; margin-right: .4em;
  text-align: center; border: 2px solid; border-radius: 3px; font-size: .8em; }
.lost { color: #a32100; }
"""


class Losses(NamedTuple):
  """What of a record was dropped."""

  key: str
  texts: list[str]  # 'region box_outside_image: "a dog" [1, 2, 300, 400]'


class _Shown(NamedTuple):
  """An image of the page."""

  split: str
  key: str
  jpeg: bytes  # small; empty where the image cannot be decoded
  size: tuple[int, int]  # (width, height) to which it is scaled: the longer one is `_SIDE`; (0, 0):
  # not yet, and `jpeg` is the image
  captions: list[str]
  regions: list[Mapping[str, Any]]
  lost: list[str]


class Preview:
  """Chooses images while a build runs, whatever their number, and writes the page at its end."""

  def __init__(self, share: float = 1.0) -> None:
    """`share`: of the records of a part of the source, among which its images are chosen."""
    self._least = -int(share * 2**64)
    self._heap: list[tuple[int, int, _Shown]] = []  # by falling hash
    self._count = 0
    self._examples: dict[tuple[str, str], list[Losses]] = {}  # (kind, reason) -> the first ones

  def add(self, split: str, given: Any, checked: records.Checked, losses) -> None:
    """Takes in a record as the source gave it and as it is kept.

    Args:
      split: where it goes.
      given: of the source, a record or `records.Refused`.
      checked: what `records.check` left of it.
      losses: [(kind, reason)], all of them.
    """
    lost = _losses(given, checked, losses) if losses else []
    key = given.key if isinstance(given, records.Refused) else given[schema.RECORD_KEY]
    for kind, why in dict.fromkeys(losses):
      examples = self._examples.setdefault((kind, why), [])
      if len(examples) < _EXAMPLES:
        of_these = [text for what, reason, text in lost if (what, reason) == (kind, why)]
        examples.append(Losses(tally.printable(str(key)), of_these[:1]))
    if checked.record is not None and not any(kind == "records" for kind, _ in losses):
      self._offer(split, checked.record, [_loss(*loss) for loss in lost])

  def _offer(self, split: str, record: Mapping[str, Any], lost: list[str]) -> None:
    name = f"{_SEED}\0{split}\0{record[schema.RECORD_KEY]}".encode()
    order = -int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    if order < self._least or (len(self._heap) == _COUNT and order <= self._heap[0][0]):
      return
    shown = _Shown(
      split,
      record[schema.RECORD_KEY],
      record[schema.RECORD_IMAGE],
      (0, 0),
      record[schema.RECORD_CAPTIONS],
      record[schema.RECORD_REGIONS],
      lost,
    )
    self._push(order, shown)

  def _push(self, order: int, shown: _Shown) -> None:
    if len(self._heap) == _COUNT and order <= self._heap[0][0]:
      return
    self._count += 1
    push = heapq.heappush if len(self._heap) < _COUNT else heapq.heapreplace
    push(self._heap, (order, self._count, shown))

  def take(self) -> dict[str, Any]:
    """What was chosen, as JSON, its pictures small."""
    images = []
    for order, _, shown in sorted(self._heap, key=lambda entry: entry[1]):
      small = _small(shown)._asdict()
      images.append([order, {**small, "jpeg": base64.b64encode(small["jpeg"]).decode()}])
    return {"images": images, "examples": [[*k, v] for k, v in self._examples.items()]}

  def merge(self, taken: Mapping[str, Any], *, without: Collection[str] = ()) -> None:
    """Adds what was chosen of another part of the source, but for records of these keys."""
    for order, values in taken["images"]:
      shown = _Shown(**{**values, "jpeg": base64.b64decode(values["jpeg"])})
      if shown.key not in without:
        self._push(order, shown)
    for kind, why, theirs in taken["examples"]:
      examples = self._examples.setdefault((kind, why), [])
      examples += [Losses(key, texts) for key, texts in theirs][: _EXAMPLES - len(examples)]

  def duplicate(self, key: str) -> None:
    """Takes in that a record has the key of an earlier one."""
    examples = self._examples.setdefault(("records", tally.DUPLICATE_KEY), [])
    if len(examples) < _EXAMPLES:
      examples.append(Losses(tally.printable(key), []))

  def write(
    self,
    path: pathlib.Path,
    *,
    name: str,
    counts: Mapping[str, int],
    summary: Mapping[str, Any],
    hints: Sequence[str],
  ) -> None:
    """Writes the page.

    Args:
      path: of the page.
      name: of the dataset.
      counts: images by split.
      summary: `tally.Tally.summary`.
      hints: lines on what may be wrong.
    """
    splits = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    chosen = sorted(self._heap, reverse=True, key=lambda e: e[:2])
    shown = [_small(entry) for _, _, entry in chosen]
    parts = [
      f"<h1>{figures.escaped(name)}</h1>",
      f'<p class="quiet">Images: {figures.escaped(splits)}. Are the boxes around what their '
      "descriptions say?</p>",
      _table(summary),
    ]
    if hints:
      items = "".join(f"<li>{figures.escaped(line)}</li>" for line in hints)
      parts.append(f'<h2>What may be wrong</h2><ul class="hints">{items}</ul>')
    parts.append(f"<h2>{len(shown)} images, chosen by chance</h2>")
    parts.append(f'<div class="images">{"".join(map(_figure, shown))}</div>')
    parts.append(self._dropped(summary))
    page = (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f"<title>{figures.escaped(name)}: preview</title><style>{_STYLE}</style></head>"
      f"<body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")

  def _dropped(self, summary: Mapping[str, Any]) -> str:
    if not self._examples:
      return "<h2>Dropped</h2><p>Nothing was dropped.</p>"
    parts = ["<h2>Dropped</h2>"]
    for (kind, why), examples in self._examples.items():
      title = tally.title(kind)
      count = summary[title]["reasons"][why]
      items = "".join(
        f"<li>{': '.join(map(figures.escaped, [loss.key, *filter(None, loss.texts)]))}</li>"
        for loss in examples
      )
      more = '<li class="quiet">...</li>' if count > len(examples) else ""
      parts.append(f"<h3>{title}: {why.replace('_', ' ')}, {count:,}</h3><ul>{items}{more}</ul>")
    return "".join(parts)


def _losses(given: Any, checked: records.Checked, losses) -> list[tuple[str, str, str]]:
  """(kind, reason, what was given there) of each loss of a record; '' where only the key tells."""
  if isinstance(given, records.Refused):
    return [(kind, why, "") for kind, why in losses]
  regions = given.get(schema.RECORD_REGIONS) or ()
  lost = [(why, region) for region, why in zip(regions, checked.fates, strict=False) if why]
  found = [("regions", why, _region(region)) for why, region in lost]
  found += [(kind, why, "") for kind, why in losses if kind != "regions"]
  return found


def _loss(kind: str, why: str, text: str) -> str:
  return f"{why.replace('_', ' ')}: {text}" if text else f"{kind}: {why.replace('_', ' ')}"


def _region(region: Any) -> str:
  if not isinstance(region, Mapping):
    return repr(region)
  box = region.get("box")
  if isinstance(box, (list, tuple)):
    numbers = (f"{x:.6g}" if isinstance(x, float) else repr(x) for x in box)
    box = f"[{', '.join(numbers)}]"
  return f"{region.get('description')!r} {box}"


def _small(shown: _Shown) -> _Shown:
  """With a small picture in the place of the image as it was given."""
  if shown.size != (0, 0):
    return shown
  try:
    jpeg, size = _thumbnail(shown.jpeg)
  except ValueError as error:  # of a source whose images are not decoded by `records.check`
    return shown._replace(jpeg=b"", size=(_SIDE, _SIDE), lost=[*shown.lost, str(error)])
  return shown._replace(jpeg=jpeg, size=size)


def _thumbnail(image: bytes) -> tuple[bytes, tuple[int, int]]:
  """(a small JPEG of it, its width and height of which the longer is `_SIDE`)."""

  def scaled(width: int, height: int) -> tuple[int, int]:
    factor = _SIDE / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))

  picture = decoding.decode(image, max_pixels=schema.MOST_PIXELS, enough=scaled)
  size = scaled(*picture.size)
  if max(picture.size) > _SIDE:
    picture = picture.resize(size, Image.Resampling.BICUBIC)
  encoded = io.BytesIO()
  picture.save(encoded, "JPEG", quality=80)
  return encoded.getvalue(), size


def _figure(shown: _Shown) -> str:
  width, height = shown.size
  source = f"data:image/jpeg;base64,{base64.b64encode(shown.jpeg).decode()}"
  drawn = enumerate(shown.regions[: figures.MOST])
  # In reverse, so that the first ones, of highest score more often than not, lie on top.
  boxes = "".join(reversed([figures.box_over(i, region["box"], shown.size) for i, region in drawn]))
  parts = [
    f'<div class="picture"><img src="{source}" width="{width}" height="{height}" '
    f'alt="{figures.escaped(shown.captions[0])}"><svg viewBox="0 0 {width} {height}" '
    f'aria-hidden="true">{boxes}</svg></div><figcaption>'
    f'<div class="quiet">{figures.escaped(shown.key)} ({figures.escaped(shown.split)})</div>',
    figures.listed("ol", (figures.escaped(caption) for caption in shown.captions)),
  ]
  regions = (
    figures.numbered(i, region["description"])
    + (f' <span class="quiet">{region["score"]:.2f}</span>' if region["score"] != 1 else "")
    for i, region in enumerate(shown.regions)
  )
  parts.append(figures.listed('ul class="regions"', regions))
  if shown.lost:
    lines = figures.listed("ul", map(figures.escaped, shown.lost))
    parts.append(f'<div class="lost">dropped: {lines}</div>')
  return f"<figure>{''.join(parts)}</figcaption></figure>"


def _table(summary: Mapping[str, Any]) -> str:
  rows = ["<tr><th></th><th class=number>kept</th><th class=number>dropped</th><th>why</th></tr>"]
  for name, entry in tally.rows(summary).items():
    reasons = ", ".join(f"{w.replace('_', ' ')} {n:,}" for w, n in entry["reasons"].items())
    rows.append(
      f"<tr><td>{name}</td><td class=number>{entry['kept']:,}</td>"
      f"<td class=number>{entry['dropped']:,}</td><td>{reasons}</td></tr>"
    )
  return f'<div class="wide"><table>{"".join(rows)}</table></div>'
