"""Retrieval sets against clip_benchmark's recall, and the documented formats of their files."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grain_jax import tokenizer
from grain_jax.evals import retrieval
from grain_jax.evals.inputs.annotations import Captioned
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import retrieval as retrieval_sets

peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def random_unit(key):
  return unit(np.random.default_rng(zlib.crc32(str(key).encode())).normal(size=5))


MODEL = Encoders(
  image=lambda images: np.stack([random_unit(i) for i in images[:, 4, 4, 0]]),
  text=lambda texts: np.stack([random_unit(t) for t in texts]),
  regions=None,
  size=8,
  context=8,
)


def picture(path, red):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (10, 10), (red, 0, 0)).save(path, format="png")  # whatever the name says
  return path


def peer_recalls(images, texts, owners, ks):
  """Recall at K by clip_benchmark, for each way."""
  import torch

  scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
  positive = torch.zeros_like(scores, dtype=bool)
  positive[torch.arange(len(owners)), torch.from_numpy(owners)] = True
  found = {}
  for way, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
    for k in ks:
      hits = peer.batchify(peer.recall_at_k, s, p, 7, "cpu", k=k) > 0
      found[f"{way}/r{k}"] = pytest.approx(hits.float().mean().item(), abs=1e-6)
  return found


@given(seed=st.integers(0, 10**6), n=st.integers(3, 20), block=st.integers(1, 300))
def test_recall_both_ways_is_clip_benchmarks(seed, n, block):
  rng = np.random.default_rng(seed)
  owners = np.concatenate([np.arange(n), rng.integers(0, n, 2 * n)])  # unequal numbers of captions
  rng.shuffle(owners)
  images = unit(rng.normal(size=(n, 4)))
  texts = unit(images[owners] + rng.normal(size=(len(owners), 4)))
  found = retrieval.recall_both_ways(images, texts, owners, ks=(1, 2, 3), block_elements=block)
  assert found == peer_recalls(images, texts, owners, (1, 2, 3))


def test_evaluate_takes_five_captions_and_the_pictures_that_can_be_read(tmp_path):
  captioned = [
    Captioned(picture(tmp_path / f"{i}.png", i), tuple(f"{i} {j}" for j in range(5 + i % 3)))
    for i in range(14)
  ]
  (tmp_path / "4.png").write_bytes(b"no")
  lines = []
  results = retrieval_sets.evaluate(
    MODEL, captioned, name="some", captions_per_image=5, warn=lines.append, block_elements=50
  )
  kept = [i for i in range(14) if i != 4]
  images = np.stack([random_unit(i) for i in kept])
  texts = np.stack([random_unit(f"{i} {j}") for i in kept for j in range(5)])
  expected = peer_recalls(images, texts, np.repeat(np.arange(13), 5), (1, 5, 10))
  assert results == {
    **{f"retrieval/some/{name}": value for name, value in expected.items()},
    "retrieval/some/pairs": 65,
    "retrieval/some/distinct_captions": 65,
    "retrieval/some/truncated": 0,
    "retrieval/some/examples": 13,
    "retrieval/some/rows": 14,
  }
  assert len(lines) == 1 and "1 of 14 pictures cannot be read" in lines[0]
  every = retrieval_sets.evaluate(MODEL, captioned, name="some", captions_per_image=None)
  assert every["retrieval/some/pairs"] == sum(5 + i % 3 for i in kept)
  with pytest.raises(ValueError, match="captions_per_image = 0"):
    retrieval_sets.evaluate(MODEL, captioned, name="some", captions_per_image=0)


def test_truncated_counts_captions_longer_than_the_context():
  # "cat" is one token; start and end are two.
  assert retrieval_sets.truncated(["cat " * 6, "cat", "cat " * 6], 8, tokenizer.Tokenizer()) == 0
  assert (
    retrieval_sets.truncated(["cat " * 7, "cat " * 6, "cat " * 99], 8, tokenizer.Tokenizer()) == 2
  )
  assert retrieval_sets.truncated(["cat " * 75, "cat " * 76], 77, tokenizer.Tokenizer()) == 1


def evaluate(name, root, **changes):
  options = Options(root=root, **changes)
  retrieval_sets.check(name, options)
  return retrieval_sets.run(MODEL, name, options)


def write_karpathy(root, dataset, images):
  (root / "karpathy").mkdir(exist_ok=True)
  (root / "karpathy" / f"dataset_{dataset}.json").write_text(json.dumps({"images": images}))


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_karpathys_test_split(tmp_path, dataset):
  images, captions = [], []
  for i in range(12):
    split = ("test", "train", "val", "restval")[i % 4] if i > 4 else "test"
    name = f"COCO_val2014_{i:012}.jpg" if dataset == "coco" else f"{1000 + i}.jpg"
    folder = "coco/val2014" if dataset == "coco" else "flickr30k/images"
    own = [f" caption {i} {j}\n" for j in range(5 + i % 2)]
    entry = {"filename": name, "split": split, "sentences": [{"raw": text} for text in own]}
    images.append(entry | ({"filepath": "val2014"} if dataset == "coco" else {}))
    if split == "test":
      picture(tmp_path / folder / name, i)
      captions.append((i, [text.strip() for text in own[:5]]))
  write_karpathy(tmp_path, dataset, images)
  results = evaluate(dataset, tmp_path)
  expected = peer_recalls(
    np.stack([random_unit(i) for i, _ in captions]),
    np.stack([random_unit(text) for _, own in captions for text in own]),
    np.repeat(np.arange(len(captions)), 5),
    (1, 5),
  )
  for name, value in expected.items():
    assert results[f"retrieval/{dataset}/{name}"] == value
  assert results[f"retrieval/{dataset}/rows"] == len(captions) == 6
  assert results[f"retrieval/{dataset}/pairs"] == 30
  assert evaluate(dataset, tmp_path, limit=2)[f"retrieval/{dataset}/rows"] == 2


def test_urban1k(tmp_path):
  for i in (1, 2, 10):
    picture(tmp_path / "urban1k" / "image" / f"{i}.jpg", i)
    path = tmp_path / "urban1k" / "caption" / f"{i}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"street {i} with many cars and people.\n" if i > 1 else "street")
  found = retrieval_sets.SETS["urban1k"].read(Options(root=tmp_path), "urban1k")
  assert [(c.image.name, c.captions[0].split()[0]) for c in found] == [
    ("1.jpg", "street"),
    ("2.jpg", "street"),
    ("10.jpg", "street"),
  ]
  results = evaluate("urban1k", tmp_path)
  assert results["retrieval/urban1k/truncated"] == 2
  assert results["retrieval/urban1k/examples"] == 3
  assert results["retrieval/urban1k/image_to_text/r5"] == 1


def test_docci_takes_the_test_split(tmp_path):
  lines = []
  for i, split in enumerate(["train", "test", "qual_dev", "test", "qual_test"]):
    example = f"{split}_{i:05}"
    lines.append(
      {
        "example_id": example,
        "split": split,
        "image_file": f"{example}.jpg",
        "description": f"A long text {i}.",
      }
    )
    picture(tmp_path / "docci" / "images" / f"{example}.jpg", i)
  file = tmp_path / "docci" / "docci_descriptions.jsonlines"
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = retrieval_sets.SETS["docci"].read(Options(root=tmp_path), "docci")
  assert [c.captions for c in found] == [("A long text 1.",), ("A long text 3.",)]
  assert evaluate("docci", tmp_path)["retrieval/docci/examples"] == 2


def test_a_set_of_ones_own(tmp_path):
  for i in range(3):
    picture(tmp_path / "mine" / "pictures" / f"{i}.png", i)
  lines = [
    {"image": "pictures/0.png", "caption": "zero"},
    {"image": "pictures/1.png", "captions": ["one", "uno"]},
    {"image": "pictures/0.png", "caption": "null"},  # the same image once more
    {"image": "pictures/2.png", "caption": "two"},
  ]
  file = tmp_path / "mine" / "captions.jsonl"
  file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
  results = evaluate("mine", tmp_path)
  expected = peer_recalls(
    np.stack([random_unit(i) for i in range(3)]),
    np.stack([random_unit(text) for text in ("zero", "null", "one", "uno", "two")]),
    np.array([0, 0, 1, 1, 2]),
    (1,),
  )
  for name, value in expected.items():
    assert results[f"retrieval/mine/{name}"] == value
  assert (results["retrieval/mine/rows"], results["retrieval/mine/pairs"]) == (3, 5)


def test_missing_and_malformed_files_end_in_one_line(tmp_path):
  def error(name, root=tmp_path):
    with pytest.raises(ValueError) as caught:
      retrieval_sets.check(name, Options(root=root))
    assert "\n" not in str(caught.value)
    return str(caught.value)

  for name in (*retrieval_sets.SETS, "mine"):
    assert "--datasets" in error(name, root=None)
  assert "caption_datasets.zip" in error("coco")
  assert "huggingface.co/datasets/BeichenZhang/Urban1k" in error("urban1k")
  assert "google.github.io/docci" in error("docci")
  assert "captions.jsonl" in error("mine") and "coco, flickr30k" in error("mine")
  assert "name of a folder" in error("../mine")
  write_karpathy(tmp_path, "coco", [])
  assert "no image of split 'test'" in error("coco")
  entry = {"filename": "COCO_val2014_1.jpg", "split": "test", "sentences": []}
  write_karpathy(tmp_path, "coco", [entry])
  assert "sentences = []" in error("coco")
  write_karpathy(tmp_path, "coco", [entry | {"sentences": [{"raw": "a"}]}])
  assert "val2014 holds none of its 1 pictures. Get val2014.zip" in error("coco")
  write_karpathy(tmp_path, "coco", [entry | {"filename": "1.jpg", "sentences": [{"raw": "a"}]}])
  assert "'1.jpg' is no name of a COCO 2014 picture" in error("coco")
  (tmp_path / "urban1k" / "caption").mkdir(parents=True)
  assert "holds no .txt file" in error("urban1k")
  (tmp_path / "urban1k" / "caption" / "1.txt").write_text(" \n")
  assert "1.txt is empty" in error("urban1k")
  own = tmp_path / "mine" / "captions.jsonl"
  own.parent.mkdir()
  own.write_text('{"image": "a.png", "caption": "a"}\n{"image"\n')
  assert "captions.jsonl line 2 is not JSON" in error("mine")
  own.write_text('{"image": "a.png"}\n')
  assert "line 1: caption = None" in error("mine")
  own.write_text('{"image": "a.png", "captions": ["a", " "]}\n')
  assert "line 1: captions = ['a', ' ']" in error("mine")
  own.write_text("[1]\n")
  assert "line 1: image = None" in error("mine")
  own.write_text("")
  assert "is empty" in error("mine")
