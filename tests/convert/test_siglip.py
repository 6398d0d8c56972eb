"""SigLIP against transformers, from texts and images to logits; big_vision's .npz of the same."""

import errno
import json
import pathlib
import shutil

import drawn
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import siglip_models as siglip
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn import functional

import grain_jax
from grain_jax import config as configs
from grain_jax import export, tokenizing, trees
from grain_jax.convert import big_vision, convert, start
from grain_jax.models import grain
from grain_jax.training import optim

TEXTS = ["a photo of a dog", "A red Cat, on the mat!", "Garden", "the cat " * 30, ""]


@pytest.fixture(scope="module")
def folder_and_model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("siglip") / "siglip"
  return folder, siglip.save(folder)


@pytest.fixture(scope="module")
def folder(folder_and_model):
  """Not to be written to."""
  return folder_and_model[0]


@pytest.fixture(scope="module")
def model(folder_and_model):
  return folder_and_model[1]


@pytest.fixture
def copy(folder, tmp_path):
  return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """The imported model; not to be written to."""
  out = tmp_path_factory.mktemp("run") / "run"
  convert.convert("siglip", str(folder), out=str(out))
  return out


def ids_of(folder, texts):
  """As SiglipProcessor makes them: canonical form, cut, end, pads of the same id."""
  backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
  rows = np.ones((len(texts), siglip.CONTEXT), np.int64)
  for row, text in zip(rows, texts, strict=True):
    text = text.lower().replace(",", "").replace("!", "").strip()
    ids = backend(text, add_special_tokens=False)["input_ids"][: siglip.CONTEXT - 1]
    row[: len(ids)] = ids
  return torch.tensor(rows)


@torch.no_grad()
def test_embeddings_and_logits_are_those_of_transformers(folder, run, model, rng):
  loaded = grain_jax.load(run)
  image = stock.images(rng, 24)
  pixels = stock.pixels(loaded.config, image)
  want = model(input_ids=ids_of(folder, TEXTS), pixel_values=pixels)
  images, texts = loaded.encode_image(list(image)), loaded.encode_text(TEXTS)
  stock.assert_close(images, want.image_embeds.numpy())
  stock.assert_close(texts, want.text_embeds.numpy())
  logits = np.exp(loaded.params["logit_scale"]) * images @ texts.T + loaded.params["logit_bias"]
  assert_allclose(logits, want.logits_per_image.numpy(), rtol=1e-5, atol=1e-4)
  assert np.ptp(logits) > 10  # weights show


@torch.no_grad()
def test_tokens_of_the_image_and_what_the_head_makes_of_each_alone(run, model, rng):
  config, params, _ = stock.run_of(run)
  image = stock.images(rng, 24)
  hidden = model.vision_model(stock.pixels(config, image)).last_hidden_state
  got = stock.ours(config, params, "encode_tokens", image)
  stock.assert_close(got, hidden.numpy())
  alone = model.vision_model.head(hidden.reshape(-1, 1, siglip.WIDTH))
  got = stock.ours(config, params, "encode_patches", image)
  stock.assert_close(got, stock.unit(alone).reshape(3, 3, 3, siglip.WIDTH))


def test_texts_given_as_ids_get_the_tokenizers_pads(folder, run):
  loaded = grain_jax.load(run)
  ids = loaded.tokenize(TEXTS)
  assert_array_equal(ids, ids_of(folder, TEXTS))
  short = np.array([[5, 6, 7, 1]]), np.ones((1, 4), bool)
  long = np.pad(short[0], [(0, 0), (0, 8)], constant_values=1), np.ones((1, 12), bool)
  assert_array_equal(loaded.encode_token_ids(*short), loaded.encode_token_ids(*long))
  assert_array_equal(loaded.encode_token_ids(ids, np.ones_like(ids, bool)).shape, (5, 48))


def test_what_the_files_say_and_what_holds_of_all(run):
  config, params, step = stock.run_of(run)
  m = config.model
  assert (config.method, m.pool, m.projects_images, m.image.class_token) == (
    "clip", "map", False, False
  )  # fmt: skip
  assert (m.image.mean, m.image.std) == ((0.5,) * 3, (0.5,) * 3) and step == 0
  assert config.data.eval_resize == "squash" and config.loss.contrast == "sigmoid"
  assert "image_projection" not in params and params["text_projection"]["bias"].shape == (48,)


