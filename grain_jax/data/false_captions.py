"""Which caption of an image a false one was made of: records do not say."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence


def nearest(false: Sequence[str | bytes], captions: Sequence[str | bytes]) -> list[list[int]]:
  """Of each false caption those to which no other is nearer, ascending; several if equally near.

  By the bag distance of their words: those of the longer text, less those that both have. A false
  caption has another word or two than its own, or the same ones in another order.
  """
  bags = [_words(caption) for caption in captions]
  found = []
  for text in false:
    own = _words(text)
    far = [max(own.total(), bag.total()) - (own & bag).total() for bag in bags]
    found.append([i for i, distance in enumerate(far) if distance == min(far)])
  return found


def _words(text: str | bytes) -> collections.Counter[str]:
  text = text.decode() if isinstance(text, bytes) else text
  return collections.Counter(re.findall(r"\w+", text.casefold()))
