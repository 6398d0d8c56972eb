"""CLIPpy's checkpoints against torch: timm's names under 'visual.trunk', beside a Sentence-T5."""

import functools
import logging
import math

import jax
import pieces
import pytest
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import grain_jax
from grain_jax import config as configs
from grain_jax import export, tokenizing
from grain_jax.convert import clippy, convert, layout, sentence_t5, weights
from grain_jax.models import grain, initial


class Trunk(stock.TimmVision):
  """timm's vit_base_patch16_224_dino in small: no QK-norm, GELU, eps 1e-6, two heads of 64."""

  def __init__(self):
    super().__init__()
    for block in self.blocks:
      block.attn.q_norm = block.attn.k_norm = nn.Identity()


TEXTS = ["a photo of a dog", "A red Cat on the mat, the end", "Garden", "the cat " * 30]
NAMES = {"old": "auto_model", "new": "model"}  # of the tower, by version of sentence-transformers
T5 = transformers.T5Config(
  vocab_size=96, d_model=128, d_kv=64, d_ff=80, num_layers=3, num_heads=2, feed_forward_proj="relu"
)


class Published(nn.Module):
  """The published model in small, with its names: trunk, T5, mean over the mask, Linear, L2."""

  def __init__(self, name):
    super().__init__()
    self.visual = nn.ModuleDict({"trunk": Trunk()})
    dense = nn.ModuleDict({"linear": nn.Linear(128, 128, bias=False)})
    tower = nn.ModuleDict({NAMES[name]: transformers.T5EncoderModel(T5)})
    self.text = nn.ModuleList([tower, nn.Identity(), dense])
    self.logit_scale = nn.Parameter(torch.zeros(()))

  @torch.no_grad()
  def encode_image(self, pixels):
    return nn.functional.normalize(self.visual["trunk"](pixels).max(1).values, dim=-1).numpy()

  @torch.no_grad()
  def encode_patches(self, pixels):
    tokens = self.visual["trunk"](pixels)[:, 1:]
    return nn.functional.normalize(tokens, dim=-1).unflatten(1, (3, 3)).numpy()

  @torch.no_grad()
  def encode_text(self, texts, tokenizer):
    (tower,) = self.text[0].values()
    rows = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)(
      texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    mask = rows["attention_mask"][..., None].float()
    hidden = tower(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
    return stock.unit(self.text[2]["linear"]((hidden * mask).sum(1) / mask.sum(1)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer") / "pieces"
  pieces.save(folder)
  return str(folder)


@functools.cache
def published(name="old"):
  return stock.randomize(Published(name))


def save(model, path, *, wrapped=False, **changes):
  """Writes the file; `changes` by keys with __ for dots, None: left out."""
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  state = {k: v for k, v in (model.state_dict() | changes).items() if v is not None}
  if wrapped:
    state = {f"module.{key}": value for key, value in state.items()}
    state = {"epoch": 1, "name": "clippy", "state_dict": state, "optimizer": {}}
  torch.save(state, path)
  return str(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_whole_model_embeds_as_the_published_one(tokenizer, tmp_path, rng, name, wrapped):
  model, out = published(name), tmp_path / "run"
  file = save(model, tmp_path / "clippy_5k.pt", wrapped=wrapped)
  convert.convert("clippy", file, out=str(out), tokenizer=tokenizer)
  ours, image = grain_jax.load(out), stock.images(rng, 24)
  pixels = stock.pixels(ours.config, image)
  stock.assert_close(ours.encode_image(image), model.encode_image(pixels))
  stock.assert_close(ours.encode_patches(image), model.encode_patches(pixels))
  stock.assert_close(ours.encode_text(TEXTS), model.encode_text(TEXTS, tokenizer))
  assert_array_equal(ours.params["logit_scale"], model.logit_scale.detach())
  assert_allclose(ours.config.model.image.mean, OPENAI_CLIP_MEAN)
  assert ours.tokenize("a").shape == (1, 256)


def test_file_and_tokenizer_in_the_users_folder(tokenizer, tmp_path, monkeypatch):
  file = save(published(), tmp_path / "in.pt")
  (tmp_path / "pieces").symlink_to(tokenizer)
  monkeypatch.setenv("HOME", str(tmp_path))
  convert.convert("clippy", "~/in.pt", out="~/a", tokenizer="~/pieces")
  convert.convert("clippy", file, out=str(tmp_path / "b"), tokenizer=tokenizer)
  (config, a, _), (other, b, _) = stock.run_of(tmp_path / "a"), stock.run_of(tmp_path / "b")
  stock.assert_equal_trees(a, b)
  assert tokenizing.make(config).hash == tokenizing.make(other).hash


def test_out_and_in_again_is_equal_bit_for_bit(tokenizer, tmp_path):
  """What is written has the keys and tensors of what was read, the tied one in both places."""
  file = save(published(), tmp_path / "in.pt")
  first, out, again = tmp_path / "first", tmp_path / "out.pt", tmp_path / "again"
  convert.convert("clippy", file, out=str(first), tokenizer=tokenizer)
  export.export(str(first), format="clippy", out=str(out))
  written, want = torch.load(out, weights_only=True), published().state_dict()
  assert {"epoch", "name", "state_dict"} == written.keys()
  assert written["state_dict"].keys() == want.keys()
  for key, value in written["state_dict"].items():
    assert_array_equal(value, want[key], err_msg=key)
  convert.convert("clippy", str(out), out=str(again), tokenizer=tokenizer)
  (config, a, _), (other, b, _) = stock.run_of(first), stock.run_of(again)
  stock.assert_equal_trees(b, a)
  config.model.text.tokenizer = other.model.text.tokenizer  # in the folder of each
  assert config.to_dict() == other.to_dict()


def test_at_full_size_there_are_the_published_keys_and_parameters():
  """clippy_5k.pt: 252 keys, of which one is a copy, and 196,017,025 parameters."""
  config = configs.resolve(configs.load("configs/clippy_cc12m.py"))
  abstract = jax.eval_shape(lambda: initial.init_params(grain.build(config), config))
  state = jax.eval_shape(functools.partial(layout.write, clippy.rules(config)), abstract)
  assert sum(math.prod(x.shape) for x in state.values()) == 196_017_025
  assert len({*state, f"text.0.auto_model.{sentence_t5.TIED}"}) == 252
  assert state["text.0.auto_model.shared.weight"].shape == (32128, 768)
  assert state["visual.trunk.pos_embed"].shape == (1, 197, 768)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_tokenizer_it_takes_token_ids(tokenizer, tmp_path, rng, caplog, name):
  """All else is as with one; a text is one line that says what is missing."""
  model, out = published(name), tmp_path / "run"
  file = save(model, tmp_path / "clippy_5k.pt", wrapped=name == "new")
  with caplog.at_level(logging.WARNING):
    convert.convert("clippy", file, out=str(out))
  assert "texts as token ids alone" in caplog.text and "--tokenizer=FOLDER" in caplog.text
  ours, image = grain_jax.load(out), stock.images(rng, 24)
  stock.assert_close(ours.encode_image(image), model.encode_image(stock.pixels(ours.config, image)))
  rows = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)(
    TEXTS, padding=True, truncation=True, max_length=256, return_tensors="np"
  )
  found = ours.encode_token_ids(rows["input_ids"], rows["attention_mask"])
  stock.assert_close(found, model.encode_text(TEXTS, tokenizer))
  with pytest.raises(ValueError, match="was not beside its weights. .*--tokenizer=FOLDER") as error:
    ours.encode_text("a dog")
  assert "\n" not in str(error.value)
  for folder in (out, tmp_path / "again"):  # it is carried on as it is
    assert configs.read(folder / "config.json").model.text.tokenizer == "none"
    if folder == out:
      export.export(str(out), format="safetensors", out=str(tmp_path / "again"))


def test_images_alone_are_a_tower(tmp_path, rng):
  model = published()
  gone = {k: None for k in model.state_dict() if not k.startswith("visual.")}
  convert.convert("clippy", save(model, tmp_path / "x.pt", **gone), out=str(tmp_path / "run"))
  _, params, _ = weights.open_part(tmp_path / "run", "image")
  assert list(params) == ["image_tower"]
  ours, image = grain_jax.load(tmp_path / "run"), stock.images(rng, 24)
  pixels = stock.pixels(ours.config, image)
  assert_allclose(ours.config.model.image.mean, OPENAI_CLIP_MEAN)
  assert_allclose(ours.config.model.image.std, OPENAI_CLIP_STD)
  stock.assert_close(ours.encode_image(image), model.encode_image(pixels))
  stock.assert_close(ours.encode_patches(image), model.encode_patches(pixels))


TOWER = "text__0__auto_model__"
RELATIVE = f"{TOWER}encoder__block__0__layer__0__SelfAttention__relative_attention_bias__weight"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
  ("source", "changes", "words"),
  [
    ("clippy", {"visual__head__proj__weight": torch.ones(3)}, ["unknown visual.head.proj.weight"]),
    ("clippy", {"visual__trunk__norm__bias": None}, ["lacks visual.trunk.norm.bias"]),
    ("clippy", {"visual__trunk__pos_embed": None}, ["CLIPpy", "visual.trunk.pos_embed"]),
    ("open_clip", {}, ["visual.trunk", "--from=clippy"]),
  ],
)
def test_other_weights_are_one_line(tokenizer, tmp_path, source, changes, words, whole):
  file = save(published(), tmp_path / "x.pt", **changes)
  options = {"tokenizer": tokenizer} if whole and source == "clippy" else {}
  call = lambda: convert.convert(source, file, out=str(tmp_path / "run"), **options)  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", *words)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"text__2__linear__weight": None}, ["lacks text.2.linear.weight"]),
    ({"text__2__linear__weight": torch.ones(64, 128)}, ["has 64 outputs", "width of 128"]),
    ({"logit_scale": None}, ["lacks logit_scale"]),
    ({"text__2__linear__bias": torch.ones(128)}, ["unknown text.2.linear.bias"]),
    ({"text__0__model__shared__weight": torch.ones(96, 128)}, ["unknown text.0.model.shared"]),
    ({f"{TOWER}encoder__embed_tokens__weight": torch.ones(96, 128)}, ["differ", "one token"]),
    ({RELATIVE: torch.ones(64, 2)}, ["has 64 rows", "32 buckets"]),
    ({f"{TOWER}encoder__final_layer_norm__weight": torch.ones(5)}, ["is (5,) and should be"]),
  ],
)
def test_other_text_towers_are_one_line(tokenizer, tmp_path, changes, words):
  file = save(published(), tmp_path / "x.pt", **changes)
  call = lambda: convert.convert(  # noqa: E731
    "clippy", file, out=str(tmp_path / "run"), tokenizer=tokenizer
  )
  stock.fails_in_one_line(call, tmp_path / "run", *words)


def test_images_alone_with_a_tokenizer_and_tokenizers_that_do_not_fit(tokenizer, tmp_path):
  model = published()
  gone = {k: None for k in model.state_dict() if not k.startswith("visual.")}
  whole, images = save(model, tmp_path / "x.pt"), save(model, tmp_path / "y.pt", **gone)
  tables = {f"{TOWER}{k}__weight": torch.ones(30, 128) for k in ("shared", "encoder__embed_tokens")}
  few = save(model, tmp_path / "few.pt", **tables)
  tables = {k: torch.ones(400, 128) for k in tables}
  many = save(model, tmp_path / "many.pt", **tables)
  (tmp_path / "empty").mkdir()
  for file, folder, words in (
    (images, tokenizer, ["with a Sentence-T5", "lacks text.0.auto_model.shared.weight"]),
    (whole, str(tmp_path / "empty"), ["--tokenizer=", "has no tokenizer.json or spiece.model"]),
    (whole, str(tmp_path / "none"), ["--tokenizer=", "has no tokenizer.json or spiece.model"]),
    (few, tokenizer, ["--tokenizer=", "few.pt 30"]),
    (many, tokenizer, ["--tokenizer=", "many.pt 400"]),
  ):
    call = lambda file=file, folder=folder: convert.convert(  # noqa: E731
      "clippy", file, out=str(tmp_path / "run"), tokenizer=folder
    )
    stock.fails_in_one_line(call, tmp_path / "run", *words)


@pytest.fixture
def imported(tokenizer, tmp_path):
  file = save(published(), tmp_path / "in.pt")
  convert.convert("clippy", file, out=str(tmp_path / "imported"), tokenizer=tokenizer)
  return configs.read(tmp_path / "imported" / "config.json")


OTHERS = {
  "method": "grain",
  "model.pool": "mean",
  "model.pool_includes_class": False,
  "model.projects_images": True,
  "model.logit_bias": True,
  "model.image.qk_norm": True,
  "model.image.pre_norm": True,
  "model.image.patch_bias": False,
  "model.image.stem": "hmlp",
  "model.image.activation": "quick_gelu",
  "model.image.norm_eps": 1e-5,
  "model.image.heads": 4,
  "model.image.mean": (0.5, 0.5, 0.5),
  "model.image.std": (0.5, 0.5, 0.5),
  "model.image.interpolation": "bilinear",
  "data.eval_resize": "squash",
  "model.text.activation": "gelu",
  "model.text.norm_eps": 1e-5,
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_clippy_cannot_be_is_said(imported, tmp_path, rng, key):
  configs.set_key(imported, key, OTHERS[key])
  stock.random_run(tmp_path / "run", imported, rng)
  call = lambda: export.export(str(tmp_path / "run"), format="clippy", out=str(tmp_path / "x"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", "--format=clippy", f"config.{key}")


def test_a_grain_model_is_no_clippy_and_clippy_no_clipmodel(imported, tiny, tmp_path, rng):
  tiny.method = "grain"
  stock.random_run(tmp_path / "grain", tiny, rng)
  keys = ("method", "model.pool", "model.projects_images", "model.text.kind", "model.image.qk_norm")
  call = lambda: export.export(str(tmp_path / "grain"), format="clippy", out=str(tmp_path / "x"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", *[f"config.{k}" for k in keys], "tokenizer = ''")
  keys = ("pool = 'max'", "projects_images", "text.tokenizer", "text.kind", "image.pre_norm")
  for format in ("hf_clip", "grain_torch"):
    call = lambda format=format: export.export(  # noqa: E731
      str(tmp_path / "imported"), format=format, out=str(tmp_path / "x")
    )
    words = [f"config.model.{k}" for k in keys if "pre_norm" not in k or format == "hf_clip"]
    stock.fails_in_one_line(call, tmp_path / "x", f"--format={format}", *words)