def test_what_config_json_omits_is_as_transformers_has_it(copy, run, tmp_path):
  """The hub's files say what differs alone; without a processor's file images are the same."""
  values = json.loads((copy / "config.json").read_text())
  for part in ("text_config", "vision_config"):
    for key in ("hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "num_channels"):
      values[part].pop(key, None)
  (copy / "config.json").write_text(json.dumps(values))
  (copy / "preprocessor_config.json").unlink()
  convert.convert("siglip", str(copy / "model.safetensors"), out=str(tmp_path / "out"))
  (config, params, _), (want, theirs, _) = stock.run_of(tmp_path / "out"), stock.run_of(run)
  config.model.text.tokenizer = want.model.text.tokenizer
  assert configs.to_json(config) == configs.to_json(want)
  stock.assert_equal_trees(params, theirs)


def test_an_update_does_not_clamp_the_published_scale(run):
  config, params, _ = stock.run_of(run)
  assert params["logit_scale"] == np.float32(np.log(117.0)) and params["logit_scale"] > 4.7
  frozen = [False] * len(jax.tree.leaves(params))
  largest = config.model.logit_scale_max
  after = optim.apply_updates(params, jax.tree.map(np.zeros_like, params), frozen, largest)
  assert after["logit_scale"] == params["logit_scale"]


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_npz_of_big_vision_gives_the_same_parameters(
  folder, run, model, tmp_path, scanned, dtype
):
  state = siglip.big_vision(model, scanned=scanned)
  want = stock.run_of(run)[1]
  if dtype == "bfloat16":  # NumPy writes them as two opaque bytes
    state = {key: value.astype(ml_dtypes.bfloat16).view("V2") for key, value in state.items()}
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), want)
  np.savez(tmp_path / "siglip.npz", **state)
  out = tmp_path / "out"
  convert.convert("siglip", str(tmp_path / "siglip.npz"), out=str(out), tokenizer=str(folder))
  config, got, _ = stock.run_of(out)
  stock.assert_equal_trees(got, want)
  theirs = stock.run_of(run)[0]
  if dtype == "float32":
    ours = configs.to_json(config).replace(str(out), "")
    assert ours == configs.to_json(theirs).replace(str(run), "")


def test_positions_are_resized_as_torch_does(folder, model, tmp_path):
  convert.convert("siglip", str(folder), out=str(tmp_path / "out"), image_size=40)
  got = stock.run_of(tmp_path / "out")[1]["image_tower"]["position_embedding"]
  grid = model.vision_model.embeddings.position_embedding.weight.detach().T.reshape(1, -1, 3, 3)
  want = functional.interpolate(grid, (5, 5), mode="bicubic", antialias=True)
  assert_allclose(got, want[0].reshape(48, 25).T, atol=1e-5)


def test_out_and_in_again_is_equal_bit_for_bit(run, tmp_path):
  out, again = tmp_path / "out", tmp_path / "again"
  export.export(str(run), format="safetensors", out=str(out))
  convert.convert("safetensors", str(out), out=str(again))
  (first, a, _), (second, b, _) = stock.run_of(run), stock.run_of(again)
  stock.assert_equal_trees(b, a)
  assert tokenizing.make(first).hash == tokenizing.make(second).hash
  assert first.model.logit_scale_max == second.model.logit_scale_max > 4.76


@pytest.mark.parametrize("format", ["hf_clip", "grain_torch"])
def test_formats_that_cannot_hold_it_say_why(run, tmp_path, format):
  with pytest.raises(ValueError) as error:
    export.export(str(run), format=format, out=str(tmp_path / "out"))
  for part in (
    "config.model.image.class_token = False", "config.model.pool = 'map'", "kind = 'siglip'",
    "config.model.image.activation = 'gelu_tanh'", "config.model.text.activation = 'gelu_tanh'",
  ):  # fmt: skip
    assert part in str(error.value)
  assert "\n" not in str(error.value)


def test_a_run_starts_from_the_model_or_from_its_towers(tiny, run, tmp_path):
  theirs = dict(trees.named_leaves(stock.run_of(run)[1]))
  starts = {"model": {"model": str(run)}, "towers": {"image": str(run), "text": str(run)}}
  for name, folders in starts.items():
    config = configs.resolve(tiny)
    config.init.update(**folders, adopt=True)
    config.method, config.data.max_regions = ("clip", 0) if name == "model" else ("grain", 5)
    config.model.num_queries = 5
    config = configs.resolve(start.adopt(config, tmp_path / "run", say=lambda line: None))
    config.model.image.size = 24
    configs.check(config)
    assert not config.model.image.class_token and config.model.text.kind == "siglip"
    assert config.data.row_length == (64 if name == "model" else (1 + 5) * siglip.CONTEXT)
    fresh = jax.device_put(drawn.params(config))
    got = dict(trees.named_leaves(start.start_from(config, fresh, say=lambda line: None)))
    before = dict(trees.named_leaves(fresh))
    taken = [n for n in got if name == "model" or n.startswith(("image_tower/", "text_"))]
    for leaf, value in got.items():
      want = theirs[leaf] if leaf in taken else before[leaf]
      assert_array_equal(value, want, err_msg=leaf)
      assert len(taken) == (len(got) if name == "model" else 21 + 20 + 2)  # towers, projection


