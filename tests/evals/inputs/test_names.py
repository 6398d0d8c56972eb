"""Which key means which class, however both are spelled."""

import string
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grain_jax.evals.inputs import names

WORDS = st.lists(
  st.text(st.sampled_from(string.ascii_lowercase + "éüßñ"), min_size=1, max_size=6),
  min_size=1,
  max_size=3,
)
DRESSES = (
  str.upper,
  str.title,
  lambda name: name.replace(" ", "_"),
  lambda name: name.replace(" ", "-"),
  lambda name: f"  {name} ",
  lambda name: unicodedata.normalize("NFD", name),
  lambda name: f"{name} (thing)",
  lambda name: f"{name}_[a thing]",
)


@given(st.lists(WORDS, min_size=1, max_size=6), st.data())
def test_a_key_in_another_dress_is_found(words, data):
  classes = sorted({" ".join(own) for own in words})
  folded = {names.spell(name) for name in classes}
  assume(len(folded) == len(classes) and not any("thing" in form for form in folded))
  keys = [data.draw(st.sampled_from(DRESSES))(name) for name in classes]
  shuffled = data.draw(st.permutations(keys))
  assert names.find_keys(shuffled, [[name] for name in classes]) == keys
  dressed = [[key] for key in keys]  # and the other way round: plain keys of dressed classes
  assert names.find_keys(classes, dressed) == classes


@pytest.mark.parametrize(
  ("keys", "classes", "found"),
  [
    # Places365's: the brackets are words of the folder's name, or are not there.
    (["arcade (passageway)"], ["arcade_passageway"], ["arcade (passageway)"]),
    (["arcade (passageway)"], ["arcade"], ["arcade (passageway)"]),
    (["lock_chamber (canal)", "lock"], ["lock chamber"], ["lock_chamber (canal)"]),
    (["arcade (passageway)", "arcade"], ["arcade"], ["arcade"]),
    # LVIS' brackets tell classes apart: without them they mean none alone.
    (["bow (weapon)", "bow (ribbon)"], ["bow"], [None]),
    (["bow (weapon)", "bow (ribbon)"], ["bow_(ribbon)"], ["bow (ribbon)"]),
    (["bow"], ["bow (weapon)", "bow (ribbon)"], [None, None]),
    # ImageNet's former names, where the class has no key of its own.
    (["eft", "maillot", "crane"], ["newt", "tights", "crane bird"], ["eft", "maillot", None]),
    (["eft", "newt"], ["newt"], ["newt"]),
    (["eft"], ["smooth newt", "newt"], [None, "eft"]),
    (["maillot"], ["maillot", "maillot"], ["maillot", "maillot"]),
    (["maillot"], ["maillot", "tights"], ["maillot", None]),
    # Signs count where they are all that differs.
    (["C", "c++", "C#"], ["c", "C++", "c#"], ["C", "c++", "C#"]),
    (["+"], ["*"], [None]),
    (["()"], ["[]"], [None]),
  ],
)
def test_by_hand(keys, classes, found):
  assert names.find_keys(keys, [[name] for name in classes]) == found


def test_two_keys_for_one_class_are_one_line():
  with pytest.raises(ValueError, match="'sea-lion' and 'sea/lion' both mean class 'sea lion'"):
    names.find_keys(["sea-lion", "sea/lion"], [["sea lion"]])
  assert names.find_keys(["sea-lion", "Sea_Lion"], [["sea lion"]]) == ["Sea_Lion"]
