"""Descriptions by models of `transformers` in this process: small random ones, real classes."""

import io
import json
import pathlib

import numpy as np
import pytest
import tiny_language
import tiny_models
import torch
import toy_data
import transformers
from PIL import Image

from grain_jax.annotate import __main__ as annotate
from grain_jax.annotate import asking, describe, language_models, local_models, masked, stages


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Of torch: models as small as these wait for each other's threads."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def folder(request, tmp_path_factory):
  transformers.utils.logging.disable_progress_bar()
  torch.manual_seed(0)
  found = tmp_path_factory.mktemp(request.param)
  tiny_models.KINDS[request.param](found)
  return found


def settings(folder, **changes):
  values = {flag.name: flag.default for flag in describe.FLAGS}
  own = {"backend": "transformers", "model": str(folder), "max_tokens": 24, "batch_size": 3}
  return describe.settings({**values, **own, **changes})


def picture(seed, width=60, height=40):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return toy_data.jpeg(pixels)


def requests():
  shapes = [(60, 40), (30, 90), (64, 64), (41, 37), (120, 30)]
  return [
    asking.Request("any", "What is this?" + " And that?" * i, picture(i, *shape), lambda t: None)
    for i, shape in enumerate(shapes)
  ]


def alone(processor, model, request, most):
  """What transformers itself says: one picture, no padding."""
  content = [
    {"type": "image", "image": Image.open(io.BytesIO(request.image))},
    {"type": "text", "text": request.prompt},
  ]
  inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt",
  )  # fmt: skip
  found = model.generate(**inputs, max_new_tokens=most, do_sample=False)
  ids = found[0, inputs["input_ids"].shape[1] :]
  return processor.tokenizer.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1]


def test_a_batch_says_what_each_picture_says_alone(folder):
  """Of different shapes and prompts of different lengths: padding changes nothing."""
  found, asked = local_models.Local(settings(folder)), requests()
  replies = found.ask(asked)
  processor = local_models.load_processor(str(folder))
  model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
  singly = [alone(processor, model, request, 24) for request in asked]
  assert [reply.text for reply in replies] == [text for text, _ in singly]
  assert len({reply.text for reply in replies}) > 1  # they depend on what is shown
  totals = found.totals()
  assert totals["requests"] == 5 and totals["tokens_in"] == sum(n for _, n in singly)
  assert 0 < totals["tokens_out"] <= 5 * 24 and found.totals() == {}


def test_the_picture_is_seen(folder):
  found = local_models.Local(settings(folder, batch_size=8))
  colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250), (0, 0, 0), (250, 250, 0)]
  flat = [toy_data.jpeg(np.full((40, 40, 3), colour, np.uint8)) for colour in colours]
  asked = [asking.Request("any", "What?", image, lambda t: None) for image in flat]
  assert len({reply.text for reply in found.ask(asked)}) > 1


def scripted(monkeypatch, say):
  """The real model is asked, and its tokens replaced by what `say(prompt)` gives."""
  template = local_models.Local._generate

  def generate(self, requests):
    replies = template(self, requests)
    texts = [say(request.prompt) for request in requests]
    return [
      self._reply(request, text, cut=False)
      for request, text, _ in zip(requests, texts, replies, strict=True)
    ]

  monkeypatch.setattr(local_models.Local, "_generate", generate)


def test_the_whole_command(folder, tmp_path, monkeypatch, capfd):
  def say(prompt):
    if "Its main visual subjects are" in prompt:
      return "- a brown dog\n- a green sofa" if "a dog" in prompt else "I cannot"
    return "a dog\na sofa" if "Name its main" in prompt else "A dog on a sofa."

  scripted(monkeypatch, say)
  root = tmp_path / "pictures"
  root.mkdir()
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(7):
      (root / f"{i}.jpg").write_bytes(picture(i))
      lines.write(json.dumps({"image": f"{i}.jpg", "captions": [f"picture {i}"]}) + "\n")
  out = tmp_path / "out"
  arguments = [f"--model={folder}", f"--input={root}", f"--out={out}", "--max_tokens=4"]
  command = ["describe", "--backend=transformers", "--ray_address=none", *arguments]
  assert annotate.main(command) == 0
  text = "".join(file.read_text() for file in pathlib.Path(out, "annotations").glob("*"))
  found = [json.loads(line) for line in text.splitlines()]
  assert len(found) == 7 and found[3] == {
    "key": "3.jpg", "captions": ["A dog on a sofa."],
    "descriptions": ["a brown dog", "a green sofa"],
  }  # fmt: skip
  assert json.loads((out / "manifest.json").read_text())["totals"]["requests"] == 21
  assert "requests" in capfd.readouterr().out