def test_a_start_that_would_clamp_the_scale_is_refused_unless_adopted(run, tmp_path):
  config, _, _ = stock.run_of(run)
  config.init.model = str(run)
  config.model.logit_scale_max = 4.6052
  with pytest.raises(ValueError, match="logit_scale is 4.7622, above .* would clamp it"):
    start.start_from(config, jax.device_put(drawn.params(config)), say=lambda line: None)
  config.init.adopt, said = True, []
  adopted = start.adopt(config, tmp_path / "run", say=said.append)
  assert adopted.model.logit_scale_max > 4.7623 and "logit_scale_max" in said[0]
  start.start_from(adopted, jax.device_put(drawn.params(adopted)), say=lambda line: None)


def edit(name, part=None, **changes):
  def change(folder):
    values = json.loads((folder / name).read_text())
    (values if part is None else values[part]).update(changes)
    (folder / name).write_text(json.dumps(values))

  return change


def edit_weights(function):
  def change(folder):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(function(safetensors.numpy.load_file(path)), path)

  return change


def of_26_pixels(folder):
  edit("config.json", "vision_config", image_size=26)(folder)
  edit("preprocessor_config.json", size={"height": 26, "width": 26})(folder)


def other_vocabulary(folder):
  siglip.make(vocabulary=20).save_pretrained(folder)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (edit("config.json", model_type="siglip2"), "NaFlex"),
    (edit("config.json", model_type="clip"), "type 'clip'. Only 'siglip'"),
    (edit("config.json", "vision_config", hidden_act="relu"), "hidden_act (image) is 'relu'"),
    (edit("config.json", "vision_config", num_channels=1), "num_channels is 1"),
    (edit("config.json", "vision_config", vision_use_head=False), "vision_use_head is False"),
    (of_26_pixels, "does not divide into patches of 8"),
    (edit("config.json", "vision_config", num_attention_heads=5), "width = 48 does not divide"),
    (edit("config.json", "text_config", num_attention_heads=5), "width = 32 does not divide"),
    (edit("config.json", "text_config", projection_size=32), "projection_size is 32"),
    (edit("preprocessor_config.json", do_center_crop=True, crop_size=16), "crop_size"),
    (edit("preprocessor_config.json", image_processor_type="CLIPImageProcessor"), "Only Siglip"),
    (edit("tokenizer_config.json", tokenizer_class="T5Tokenizer"), "names neither SiglipTokenizer"),
    (edit("tokenizer_config.json", padding_side="left"), "padding_side = 'left'"),
    (edit("tokenizer_config.json", do_lower_case=False), "do_lower_case"),
    (edit("tokenizer_config.json", pad_token="<none>"), "has no token <none>, which pads"),
    (other_vocabulary, "a tokenizer of 33 tokens"),
    (edit_weights(lambda s: {**s, "extra": s["logit_bias"]}), "has the unknown extra"),
    (
      edit_weights(lambda s: {k: v for k, v in s.items() if "probe" not in k}),
      "lacks vision_model.head.probe",
    ),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has none of model.safetensors"),
  ],
)
def test_what_a_folder_cannot_be_is_a_line(copy, tmp_path, change, said):
  change(copy)
  out = tmp_path / "out"
  stock.fails_in_one_line(lambda: convert.convert("siglip", str(copy), out=str(out)), out, said)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda s: {k: v for k, v in s.items() if k != "params/b"}, "lacks b."),
    (lambda s: {**s, "params/img/other": s["params/b"]}, "unknown img/other"),
    (lambda s: {k: v for k, v in s.items() if "Embed_0" not in k}, "it lacks txt/Embed_0"),
    (
      lambda s: {**s, "params/img/embedding/kernel": np.zeros((192, 48), np.float32)},
      "is not SigLIP of fixed resolution",
    ),
    (lambda s: {**s, "params/b": np.array([{}], object)}, "not an .npz of arrays"),
    (lambda s: {"a": np.zeros(3)}, "it lacks img/embedding/kernel"),
  ],
)
def test_what_an_npz_cannot_be_is_a_line(folder, model, tmp_path, change, said):
  path, out = tmp_path / "x.npz", tmp_path / "out"
  np.savez(path, **change(siglip.big_vision(model, scanned=True)))
  options = {"out": str(out), "tokenizer": str(folder)}
  stock.fails_in_one_line(lambda: convert.convert("siglip", str(path), **options), out, said)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed, np.save])
