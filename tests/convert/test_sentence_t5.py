"""Sentence-T5's folder against transformers, from the text to the embedding; a text tower alone."""

import json
import pathlib
import shutil

import drawn
import jax
import numpy as np
import pieces
import pytest
import safetensors.numpy
import safetensors.torch
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal

import grain_jax
from grain_jax import export, tokenizing, trees
from grain_jax.convert import convert, start, towers, weights
from grain_jax.models import grain

TYPE = "sentence_transformers.models."
MODULES = {
  "Transformer": "",
  "Pooling": "1_Pooling",
  "Dense": "2_Dense",
  "Normalize": "3_Normalize",
}
TEXTS = ["a photo of a dog", "A red Cat on the mat, the end", "Garden", "the cat " * 30]
CONTEXT = 24


@pytest.fixture(scope="module")
def folder_and_model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("st5") / "sentence-t5"
  return folder, pieces.save_sentence_t5(folder, context=CONTEXT)


@pytest.fixture(scope="module")
def model(folder_and_model):
  """(T5EncoderModel, Linear)."""
  return folder_and_model[1]


@pytest.fixture(scope="module")
def folder(folder_and_model):
  """Not to be written to."""
  return folder_and_model[0]


@pytest.fixture
def copy(folder, tmp_path):
  return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "tower"
  convert.convert("sentence_t5", str(folder), out=str(out))
  return out


@torch.no_grad()
def encode(model, folder, texts):
  """What `SentenceTransformer.encode` does: tokens, encoder, mean over the mask, Dense, L2."""
  encoder, dense = model
  tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(
    texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
  )
  mask = tokens["attention_mask"][..., None].float()
  hidden = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
  return torch.nn.functional.normalize(dense((hidden * mask).sum(1) / mask.sum(1)), dim=-1).numpy()


def our_encode(path, texts):
  """By the packed rows of the folder's own tokenizer, several texts a row."""
  _, config, params = towers.load(path)
  rows = tokenizing.make(config).pack_texts(texts, row_length=64, texts_per_row=8)
  arrays = (rows.tokens, rows.segments, rows.positions, rows.ends)
  params = {**params, "logit_scale": np.zeros(())}
  out = grain.build(config).apply({"params": params}, *arrays, method="encode_text")
  return np.asarray(out)[rows.row, rows.slot]


def test_texts_embed_as_in_sentence_transformers(imported, model, folder):
  assert_allclose(our_encode(imported, TEXTS), encode(model, folder, TEXTS), atol=1e-5)
  config = towers.load(imported)[1]
  assert (config.model.text.context, config.model.embed_dim) == (CONTEXT, 20)


