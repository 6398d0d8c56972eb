"""The words of scenes, against phrases written by hand."""

from grain_jax.data.scenes import texts as scene_texts


def test_words_by_hand():
  assert scene_texts.describe("apple", "green", "small") == "a small green apple"
  assert scene_texts.describe("bus", "orange") == "an orange bus"
  assert scene_texts.describe("grapes", "red") == "red grapes"
  assert scene_texts.enumerate_phrases(["a", "b", "c"]) == "a, b and c"
  assert scene_texts.relation_of((0, 0, 0.2, 0.2), (0, 0.5, 0.2, 0.9)) == "left"
  assert scene_texts.relation_of((0.5, 0, 0.9, 0.2), (0, 0.1, 0.2, 0.3)) == "below"
  assert scene_texts.relation_of((0, 0, 0.2, 0.2), (0, 0.1, 0.2, 0.3)) == "near"
  assert scene_texts.position_of((0.6, 0.0, 1.0, 0.4)) == "at the bottom left"
  assert scene_texts.position_of((0.3, 0.3, 0.7, 0.7)) == "in the middle"