def test_replies_of_a_random_model_are_counted_and_never_an_error(folder):
  stage = describe.make(settings(folder, max_tokens=12))
  records = [toy_data.record(i) for i in range(4)]
  items = [stages.Item(r["key"], r["image"], r["captions"], [], r["regions"], []) for r in records]
  results = stage.annotate(items)
  assert stage.num_gpus == 1 and stage.batch_size == 3
  for result in results:
    assert result.line or ("pictures" in dict(result.losses))
    assert all(raw["reply"] is not None for raw in result.raw)
    json.dumps(result.raw, ensure_ascii=False).encode()
  regions = describe.make(settings(folder, region_captions=True, max_tokens=8))
  for found, given in zip(regions.annotate(items), items, strict=True):
    if found.line:
      assert [r["box"] for r in found.line["regions"]] == [list(r["box"]) for r in given.regions]


def test_what_one_picture_breaks_costs_that_picture_alone(folder, monkeypatch):
  template = local_models.Local._generate

  def generate(self, requests):
    if any("third" in request.prompt for request in requests):
      raise torch.OutOfMemoryError("no memory")
    if any("fourth" in request.prompt for request in requests):
      raise ValueError("absolute aspect ratio must be smaller than 200")
    return template(self, requests)

  monkeypatch.setattr(local_models.Local, "_generate", generate)
  names = ("first", "second", "third", "fourth", "fifth")
  asked = [asking.Request("any", name, picture(1), lambda t: None) for name in names]
  replies = local_models.Local(settings(folder, batch_size=5)).ask(asked)
  assert [reply.why for reply in replies] == ["", "", "out_of_memory", "model_error", ""]
  with pytest.raises(ValueError, match="fails at every picture: absolute aspect ratio"):
    local_models.Local(settings(folder)).ask(asked[3:4] * 2)


def test_cut_out_of_a_picture_with_a_margin():
  from grain_jax.annotate import dialogues

  pixels = np.zeros((100, 200, 3), np.uint8)
  pixels[40:80, 100:150] = 255
  box = (0.4, 0.5, 0.8, 0.75)
  found = np.asarray(Image.open(io.BytesIO(dialogues.cut_out(toy_data.jpeg(pixels), box, 0.0))))
  assert found.shape == (40, 50, 3) and found.min() > 240
  found = np.asarray(Image.open(io.BytesIO(dialogues.cut_out(toy_data.jpeg(pixels), box, 0.5))))
  assert found.shape == (80, 100, 3)  # 20 above and below, 25 left and right
  assert found[:19].max() < 15 and found[21:59, 26:74].min() > 240 and found[61:].max() < 15
  corner = dialogues.cut_out(toy_data.jpeg(pixels), (0.0, 0.0, 0.01, 0.001), 1.0)
  assert min(Image.open(io.BytesIO(corner)).size) == 32


@pytest.mark.parametrize(
  ("spoil", "said"),
  [
    (lambda f: (f / "config.json").unlink(), "is no folder with a config.json. Download"),
    (lambda f: (f / "model.safetensors").rename(f / "x.bin"), r"has no \*\.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded as a model"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded as a model"),
    (lambda f: (f / "chat_template.jinja").unlink(), "has no image processor or no chat template"),
  ],
)
def test_a_folder_that_is_no_model_is_one_line(spoil, said, tmp_path):
  tiny_models.llava(tmp_path)
  spoil(tmp_path)
  with pytest.raises(ValueError, match=said) as error:
    local_models.Local(settings(tmp_path)).ask(requests()[:1])
  assert "\n" not in str(error.value)


def test_a_model_without_eyes_is_one_line(tmp_path):
  config = transformers.LlamaConfig(vocab_size=50, **tiny_models._TEXT)
  transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
  tiny_models._tokenizer()[0].save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="cannot be loaded as a model of pictures and texts"):
    local_models.Local(settings(tmp_path)).ask(requests()[:1])


@pytest.mark.parametrize(
  "load",
  [
    language_models.TransformersChat,
    masked.MaskedModel,
    lambda folder: local_models.Local({"model": folder, "batch_size": 1})._load(),
  ],
  ids=["causal", "masked", "sees"],
)
def test_code_of_a_folder_is_not_run_whatever_one_types(load, tmp_path, monkeypatch):
  names = ("Config", "ModelForCausalLM", "ModelForMaskedLM", "ModelForImageTextToText", "Processor")
  own = {f"Auto{name}": "own.Own" for name in names} | {"AutoTokenizer": ["own.Own", None]}
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": own}))
  (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
  monkeypatch.setattr("builtins.input", lambda *a: "y")
  with pytest.raises(ValueError, match="contains custom code") as error:
    load(str(tmp_path))
  assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_weights_that_are_pickled_are_not_read(tmp_path):
  folder = tiny_language.make_masked(tmp_path / "masked")
  model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
  (folder / "model.safetensors").unlink()
  torch.save(model.state_dict(), folder / "pytorch_model.bin")
  with pytest.raises(ValueError, match="safetensors"):
    masked.MaskedModel(str(folder))
