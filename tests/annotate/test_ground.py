"""Boxes of descriptions: detectors of the real classes, and a stub that answers from the truth."""

import io
import types

import numpy as np
import pytest
import tiny_detectors
import torch
import transformers
from PIL import Image

from grain_jax.annotate import detectors, ground, stages
from grain_jax.data.scenes import scenes

RED = (250, 20, 10)
# (width, height) of an image, and (xmin, ymin, xmax, ymax) of a box in its pixels.
SHAPES = (
  ((64, 64), (8, 16, 40, 48)),
  ((200, 50), (120, 10, 200, 35)),  # wide
  ((30, 170), (0, 100, 22, 170)),  # tall
  ((7, 5), (2, 1, 6, 4)),  # tiny
  ((500, 320), (250, 40, 500, 300)),  # larger than a processor's input: made smaller first
  ((1, 90), (0, 30, 1, 75)),  # one pixel wide
  ((700, 1), (100, 0, 600, 1)),  # one pixel high
  ((1, 1), (0, 0, 1, 1)),
  ((2000, 3), (500, 0, 1500, 2)),
)


@pytest.fixture(scope="module", params=tiny_detectors.KINDS)
def folder(request, tmp_path_factory):
  return tiny_detectors.KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
  return tiny_detectors.owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
  return tiny_detectors.grounding_dino(tmp_path_factory.mktemp("dino"))


def settings(**changes):
  values = {flag.name: flag.default for flag in ground.FLAGS}
  return {**values, "model": "", "kind": "", "files": [], "device": "cpu", **changes}


def item(image, descriptions, *, key="k", regions=()):
  if isinstance(image, Image.Image):
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    image = encoded.getvalue()
  return stages.Item(key, image, ["a caption"], list(descriptions), list(regions), [])


def picture(size, box):
  image = Image.new("RGB", size, (20, 90, 200))
  image.paste(RED, box)
  return image