def test_a_damaged_npz_is_a_line(tmp_path, write):
  path, values = tmp_path / "x.npz", np.linspace(0, 1, 1000)
  with path.open("wb") as file:
    write(file, values)
  whole = path.read_bytes()
  at, flags = len(whole) // 2, whole.find(b"PK\1\2") + 8
  for data in (
    whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :],
    whole[:at] + bytes(90) + whole[at + 90 :],
    whole[:flags] + b"\1" + whole[flags + 1 :],  # it is said to be encrypted
    whole[:at],
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz is truncated or not an \.npz") as error:
      big_vision.read(path)
    assert "\n" not in str(error.value)


def test_files_of_neither_kind_and_lacking_tokenizers_are_a_line(folder, tmp_path):
  out, npz, other = tmp_path / "out", tmp_path / "x.npz", tmp_path / "x.txt"
  npz.write_bytes(b"PK\x03\x04 nothing")
  other.write_text("nothing")
  for path, tokenizer, said in (
    (npz, None, "truncated or not an .npz"),
    (npz, str(folder), "truncated or not an .npz"),
    (other, None, "is neither a folder of a SiglipModel"),
    (folder, str(tmp_path), "there is no tokenizer.json or spiece.model"),
  ):
    options = {"out": str(out)} | ({} if tokenizer is None else {"tokenizer": tokenizer})
    call = lambda: convert.convert("siglip", str(path), **options)  # noqa: B023, E731
    stock.fails_in_one_line(call, out, said)


def test_bfloat16_differs_by_its_rounding_alone(run, rng):
  config, params, _ = stock.run_of(run)
  image = stock.images(rng, 24)
  want = stock.ours(config, params, "encode_image", image)
  config.model.dtype = "bfloat16"
  got = grain.build(config).apply({"params": params}, image, method="encode_image")
  assert np.abs(np.asarray(got) - want).max() < 0.05 * np.abs(want).max()


def test_an_npz_of_another_vocabulary_is_refused(folder, tmp_path):
  """The tokenizer is SigLIP's too, of 33 tokens."""
  np.savez(tmp_path / "x.npz", **siglip.big_vision(siglip.make(vocabulary=400), scanned=False))
  call = lambda: convert.convert(  # noqa: E731
    "siglip", str(tmp_path / "x.npz"), out=str(tmp_path / "out"), tokenizer=str(folder)
  )
  stock.fails_in_one_line(call, tmp_path / "out", "of 33 tokens", "400")


@pytest.mark.parametrize(("size", "said"), [(384, "One of 384 has as many"), (224, "")])
def test_a_size_that_its_patches_do_not_fill_is_told(size, said, tmp_path, caplog):
  """So400m/14: an .npz does not say that 27 patches of 14 are of 384 pixels."""
  model = siglip.make(image_size=size, patch_size=14)
  np.savez(tmp_path / "x.npz", **siglip.big_vision(model, scanned=False))
  facts = big_vision.read(tmp_path / "x.npz").facts
  assert facts["model.image.size"] == size // 14 * 14
  assert said in caplog.text and bool(said) == bool(caplog.text)


def test_without_its_tokenizer_it_takes_token_ids(copy, folder, run, tmp_path, caplog):
  """The pads given are those that are seen, whichever id they have."""
  (copy / "tokenizer.json").unlink()
  convert.convert("siglip", str(copy), out=str(tmp_path / "ids"))
  assert "takes texts as token ids alone" in caplog.text
  texts = ["a photo of a dog", "A red Cat"]
  ids = ids_of(folder, texts)
  found = grain_jax.load(tmp_path / "ids").encode_token_ids(ids, np.ones_like(ids, bool))
  assert_allclose(found, grain_jax.load(run).encode_text(texts), atol=1e-6)


def test_lost_storage_is_no_damaged_npz(tmp_path, monkeypatch):
  def lost(*_, **__):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(np, "load", lost)
  with pytest.raises(OSError, match="Input/output error"):
    big_vision.read(tmp_path / "x.npz")
