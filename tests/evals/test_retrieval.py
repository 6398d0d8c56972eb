"""Retrieval against NumPy's stable sort, scikit-learn and hand-worked numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import top_k_accuracy_score

from grain_jax.evals import retrieval


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def make_batches(embeddings, captions, mask, *, rows):
  """Batches whose images carry their own index, so that a fake encoder can look it up."""
  for start in range(0, len(embeddings), rows):
    index = np.arange(start, min(start + rows, len(embeddings)))
    image = np.zeros((len(index), 2, 2, 3), np.uint8)
    image[:, 0, 0, 0] = index
    extras = {
      "key": [f"k{i}" for i in index],
      "captions": [captions[i] for i in index],
    }
    yield {"image": image, "example_mask": np.asarray(mask)[index]}, extras


def encoders(embeddings, texts):
  return (
    lambda images: np.asarray(embeddings, np.float32)[images[:, 0, 0, 0]],
    lambda names: np.stack([texts[name] for name in names]).astype(np.float32),
  )


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_first_hit_is_where_a_stable_sort_of_the_whole_matrix_puts_it(data):
  n, m, e = (data.draw(st.integers(1, 9), label=name) for name in "nme")
  small = st.integers(-2, 2)  # many ties, and exact in float32
  queries = data.draw(hnp.arrays(np.float32, (n, e), elements=small))
  candidates = data.draw(hnp.arrays(np.float32, (m, e), elements=small))
  candidate_groups = data.draw(hnp.arrays(np.int64, m, elements=st.integers(0, 3)))
  query_groups = data.draw(
    hnp.arrays(np.int64, n, elements=st.sampled_from(candidate_groups.tolist()))
  )
  order = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")
  naive = [
    np.flatnonzero(candidate_groups[order[i]] == query_groups[i])[0] for i in range(len(queries))
  ]
  found = retrieval.first_hit_ranks(
    queries,
    candidates,
    query_groups,
    candidate_groups,
    block_elements=data.draw(st.integers(1, 40)),
  )
  np.testing.assert_array_equal(found, naive)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_sklearns_top_k_accuracy(k):
  rng = np.random.default_rng(k)
  queries, candidates = unit(rng.normal(size=(200, 8))), unit(rng.normal(size=(40, 8)))
  labels = rng.integers(0, 40, 200)
  ranks = retrieval.first_hit_ranks(queries, candidates, labels, np.arange(40), block_elements=999)
  expected = top_k_accuracy_score(labels, queries @ candidates.T, k=k, labels=np.arange(40))
  assert retrieval.recall_at_k(ranks, k) == pytest.approx(expected)


def test_equal_embeddings_find_no_more_than_chance():
  same = np.ones((20, 1), np.float32)
  ranks = retrieval.first_hit_ranks(same, same, np.arange(20), np.arange(20))
  assert retrieval.recall_at_k(ranks, 1) == 1 / 20
  assert retrieval.recall_at_k(ranks, 5) == 5 / 20


@settings(max_examples=30, deadline=None)
@given(
  count=st.sampled_from([3, 37, 333, 1001]),
  distinct=st.integers(1, 40),
  width=st.sampled_from([64, 128, 512]),
  seed=st.integers(0, 99),
)
def test_equal_candidates_go_by_their_index_whatever_the_product_rounds(
  count, distinct, width, seed
):
  """Real embeddings, whose products round: a perfect model finds the first of its like."""
  rng = np.random.default_rng(seed)
  kinds = unit(rng.normal(size=(distinct, width)))
  of = rng.integers(0, distinct, count)
  queries = rng.integers(0, count, 20)
  ranks = retrieval.first_hit_ranks(kinds[of[queries]], kinds[of], queries, np.arange(count))
  np.testing.assert_array_equal(ranks, [np.sum(of[:q] == of[q]) for q in queries])
  first, again = retrieval.distinct_rows(kinds[of])
  np.testing.assert_array_equal(of[first][again], of)
  assert first.tolist() == sorted(of.tolist().index(kind) for kind in set(of.tolist()))


def test_block_size_bounds_what_is_held_at_once(monkeypatch):
  held = []
  where = np.where
  monkeypatch.setattr(np, "where", lambda c, *rest: held.append(c.size) or where(c, *rest))
  rng = np.random.default_rng(0)
  x = unit(rng.normal(size=(100, 4)))
  retrieval.first_hit_ranks(x, x, np.arange(100), np.arange(100), block_elements=1000)
  assert sum(held) == 100 * 100 and max(held) <= 1000


def test_blocks_of_as_many_queries_as_candidates_of_which_two_are_alike():
  count = 6
  candidates = unit(np.random.default_rng(0).normal(size=(count, 4)))
  candidates[4] = candidates[1]
  queries = np.concatenate([candidates, candidates])
  groups = np.tile(np.arange(count), 2)
  ranks = retrieval.first_hit_ranks(
    queries, candidates, groups, np.arange(count), block_elements=count * count
  )
  np.testing.assert_array_equal(ranks, np.tile([0, 0, 0, 0, 1, 0], 2))


def test_scores_of_candidates_that_all_differ_are_never_copied(monkeypatch):
  alike = retrieval.distinct_rows
  monkeypatch.setattr(retrieval, "distinct_rows", lambda rows: (alike(rows)[0], None))
  x = unit(np.random.default_rng(0).normal(size=(9, 4)))
  ranks = retrieval.first_hit_ranks(x, x, np.arange(9), np.arange(9), block_elements=20)
  np.testing.assert_array_equal(ranks, np.zeros(9))


# Three images along the axes; a's first caption is nearest to a, b's captions are swapped.
EMBEDDINGS = np.eye(3)
TEXTS = {
  "a": unit([1, 0, 0]),
  "a2": unit([0.1, 1, 0]),
  "b": unit([0.9, 0.5, 0]),
  "c": unit([0, 0.1, 1]),
}
CAPTIONS = [["a", "a2"], ["b"], ["c"]]


def test_worked_example_with_one_caption():
  encode_image, encode_text = encoders(EMBEDDINGS, TEXTS)
  batches = make_batches(EMBEDDINGS, CAPTIONS, [True] * 3, rows=2)
  results = retrieval.evaluate(encode_image, encode_text, batches, ks=(1, 2))
  # b's image is nearest to its own text; b's text is nearer to a's image.
  assert results["retrieval/image_to_text/r1"] == 1
  assert results["retrieval/text_to_image/r1"] == pytest.approx(2 / 3)
  assert results["retrieval/text_to_image/r2"] == 1
  assert results["retrieval/pairs"] == results["retrieval/images"] == 3
  assert all(type(v) in (int, float) for v in results.values())


def test_worked_example_with_all_captions():
  encode_image, encode_text = encoders(EMBEDDINGS, TEXTS)
  batches = make_batches(EMBEDDINGS, CAPTIONS, [True] * 3, rows=3)
  results = retrieval.evaluate(
    encode_image, encode_text, batches, captions_per_image=None, ks=(1, 2)
  )
  # a2 belongs to a and looks like b: b's image finds it first, and it finds b's image.
  assert results["retrieval/image_to_text/r1"] == pytest.approx(2 / 3)
  assert results["retrieval/image_to_text/r2"] == 1
  assert results["retrieval/text_to_image/r1"] == pytest.approx(2 / 4)
  assert results["retrieval/pairs"] == 4


def test_masked_rows_and_images_without_caption_never_count():
  embeddings = np.full((5, 3), np.nan)
  embeddings[[1, 2, 4]] = EMBEDDINGS
  encode_image, encode_text = encoders(embeddings, TEXTS)
  captions = [["unknown"], ["a"], ["b"], ["", " "], ["c"]]
  batches = make_batches(np.zeros(5), captions, [False, True, True, True, True], rows=2)
  results = retrieval.evaluate(encode_image, encode_text, batches, ks=(1,))
  assert results["retrieval/text_to_image/r1"] == pytest.approx(2 / 3)
  assert results["retrieval/images"] == 3
  assert results["retrieval/examples"] == 4 and results["retrieval/rows"] == 5


def test_an_equal_text_is_encoded_once_and_keeps_its_place():
  calls = []

  def encode_text(texts):
    calls.append(list(texts))
    return unit([[len(text), 1.0] for text in texts])

  encoded = retrieval.encode_texts(encode_text, ["aa", "b", "aa", "ccc"], texts_per_call=2)
  assert calls == [["aa", "b"], ["ccc"]]
  np.testing.assert_allclose(encoded, unit([[2, 1], [1, 1], [2, 1], [3, 1]]), rtol=1e-6)


@pytest.mark.parametrize(
  ("value", "says"), [(np.nan, "not finite"), (np.inf, "not finite"), (3.0, "L2-normalise")]
)
def test_broken_embeddings_are_refused(value, says):
  embeddings = EMBEDDINGS.copy()
  embeddings[1, 1] = value
  encode_image, encode_text = encoders(embeddings, TEXTS)
  batches = make_batches(embeddings, CAPTIONS, [True] * 3, rows=3)
  with pytest.raises(ValueError, match=says):
    retrieval.evaluate(encode_image, encode_text, batches)


def test_wrong_input_is_one_clear_line():
  encode_image, encode_text = encoders(EMBEDDINGS, TEXTS)
  with pytest.raises(ValueError, match="0 of 3 rows"):
    batches = make_batches(EMBEDDINGS, CAPTIONS, [False] * 3, rows=2)
    retrieval.evaluate(encode_image, encode_text, batches)
  with pytest.raises(ValueError, match="0 of 0 rows"):
    retrieval.evaluate(encode_image, encode_text, [])
  with pytest.raises(ValueError, match="captions_per_image = 0"):
    retrieval.evaluate(encode_image, encode_text, [], captions_per_image=0)
  with pytest.raises(ValueError, match="query 1 is of group 7"):
    retrieval.first_hit_ranks(np.eye(2), np.eye(2), np.array([0, 7]), np.array([0, 1]))
  with pytest.raises(ValueError, match=r"shape \[1, 3\] for 3 rows"):
    batches = make_batches(EMBEDDINGS, CAPTIONS, [True] * 3, rows=3)
    retrieval.evaluate(lambda images: np.ones((1, 3)), encode_text, batches)