class Truth:
  """In the place of a model: answers in its frame, of images whose boxes it knows in their order.

  Of each image the first box is wrong, of a fair score for all texts; then come the true ones, each
  of the best score for its own text. Whether the first of them is where the pixels say so is looked
  at.
  """

  def __init__(self, model, processor, truths, *, look=True):
    """`truths`: ((width, height), boxes of the texts in pixels) of each image."""
    self.config, self._processor, self._truths = model.config, processor, iter(truths)
    self._owlv2, self._looks, self.looked = model.config.model_type == "owlv2", look, 0

  def __call__(self, *, pixel_values, input_ids, pixel_mask=None, **_):
    truths = [next(self._truths) for _ in pixel_values]
    boxes = np.full((len(truths), 1 + max(len(own) for _, own in truths), 4), 0.1)
    owlv2 = self._owlv2
    texts = input_ids.shape[0] // len(truths) if owlv2 else self.config.max_text_len
    logits = np.full((*boxes.shape[:2], texts), -9.0, np.float32)
    logits[:, 0] = 1.0
    for i, (size, own) in enumerate(truths):
      pixels = pixel_values[i]
      valid = pixels.shape[1:]
      if not self._owlv2:
        valid = (int(pixel_mask[i, :, 0].sum()), int(pixel_mask[i, 0].sum()))
      true = np.array(own) / self._sides(size)
      if self._looks:
        self._look(pixels[:, : valid[0], : valid[1]].numpy(), true[0])
      center, sides = (true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]
      boxes[i, 1 : len(own) + 1] = np.concatenate([center, sides], axis=1)
      for k in range(len(own)):
        logits[i, 1 + k, k if self._owlv2 else self._tokens(input_ids[i], k)] = 2.0
    return types.SimpleNamespace(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes))

  def _sides(self, size):
    """Pixels of the image that make up the sides of the frame: [width, height] * 2."""
    # Made smaller beyond twice the processor's longer side, padded to a shape that it can take.
    longest, narrowest = (64, 1e9) if self._owlv2 else (192, 16)
    small = [max(1, round(side * min(1, longest / max(size)))) for side in size]
    padded = [max(side, 4, -(-max(small) // narrowest)) for side in small]
    padded = [max(padded)] * 2 if self._owlv2 else padded  # it pads to a square
    return [w * p / s for w, p, s in zip(size, padded, small, strict=True)] * 2

  def _tokens(self, ids, k):
    """Those of the k-th text of a prompt: before its full stop."""
    stops = [0, *np.flatnonzero(ids.numpy() == 1012)]
    return slice(stops[k] + 1, stops[k + 1])

  def _look(self, pixels, true):
    height, width = pixels.shape[1:]
    x0, y0 = np.ceil(true[:2] * [width, height]).astype(int) + 1
    x1, y1 = np.maximum(np.floor(true[2:] * [width, height]).astype(int) - 1, 0)
    inside = pixels[:, y0:y1, x0:x1]
    if inside.size:
      mean, std = np.array(self._processor.image_mean), np.array(self._processor.image_std)
      color = 255 * (inside.mean((1, 2)) * std + mean)
      assert np.abs(color - RED).max() < 60, (color, true)
      self.looked += 1


def iou(a, b):
  low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
  common = np.prod(np.maximum(high - low, 0))
  return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)


def check_all_found(results, truths):
  for ((width, height), boxes), result in zip(truths, results, strict=True):
    assert not result.losses and len(result.line["regions"]) == len(boxes)
    for region, (x0, y0, x1, y1) in zip(result.line["regions"], boxes, strict=True):
      true = np.array([y0 / height, x0 / width, y1 / height, x1 / width])
      assert iou(np.array(region["box"]), true) == pytest.approx(1, abs=2e-6), (width, height)
      assert region["score"] == pytest.approx(1 / (1 + np.exp(-2.0)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_boxes_are_those_of_the_image_whatever_its_shape(folder, batch_size):
  detector = detectors.load(folder, device="cpu")
  truths = [(size, [box, (0, 0, size[0], (size[1] + 1) // 2)]) for size, box in SHAPES]
  detector.model = stub = Truth(detector.model, detector.processor, truths)
  stage = ground.Ground(settings(batch_size=batch_size), detector)
  results = stage.annotate([item(picture(*shape), ["a red box", "sofa"]) for shape in SHAPES])
  check_all_found(results, truths)
  assert stub.looked >= 5


def test_the_boxes_of_scenes_are_found(folder):
  """As drawn, and drawn out to another shape."""
  detector, items, truths = detectors.load(folder, device="cpu"), [], []
  drawn = scenes.Scenes(scenes.SceneSettings(concepts=6, train=6))
  for i in range(6):
    record = drawn.record("train", i)
    image = Image.open(io.BytesIO(record["image"]))
    size = (image.width * (1 + i), image.height)
    texts = list(dict.fromkeys(region["description"] for region in record["regions"]))
    boxes = [
      next(list(map(float, r["box"])) for r in record["regions"] if r["description"] == t)
      for t in texts
    ]
    truths.append((size, [(b[1] * size[0], b[0] * size[1], b[3] * size[0], b[2] * size[1])
                          for b in boxes]))  # fmt: skip
    items.append(item(image.resize(size), texts))
  detector.model = Truth(detector.model, detector.processor, truths, look=False)
  results = ground.Ground(settings(batch_size=3), detector).annotate(items)
  check_all_found(
    [r._replace(losses=[x for x in r.losses if x[1] != "cut_to_text_limit"]) for r in results],
    truths,
  )


def test_an_image_of_any_shape_goes_through_the_model(folder):
  stage = ground.Ground(settings(threshold=0.0), detectors.load(folder, device="cpu"))
  results = stage.annotate([item(picture(*shape), ["a red box", "sofa"]) for shape in SHAPES])
  for result in results:
    assert len(result.raw[0]) == 2
    for region in result.line["regions"]:
      ymin, xmin, ymax, xmax = region["box"]
      assert 0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1 and 0 < region["score"] <= 1
  assert stage.totals()["descriptions"] == 2 * len(SHAPES)


def test_boxes_are_those_of_the_post_processing_of_transformers(folder, rng):
  """And OWLv2's scores, where a text is a box's best."""
  detector = detectors.load(folder, device="cpu")
  image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
  texts = ["a red box", "a dog", "sofa"]
  found = detector.detect([image], [texts])[0]
  name = {"Owlv2": "Owlv2Processor"}.get(type(detector).__name__, "GroundingDinoProcessor")
  processor = getattr(transformers, name)(detector.processor, detector.tokenizer)
  inputs = processor(
    images=image, text=[texts], return_tensors="pt",
    **({"max_length": 16} if name == "Owlv2Processor" else {}),
  )  # fmt: skip
  with torch.no_grad():
    outputs = detector.model(**inputs)
  more = {} if name == "Owlv2Processor" else {"input_ids": inputs["input_ids"]}
  theirs = processor.post_process_grounded_object_detection(
    outputs, threshold=-1.0, target_sizes=[(40, 60)], **more
  )[0]
  ours = found.boxes[:, [1, 0, 3, 2]] * [60, 40, 60, 40]
  np.testing.assert_allclose(ours, theirs["boxes"].numpy(), atol=1e-3)
  if name == "Owlv2Processor":
    np.testing.assert_allclose(found.scores.max(0), theirs["scores"].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.scores.argmax(0), theirs["labels"].numpy())


def test_a_prompt_is_that_of_transformers_and_spans_are_of_its_texts(dino):
  detector = detectors.load(dino, device="cpu")
  texts = [detector.fit(text)[0] for text in ("A red box.", "the Dog [SEP] sleeps?", "sofa")]
  assert texts == ["a red box", "the dog sleeps", "sofa"]
  ids, spans = detector.prompt(texts)
  processor = transformers.GroundingDinoProcessor(detector.processor, detector.tokenizer)
  assert ids == processor(text=[texts], return_tensors="np")["input_ids"][0].tolist()
  assert [detector.tokenizer.decode(ids[a:b]) for a, b in spans] == texts


@pytest.mark.parametrize("aggregate, expected", [("mean", 0.5), ("max", 0.8)])
def test_scores_of_tokens_become_one(dino, aggregate, expected):
  detector = detectors.load(dino, device="cpu", aggregate=aggregate)

  def model(*, input_ids, **_):
    logits = torch.full((1, 1, 256), -torch.inf)
    scores = torch.tensor([0.99, 0.2, 0.5, 0.8, 0.99, 0.1, 0.99, 0.99])  # [CLS] a red box . sofa .
    logits[0, 0, : input_ids.shape[1]] = torch.logit(scores)
    return types.SimpleNamespace(logits=logits, pred_boxes=torch.full((1, 1, 4), 0.5))

  model.config, detector.model = detector.model.config, model
  found = detector.detect([Image.new("RGB", (64, 64))], [["a red box", "sofa"]])[0]
  np.testing.assert_allclose(found.scores[:, 0], [expected, 0.1], rtol=1e-5)


def test_boxes_of_a_padded_batch_are_fractions_of_what_is_not_padding(dino, rng):
  """Those of the real model, whose proposals lie on the grid of what is not padding."""
  detector = detectors.load(dino, device="cpu")
  sizes = ((96, 48), (64, 64))
  images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in sizes]
  found = detector.detect(images, [["a red box"]] * 2)
  centers = (found[1].boxes[:, :2] + found[1].boxes[:, 2:]) / 2
  grids = [(np.arange(n) + 0.5) / n for n in (8, 4, 2, 1)]  # 64 pixels by 8, 16, 32 and 64
  far = [min(np.abs(grid - c).min() for grid in grids) for c in centers.ravel()]
  assert max(far) < 1e-3 and centers.max() > 0.8


def stub(logits, boxes):
  """A detector that says this of every image: scores [K, N], boxes [N, 4]."""

  class Stub(detectors.Owlv2):
    asked = []

    def __init__(self):
      self._together = 0

    def detect(self, images, texts):
      self.asked.append([list(own) for own in texts])
      return [detectors.Found(np.array(boxes, float), np.array(logits)[: len(t)]) for t in texts]

    def _length(self, text):
      return len(text.split()) + 2 if text else 0

    def _longest_text(self):
      return 5

  return Stub()


BLACK = Image.new("RGB", (8, 8))


def test_a_box_that_two_descriptions_want_is_of_both():
  detector = stub([[0.9, 0.31], [0.8, 0.3]], [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
  result = ground.Ground(settings(), detector).annotate([item(BLACK, ["a dog", "a brown dog"])])[0]
  assert [(r["description"], r["box"], r["score"]) for r in result.line["regions"]] == [
    ("a dog", [0, 0, 0.5, 0.5], 0.9), ("a brown dog", [0, 0, 0.5, 0.5], 0.8),
  ]  # fmt: skip


def test_most_boxes_of_a_description_without_those_that_overlap():
  """IoU of the first two: 0.4 * 0.5 / (0.25 + 0.25 - 0.2) = 2 / 3."""
  boxes = [[0, 0, 0.5, 0.5], [0.1, 0, 0.6, 0.5], [0.5, 0.5, 1, 1], [0.6, 0.6, 0.7, 0.7]]
  scores = np.array([0.5, 0.9, 0.4, 0.3])
  best = lambda **more: [  # noqa: E731
    box.score for box in ground.best_boxes(np.array(boxes), scores, threshold=0.3, **more)
  ]
  assert best(top_k=1, nms=0.7) == [0.9]
  assert best(top_k=3, nms=0.67) == [0.9, 0.5, 0.4]  # 0.3 does not exceed the threshold
  assert best(top_k=2, nms=0.67) == [0.9, 0.5]
  assert best(top_k=3, nms=0.66) == [0.9, 0.4]


def test_what_is_not_found_cut_or_known_is_counted():
  detector = stub([[0.9], [0.2], [0.3], [0.8]], [[-0.5, 0, 0.5, 2]])
  known = {"description": "a cat", "box": (0, 0, 1, 1), "score": 1.0, "negatives": ["a dog"]}
  words = ["A red box", "A cat", "sofa", "a RED box", "", "a very long red box", "dog"]
  stage = ground.Ground(settings(), detector)
  result, empty = stage.annotate([item(BLACK, words, regions=[known]), item(BLACK, [])])
  assert detector.asked == [[["A red box", "sofa", "a very long", "dog"]]]
  assert result.line == {
    "regions": [
      {"description": "a cat", "box": [0, 0, 1, 1], "score": 1, "negatives": ["a dog"]},
      {"description": "A red box", "box": [0, 0, 0.5, 1], "score": 0.9},
      {"description": "dog", "box": [0, 0, 0.5, 1], "score": 0.8},
    ]
  }
  assert sorted(result.losses) == [
    ("descriptions", "cut_to_text_limit"), ("descriptions", "duplicate"),
    ("descriptions", "nothing_to_read"), ("regions", "description_without_box"),
    ("regions", "description_without_box"),
  ]  # fmt: skip
  box = (0, 0, 0.5, 1)
  assert result.raw == [
    [
      {"description": "A red box", "box": box, "score": 0.9},
      {"description": "sofa", "box": box, "score": 0.2},
      {"description": "a very long red box", "asked": "a very long", "box": box, "score": 0.3},
      {"description": "dog", "box": box, "score": 0.8},
    ]
  ]
  assert empty == stages.Result({"regions": []}, [("pictures", "without_descriptions")], [])
  assert stage.totals() == {
    "prompts": 1, "descriptions": 4, "descriptions_with_box": 2, "descriptions_with_box_before": 1,
  }  # fmt: skip
  assert stage.totals() == {}


def test_a_long_description_is_cut_to_whole_words(owlv2, tmp_path):
  """OWLv2 reads 14 tokens between its own two; a letter alone is one."""
  detector = detectors.load(owlv2, device="cpu")
  assert detector.fit("a red box") == ("a red box", False)
  assert detector.fit("a red box " + "x y z " * 4) == ("a red box " + "x y z " * 3 + "x y", True)
  assert detector.fit("red <|endoftext|> dog") == ("red dog", False)
  assert detector.fit("x" * 10_000) == ("", True)
  dino = tiny_detectors.grounding_dino(tmp_path / "short", max_text_len=12)
  detector = detectors.load(dino, device="cpu")
  assert detector.fit("dog " * 9) == ("dog " * 8 + "dog", False)
  assert detector.fit("dog " * 10) == ("dog " * 8 + "dog", True)
  assert detector.fit("...") == ("", False)
  # 12 tokens less [CLS] and [SEP]; each text has a full stop.
  assert detector.chunks(["red dog", "a cat", "a brown dog", "sofa"]) == [[0, 1, 2], [3]]
  stage = ground.Ground(settings(threshold=0.0), detector)
  descriptions = ["red dog", "a cat", "a brown dog", "sofa", "dog " * 12]
  result = stage.annotate([item(BLACK, descriptions)])[0]
  assert [r["description"] for r in result.line["regions"]] == descriptions
  assert stage.totals()["prompts"] == 3
  assert detectors.load(dino, device="cpu", texts_per_prompt=1).chunks(["a", "b"]) == [[0], [1]]


def test_memory_that_does_not_do_and_numbers_that_are_none():
  detector = stub([[0.9]], [[0, 0, 0.5, 0.5]])
  whole, sizes = detector.detect, []

  def detect(images, texts):
    sizes.append(len(images))
    if len(images) > 2 or any(image.size == (9, 9) for image in images):
      raise torch.cuda.OutOfMemoryError("no memory")
    found = whole(images, texts)
    bad = [image.size == (7, 7) for image in images]
    return [f._replace(scores=f.scores * np.nan) if b else f for f, b in zip(found, bad, strict=1)]

  detector.detect = detect
  images = [BLACK, BLACK, Image.new("RGB", (7, 7)), Image.new("RGB", (9, 9)), b"no image"]
  results = ground.Ground(settings(), detector).annotate([item(i, ["dog"]) for i in images])
  assert sizes == [4, 2, 2, 1, 1]
  assert [bool(result.line) for result in results] == [True, True, False, False, False]
  assert [result.losses for result in results[2:]] == [
    [("pictures", "not_finite")], [("pictures", "out_of_memory")], [("pictures", "corrupt_image")],
  ]  # fmt: skip
