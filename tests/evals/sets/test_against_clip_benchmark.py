"""A CLIP of random weights here, and exported to transformers under clip_benchmark's functions."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch
import transformers
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from grain_jax import evaluate, export
from grain_jax.convert import convert
from grain_jax.evals.inputs.options import Options

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "convert"))
import stock_models as stock  # noqa: E402

CLASSES = ("red apple", "blue car", "green frog", "pink house", "old shoe", "dog", "cat")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}", "{}")


class Exported:
  """What clip_benchmark calls, of a folder that `grain_jax.export` wrote."""

  def __init__(self, folder):
    self.model = transformers.CLIPModel.from_pretrained(folder).eval()
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self.processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

  def tokenize(self, texts):
    return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")

  def encode_text(self, tokens):
    return self.model.get_text_features(**tokens).pooler_output

  def encode_image(self, pixels):
    return self.model.get_image_features(pixels).pooler_output

  def pixels(self, path):
    return self.processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(run of random weights, the same exported)."""
  folder = tmp_path_factory.mktemp("clip")
  config = transformers.CLIPConfig(
    text_config={
      "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
      "max_position_embeddings": 24, "eos_token_id": 49407,
    },
    vision_config={
      "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
      "image_size": 32, "patch_size": 8,
    },
    projection_dim=16,
  )  # fmt: skip
  stock.randomize(transformers.CLIPModel(config)).save_pretrained(folder / "hf")
  convert.convert("hf_clip", str(folder / "hf"), out=str(folder / "run"))
  export.export(str(folder / "run"), format="hf_clip", out=str(folder / "out"))
  return folder / "run", Exported(folder / "out")


def pictures(folder, count, rng):
  """Blotches of a few colours, none square, so that the crop is part of the comparison."""
  folder.mkdir(parents=True)
  paths = []
  for i in range(count):
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    size = (int(rng.integers(40, 70)), int(rng.integers(33, 50)))
    paths.append(folder / f"{i}.png")
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
  return paths


def test_zero_shot_predicts_the_same(model, tmp_path, rng):
  run, exported = model
  root = tmp_path / "data" / "mine"
  given = [(p, i) for i, name in enumerate(sorted(CLASSES)) for p in pictures(root / name, 5, rng)]
  (root / "templates.json").write_text(json.dumps(TEMPLATES))
  options = Options(root=root.parent, cache=tmp_path / "cache")
  ours = evaluate.evaluate(run, ["zero_shot:mine"], options=options)[0].results

  classifier = zeroshot_classification.zero_shot_classifier(
    exported, exported.tokenize, sorted(CLASSES), [t.replace("{}", "{c}") for t in TEMPLATES],
    "cpu", amp=False,
  )  # fmt: skip
  loader = [(exported.pixels(path), torch.tensor([label])) for path, label in given]
  logits, true = zeroshot_classification.run_classification(
    exported, classifier, loader, "cpu", amp=False
  )
  # Not clip_benchmark's own `accuracy`: it stumbles over NumPy 2.4.
  labels = range(len(CLASSES))
  top1, top5 = (top_k_accuracy_score(true, logits, k=k, labels=labels) for k in (1, 5))
  assert 0 < top1 < 1 and len(np.unique(logits.argmax(1))) > 1  # else nothing would be compared
  assert ours["zero_shot/mine/top1"] == pytest.approx(top1, abs=1e-6)
  assert ours["zero_shot/mine/top5"] == pytest.approx(top5, abs=1e-6)
  recall = zeroshot_classification.balanced_accuracy_score(true, logits.argmax(1))
  assert ours["zero_shot/mine/mean_per_class"] == pytest.approx(recall, abs=1e-6)


def test_retrieval_finds_the_same(model, tmp_path, rng):
  run, exported = model
  paths = pictures(tmp_path / "flickr30k" / "images", 14, rng)
  words = [
    "red",
    "blue",
    "green",
    "old",
    "small",
    "large",
    "dog",
    "cat",
    "apple",
    "car",
    "tree",
    "house",
    "near",
    "under",
  ]
  captions = [[" ".join(rng.choice(words, 5)) for _ in range(5)] for _ in paths]
  (tmp_path / "karpathy").mkdir()
  images = [
    {"filename": p.name, "split": "test", "sentences": [{"raw": c} for c in own]}
    for p, own in zip(paths, captions, strict=True)
  ]
  (tmp_path / "karpathy" / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
  options = Options(root=tmp_path)
  ours = evaluate.evaluate(run, ["retrieval:flickr30k"], options=options)[0].results

  # clip_benchmark numbers images within batches of the first one's size: all in one batch.
  batch = torch.cat([exported.pixels(path) for path in paths])
  theirs = zeroshot_retrieval.evaluate(
    exported, [(batch, captions)], exported.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
  )
  assert 0 < theirs["image_retrieval_recall@5"] < 1
  for k in (1, 5, 10):
    text_to_image = ours[f"retrieval/flickr30k/text_to_image/r{k}"]
    assert text_to_image == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
    image_to_text = ours[f"retrieval/flickr30k/image_to_text/r{k}"]
    assert image_to_text == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
