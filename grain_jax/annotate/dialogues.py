"""What is asked of a picture, and what is made of the replies: the same for every model."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from grain_jax.annotate import asking, prompt_files, replies, stages

_LIST = {
  "type": "object",
  "properties": {
    "list": {"type": "array", "items": {"type": "string"}, "maxItems": replies.MOST}
  },
  "required": ["list"],
  "additionalProperties": False,
}  # fmt: skip
_CROP = 32  # pixels of the shorter side below which what was cut out is made larger


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """The questions of `describe`."""

  prompts: Mapping[str, str]
  stages: int  # 2: subjects first
  no_caption: bool
  any_script: bool
  margin: float  # of a region that is cut out, as a part of its sides

  def describe(self, item: stages.Item) -> asking.Dialogue:
    """Descriptions and a caption; the picture fails where there are no descriptions."""
    losses: list[tuple[str, str]] = []
    raw: list[Any] = []
    known = {"caption": item.captions[0] if item.captions else "", "most": replies.MOST}
    requests = [self._list("subjects" if self.stages == 2 else "descriptions", item, known)]
    if not self.no_caption:
      requests.append(self._sentence("caption", item.image, known))
    said = yield requests
    raw += [reply.told(request) for reply, request in zip(said, requests, strict=True)]
    caption = said[1] if not self.no_caption else None
    found = self._lines(said[0], "subjects" if self.stages == 2 else "descriptions", losses)
    if self.stages == 2 and found is not None:
      listed = "\n".join(f"- {subject}" for subject in found)
      request = self._list("features", item, {**known, "subjects": listed})
      said = yield [request]
      raw.append(said[0].told(request))
      found = self._lines(said[0], "descriptions", losses)
    if found is None:
      why = said[0].why or replies.CUT_OFF
      return stages.Result(None, [*losses, ("pictures", why)], raw)
    line = {"descriptions": found}
    if caption is not None:
      self._add_caption(line, item, caption, losses)
    return stages.Result(line, losses, raw)

  def regions(self, item: stages.Item) -> asking.Dialogue:
    """Long descriptions of the regions; the picture fails where all of them do."""
    if not item.regions:
      return stages.Result({})
    losses: list[tuple[str, str]] = []
    requests = []
    for region in item.regions:
      values = {"description": region["description"], "caption": "".join(item.captions[:1])}
      cut = cut_out(item.image, region["box"], self.margin)
      requests.append(self._sentence("region", cut, values))
    said = yield requests
    raw = [reply.told(request) for reply, request in zip(said, requests, strict=True)]
    regions, failed = [], []
    for region, reply in zip(item.regions, said, strict=True):
      new = {**region, "box": list(region["box"])}
      if reply.text is None or reply.cut:
        failed.append(reply.why or replies.CUT_OFF)
        losses.append(("long_descriptions", failed[-1]))
      else:
        new["of"] = region.get("of", region["description"])
        new["description"] = self._found(reply.text, "long_descriptions", losses)
        losses += [("region_negatives", "description_replaced")] * len(region["negatives"])
        new["negatives"] = []
      regions.append(new)
    if len(failed) == len(said):
      return stages.Result(None, [*losses, ("pictures", failed[0])], raw)
    return stages.Result({"regions": regions}, losses, raw)

  def _list(self, name: str, item: stages.Item, values: Mapping[str, Any]) -> asking.Request:
    prompt = prompt_files.fill(self.prompts[name], values)

    def failure(text: str) -> str | None:
      return replies.failure_of_lines(self._parsed(text, name))

    return asking.Request(name, prompt, item.image, failure, _LIST)

  def _sentence(self, name: str, image: bytes, values: Mapping[str, Any]) -> asking.Request:
    prompt = prompt_files.fill(self.prompts[name], values)

    def failure(text: str) -> str | None:
      return replies.sentence(text, any_script=self.any_script).why

    return asking.Request(name, prompt, image, failure)

  def _parsed(self, text: str, name: str, *, cut: bool = False) -> replies.Lines:
    return replies.lines(text, any_script=self.any_script, commas=name == "subjects", cut=cut)

  def _lines(self, reply: asking.Reply, what: str, losses: list) -> list[str] | None:
    """What a reply lists, its losses counted; None: nothing."""
    if reply.text is None:
      return None
    found = self._parsed(reply.text, what, cut=reply.cut)
    losses += [(what, why) for why in found.dropped]
    return found.kept or None

  def _found(self, text: str, what: str, losses: list) -> str:
    """The sentence in a reply that has one, what is beyond it counted."""
    found = replies.sentence(text, any_script=self.any_script)
    assert found.text is not None, "a reply with text was usable"
    losses += [(what, replies.MORE_THAN_ASKED)] * found.left_out
    return found.text

  def _add_caption(self, line: dict, item: stages.Item, reply: asking.Reply, losses: list) -> None:
    if reply.text is None or reply.cut:
      losses.append(("captions", reply.why or replies.CUT_OFF))
      return
    found = self._found(reply.text, "captions", losses)
    if found.casefold() in {caption.casefold() for caption in item.captions}:
      losses.append(("captions", replies.DUPLICATE))
    else:
      line["captions"] = [found]


def cut_out(image: bytes, box: Any, margin: float) -> bytes:
  """A part of a JPEG as a JPEG.

  Args:
    image: JPEG.
    box: (ymin, xmin, ymax, xmax) as fractions of it.
    margin: on each side, as a part of the box's height or width.
  """
  from PIL import Image

  whole = Image.open(io.BytesIO(image)).convert("RGB")
  ymin, xmin, ymax, xmax = box
  high, wide = margin * (ymax - ymin), margin * (xmax - xmin)
  left, top = int(max(xmin - wide, 0) * whole.width), int(max(ymin - high, 0) * whole.height)
  right = max(left + 1, round(min(xmax + wide, 1) * whole.width))
  bottom = max(top + 1, round(min(ymax + high, 1) * whole.height))
  part = whole.crop((left, top, right, bottom))
  if (short := min(part.size)) < _CROP:  # models refuse what is smaller than a few patches
    size = tuple(max(_CROP, round(side * _CROP / short)) for side in part.size)
    part = part.resize(size, Image.Resampling.BICUBIC)
  encoded = io.BytesIO()
  part.save(encoded, "JPEG", quality=92)
  return encoded.getvalue()
