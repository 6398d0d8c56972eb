"""The text encoders side by side: equal embeddings, exact counts of tokens, the command."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bench import zero_shot as bench
from grain_jax import tokenizer as tokenizers

SMALL = bench.CONFIG + (
  ",model.embed_dim=16,model.text.width=64,model.text.depth=2,model.text.heads=1"
)
VOCABULARY = {
  "names": {"0": "tench", "1": "great white shark", "2": "tabby cat", "3": "toaster oven"},
  "templates": ["a photo of a {}.", "a bad photo of the {}.", "itap of my {}.", "{}"],
}


@pytest.fixture
def vocabulary(tmp_path):
  path = tmp_path / "names.json"
  path.write_text(json.dumps(VOCABULARY))
  return path


def test_the_vocabulary_that_it_takes_by_itself_is_there():
  assert bench.VOCABULARY.is_file()


def test_prompts_are_every_name_in_every_template_and_none_comes_twice(vocabulary):
  prompts = bench.all_prompts(vocabulary)
  assert len(prompts) == 16 and prompts[0] == "a photo of a tench."
  assert prompts[5] == "a bad photo of the great white shark."
  rounds = bench.sample(prompts + prompts, rounds=3, count=5, seed=0)
  chosen = [text for texts in rounds for text in texts]
  assert [len(texts) for texts in rounds] == [5, 5, 5] and len(set(chosen)) == 15
  assert set(chosen) < set(prompts) and rounds != bench.sample(prompts, rounds=3, count=5, seed=1)
  with pytest.raises(ValueError, match=r"3 rounds .* of --prompts=6 are more than the 16 distinct"):
    bench.sample(prompts, rounds=3, count=6, seed=0)
  with pytest.raises(ValueError, match="--vocabulary=nowhere: there is no such file"):
    bench.all_prompts(pathlib.Path("nowhere"))


@pytest.mark.slow
def test_sides_with_the_same_weights_embed_the_same_and_count_their_tokens(vocabulary, tmp_path):
  config = bench.setting(SMALL, batch=3, row_length=80)
  bench.share_weights(config, tmp_path / "weights")
  texts = bench.all_prompts(vocabulary)[:7] + ["a very long text of cats and dogs " * 20]
  mine, tokens = bench.ours(tmp_path / "weights", config)(texts)
  padded, padded_tokens = bench.peer(tmp_path / "weights", batch=3, form="padded")(texts)
  trimmed, trimmed_tokens = bench.peer(tmp_path / "weights", batch=3, form="trimmed")(texts)
  assert mine.shape == (8, 16)
  assert_allclose(mine, padded, atol=1e-5)
  assert_allclose(trimmed, padded, atol=1e-5)
  assert np.abs(mine[0] - mine[1]).max() > 1e-2  # or equality would show nothing
  lengths = [len(ids) for ids in tokenizers.Tokenizer().encode_batch(texts)]
  assert lengths[7] == 77 and sum(lengths[:7]) <= 80  # so two rows, in a batch of three
  assert tokens == 3 * 80 and padded_tokens == 8 * 77
  assert trimmed_tokens == 3 * max(lengths[:3]) + 3 * max(lengths[3:6]) + 2 * 77


def test_summary_is_of_the_median_round():
  found = {
    "ours": {"seconds": [1.0, 2.0, 9.0], "tokens": [128, 128, 256]},
    "padded": {"seconds": [10.0, 8.0, 7.0], "tokens": [770, 770, 770]},
    "trimmed": {"seconds": [4.0, 1.0, 4.0], "tokens": [200, 312, 256]},
  }
  result = bench.summary(found, texts=10, text_tokens=300)
  assert result == {
    "prompts_per_s": {
      "ours": 5.0, "padded": 1.25, "trimmed": 2.5, "ratio": 4.0, "ratio_trimmed": 2.0
    },
    "tokens": {
      "texts": 300, "ours": 512, "padded": 2310, "trimmed": 768, "ratio": 2310 / 512,
      "ratio_trimmed": 1.5,
    },
  }  # fmt: skip
  result |= {
    "max_difference": {"padded": 1e-6, "trimmed": 2e-6, "spread": 0.1}, "settings": {"batch": 3}
  }  # fmt: skip
  text = bench.table(result)
  assert "| ours | 5.0 | 512 | 58.6% |" in text and "| padded | 1.2 | 2,310 | 13.0% |" in text
  assert "ours / padded: 4.00, ours / trimmed: 2.00" in text and "batch 3" in text


def test_differences_are_the_largest_of_all_rounds(tmp_path, rng):
  mine = rng.normal(size=(2, 500, 4))
  for number in range(2):
    np.save(tmp_path / f"ours-{number}.npy", mine[number])
    np.save(tmp_path / f"trimmed-{number}.npy", mine[number])
    other = mine[number].copy()
    other[3, 1] -= 0.25 * (number + 1)
    np.save(tmp_path / f"padded-{number}.npy", other)
  found = bench.differences(tmp_path, rounds=1)
  assert_allclose([found["padded"], found["trimmed"]], [0.5, 0], atol=1e-12)
  assert_allclose(found["spread"], 1, atol=0.1)


@pytest.mark.long
def test_the_command_prints_one_json_object(vocabulary):
  command = [sys.executable, "-m", "bench.zero_shot", f"--recipe={SMALL}", "--json"]
  command += [f"--vocabulary={vocabulary}", "--prompts=4", "--repeats=2", "--batch=2"]
  done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert set(found) == {"prompts_per_s", "tokens", "max_difference", "settings"}
  assert found["tokens"]["padded"] == 2 * 4 * 77 and found["tokens"]["ours"] == 2 * 2 * 128
  assert max(found["max_difference"][side] for side in ("padded", "trimmed")) < 1e-5
  assert all(value > 0 for value in found["prompts_per_s"].values())
  assert found["settings"]["prompts"] == 4 and "round 2 of 2" in done.stderr


def test_the_command_ends_in_one_line():
  command = [sys.executable, "-m", "bench.zero_shot", "--prompts=0"]
  done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("ValueError: --prompts=0: ") and done.stderr.count("\n") == 1
