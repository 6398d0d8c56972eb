"""Names of leaves and the one matcher, on a hand-made tree."""

import numpy as np
import pytest

from grain_jax import trees

TREE = {
  "text": {"blocks": {"mlp": {"fc1": {"kernel": np.zeros((2, 3, 4)), "bias": np.zeros((2, 4))}}}},
  "logit_scale": np.zeros(()),
}


def test_names_join_keys_with_slashes():
  assert [name for name, _ in trees.named_leaves(TREE)] == [
    "logit_scale",
    "text/blocks/mlp/fc1/bias",
    "text/blocks/mlp/fc1/kernel",
  ]


def test_count_counts_scalars():
  assert trees.count(TREE) == 24 + 8 + 1


def test_the_first_rule_that_matches_wins_and_the_rest_is_default():
  rules = [("fc1/kernel$", "a"), ("^text/", "b")]
  matched = trees.match(TREE, rules, "c", what="rules")
  assert matched["text"]["blocks"]["mlp"]["fc1"] == {"kernel": "a", "bias": "b"}
  assert matched["logit_scale"] == "c"


@pytest.mark.parametrize("pattern", ["decoder/", "(unclosed"])
def test_a_pattern_that_is_malformed_or_matches_nothing_is_an_error(pattern):
  with pytest.raises(ValueError, match=r"^config\.optimizer\.freeze: .*") as caught:
    trees.match(TREE, [(pattern, 1)], 0, what="config.optimizer.freeze")
  assert pattern in str(caught.value) and "\n" not in str(caught.value)
