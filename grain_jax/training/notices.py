"""What a run loses of its texts, said once each where it is more than a little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_collections

_MUCH = 0.01  # of the false texts, or texts an image


class Notices:
  """Lines about the metrics of steps, each once in a run."""

  def __init__(self, config: ml_collections.ConfigDict):
    self._config = config
    self._said: set[str] = set()

  def lines(self, summary: Mapping[str, float], images: int) -> Iterator[str]:
    """What is new in these metrics, `train/...`, of so many images."""
    rows = f"rows of {self._config.data.row_length} tokens and are left out"
    context = self._config.model.text.context
    false = summary.get("train/dropped_negatives", 0.0)
    dropped, cut = (summary.get(f"train/{name}_texts", 0.0) for name in ("dropped", "truncated"))
    told = {
      "false": (
        false,
        f"{false:.1%} of the false captions and descriptions do not fit {rows}: raise "
        "config.data.row_length.",
      ),
      "dropped": (
        dropped / images,
        f"{dropped:,.0f} descriptions of {images:,} images do not fit {rows}: raise "
        "config.data.row_length.",
      ),
      "cut": (
        cut / images,
        f"{cut:,.0f} texts of {images:,} images fill the context of {context} tokens: what is "
        "longer is cut there (config.model.text.context).",
      ),
    }
    for name, (share, line) in told.items():
      if share > _MUCH and name not in self._said:
        self._said.add(name)
        yield line