def test_the_folder_of_the_tower_embeds_texts(imported, model, folder, copy, tmp_path, caplog):
  """As `load` gives it; without its tokenizer, which is said, by token ids."""
  want = encode(model, folder, TEXTS)
  assert_allclose(grain_jax.load(imported).encode_text(TEXTS), want, atol=1e-5)
  (copy / "tokenizer.json").unlink()
  convert.convert("sentence_t5", str(copy), out=str(tmp_path / "ids"))
  assert "takes texts as token ids alone" in caplog.text
  rows = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(
    TEXTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="np"
  )
  ours = grain_jax.load(tmp_path / "ids")
  found = ours.encode_token_ids(rows["input_ids"], rows["attention_mask"])
  assert_allclose(found, want, atol=1e-5)
  with pytest.raises(ValueError, match="the tokenizer of this text tower was not beside"):
    ours.tokenize(TEXTS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_read_as_float32(copy, model, tmp_path, dtype):
  half = [model[0].state_dict(), {"linear.weight": model[1].weight.data}]
  half = [{k: v.to(getattr(torch, dtype)) for k, v in state.items()} for state in half]
  copies = {k: v.clone() for k, v in half[0].items()}  # the tied one written twice
  safetensors.torch.save_file(copies, copy / "model.safetensors")
  torch.save(half[1], copy / "2_Dense/pytorch_model.bin")
  (copy / "2_Dense/model.safetensors").unlink()
  convert.convert("sentence_t5", str(copy), out=str(tmp_path / "half"))
  _, _, params = towers.load(tmp_path / "half")
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
  want = half[0]["encoder.block.2.layer.1.DenseReluDense.wi.weight"].float().numpy().T
  assert_array_equal(params["text_tower"]["blocks"]["mlp"]["fc1"]["kernel"][2], want)
  assert_array_equal(params["text_projection"]["kernel"], half[1]["linear.weight"].float().T)


def test_out_and_in_again_is_equal_bit_for_bit(imported, tmp_path):
  out, again = tmp_path / "out", tmp_path / "again"
  export.export(str(imported), format="safetensors", out=str(out))
  convert.convert("safetensors", str(out), out=str(again))
  (_, first, a), (_, second, b) = towers.load(imported), towers.load(again)
  stock.assert_equal_trees(b, a)
  assert first.model.text.kind == second.model.text.kind == "t5"
  assert tokenizing.make(first).hash == tokenizing.make(second).hash
  names = {name for name, _ in trees.named_leaves(a)}
  assert names == set(safetensors.numpy.load_file(out / "text_tower.safetensors"))


def test_a_run_starts_from_it_and_takes_its_shape_and_tokenizer(tiny, imported, tmp_path):
  tiny.init.update(text=str(imported), adopt=True)
  said = []
  config = start.adopt(tiny, tmp_path / "run", say=said.append)
  assert config.model.text.kind == "t5" and config.model.embed_dim == 20
  assert config.model.image.to_dict() == tiny.model.image.to_dict()
  assert pathlib.Path(config.model.text.tokenizer) == imported / "tokenizer"
  fresh = jax.device_put(drawn.params(config))
  got = dict(trees.named_leaves(start.start_from(config, fresh, say=said.append)))
  before = dict(trees.named_leaves(fresh))
  theirs = dict(trees.named_leaves(towers.load(imported)[2]))
  for name, value in got.items():
    assert_array_equal(value, theirs.get(name, before[name]), err_msg=name)
  assert len(said) == 2 and "text.kind t5 (was clip)" in said[0]


def test_another_tokenizer_than_the_towers_is_named(tiny, imported, tmp_path):
  tiny.init.update(text=str(imported), adopt=True)
  config = start.adopt(tiny, tmp_path / "run", say=lambda line: None)
  shutil.copytree(imported / "tokenizer", tmp_path / "same")
  config.model.text.tokenizer = str(tmp_path / "same")
  params = jax.device_put(drawn.params(config))
  start.start_from(config, params, say=lambda line: None)
  pieces.save(tmp_path / "other", size=60)
  config.model.text.tokenizer = str(tmp_path / "other")
  with pytest.raises(ValueError, match="config.model.text.tokenizer is .* there and .* here"):
    start.start_from(config, params)


def test_where_a_whole_model_is_wanted_a_line_says_what_it_is(imported, tiny, tmp_path):
  want = "holds the text tower of a model alone: train with --config.init.text="
  with pytest.raises(ValueError, match="encode_image: .* holds the text tower of a model alone"):
    grain_jax.load(imported).encode_image(np.zeros((8, 8, 3), np.uint8))
  for call in (
    lambda: weights.load_run(imported),
    lambda: export.export(str(imported), format="hf_clip", out=str(tmp_path / "x")),
  ):
    with pytest.raises(ValueError, match=want):
      call()
  tiny.init.update(image=str(imported), adopt=True)
  with pytest.raises(ValueError, match=r"the text tower alone: name it as config.init.text"):
    start.adopt(tiny, tmp_path / "run", say=lambda line: None)
  with pytest.raises(ValueError, match=r"the text tower alone: name it as config.init.text"):
    start.start_from(tiny, drawn.params(tiny))


def edit(name, **changes):
  def change(folder):
    values = json.loads((folder / name).read_text())
    pieces.write_json(folder / name, {**values, **changes})

  return change


def without_module(folder):
  listed = json.loads((folder / "modules.json").read_text())
  pieces.write_json(folder / "modules.json", listed[:2])


def with_module_elsewhere(folder):
  listed = json.loads((folder / "modules.json").read_text())
  listed[2]["path"] = "../2_Dense"
  pieces.write_json(folder / "modules.json", listed)


def with_two_embeddings(folder):
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
  safetensors.numpy.save_file(state, folder / "model.safetensors")


def with_fewer_rows(folder):
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  state = {k: v[:20] if k == "shared.weight" else v for k, v in state.items()}
  safetensors.numpy.save_file(state, folder / "model.safetensors")
  edit("config.json", vocab_size=20)(folder)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (edit("config.json", feed_forward_proj="gated-gelu"), "feed_forward_proj is 'gated-gelu'"),
    (edit("config.json", relative_attention_num_buckets=64), "num_buckets is 64"),
    (edit("config.json", d_kv=16), "num_heads x d_kv is 64"),
    (edit("config.json", model_type="bert"), "type 'bert'. Only 't5'"),
    (edit("1_Pooling/config.json", pooling_mode_max_tokens=True), "mean_tokens and max_tokens"),
    (edit("1_Pooling/config.json", pooling_mode_mean_tokens=False), "pooling is none"),
    (edit("2_Dense/config.json", bias=True), "bias is True"),
    (
      edit("2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh"),
      "activation Tanh",
    ),
    (edit("sentence_bert_config.json", do_lower_case=True), "do_lower_case"),
    (without_module, "lists Transformer, Pooling. Only"),
    (with_module_elsewhere, "is not within the folder"),
    (with_two_embeddings, "differ, and T5 has one token embedding"),
    (with_fewer_rows, "vocab_size = 20 is fewer than"),
    (lambda folder: (folder / "modules.json").unlink(), "modules.json does not exist"),
    (lambda folder: shutil.rmtree(folder / "2_Dense"), "2_Dense"),
  ],
)
def test_what_this_tower_cannot_be_is_refused_in_a_line(copy, tmp_path, change, said):
  change(copy)
  with pytest.raises(ValueError) as error:
    convert.convert("sentence_t5", str(copy), out=str(tmp_path / "out"))
  assert said in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("noted", "want"), [(CONTEXT, CONTEXT), (10**30, 256), (None, 256), (1, None), ("x", None)]
)
def test_the_longest_text_may_stand_with_the_tokenizer(copy, tmp_path, noted, want):
  """sentence-transformers 6 saves it there alone; 10^30 is how transformers says none."""
  pieces.write_json(copy / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
  edit("tokenizer_config.json", model_max_length=noted)(copy)
  if want is None:
    with pytest.raises(ValueError, match="tokenizer_config.json: longest text of"):
      convert.convert("sentence_t5", str(copy), out=str(tmp_path / "out"))
  else:
    config = convert.convert("sentence_t5", str(copy), out=str(tmp_path / "out"))
    assert config.model.text.context == want


@pytest.mark.parametrize(("option", "value"), [("recipe", "cc12m"), ("image_size", 32)])
def test_options_of_whole_models_are_refused(folder, tmp_path, option, value):
  with pytest.raises(ValueError, match="gives the text tower alone"):
    convert.convert("sentence_t5", str(folder), out=str(tmp_path / "out"), **{option: value})
