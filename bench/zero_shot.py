"""`python -m bench.zero_shot [--json]`: our packed text encoder beside transformers' CLIPTextModel.

Prompts of a zero-shot classifier, ImageNet's class names in its 80 templates, become embeddings in
float32 on the CPU, by a text tower of CLIP ViT-B/16 (width 512, 12 layers, 8 heads, context 77)
with random weights that all sides read from one file in the format of transformers; every run
compares the embeddings. Ours packs several prompts into one row (`grain_jax.encoders.make`, what
evaluations use); the peer pads each to 77 tokens, as CLIP is used, or, 'trimmed', to the longest
of its batch.

A round takes prompts that no round had before, the same for all sides, so that no cache of token
ids helps. The sides are processes of their own on all cores that work in turn. What counts is the
time from texts to embeddings in NumPy, tokenizer and packing included; each side's median. On
a busy machine the ratios mean nothing: PyTorch's threads wait for one another and lose far more.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from grain_jax import cli
from grain_jax import config as configs
from grain_jax.evals import zero_shot
from grain_jax.models import initial

ROOT = pathlib.Path(__file__).parent.parent
VOCABULARY = ROOT / "grain_jax" / "evals" / "sets" / "vocabularies" / "imagenet.json"
SIDES = ("ours", "padded", "trimmed")
_RATIOS = {"ratio": "padded", "ratio_trimmed": "trimmed"}
_BUSY = 0.5  # load a core from which the timing is not to be trusted
# The image tower is not used: as small as it can be. The rest is what transformers can express.
CONFIG = (
  "configs/clip_cc12m.py:model.image.size=32,model.image.width=32,model.image.depth=1,"
  "model.image.heads=1,model.image.qk_norm=False,model.image.pre_norm=True,model.dtype=float32"
)


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def all_prompts(vocabulary: pathlib.Path) -> list[str]:
  """Every class name in every template of a file {"names": {label: name}, "templates": [...]}."""
  if not vocabulary.is_file():
    raise ValueError(f"--vocabulary={vocabulary}: there is no such file. Correct the path.")
  content = json.loads(vocabulary.read_text(encoding="utf-8"))
  names = list(content["names"].values())
  return [p for of_class in zero_shot.class_prompts(names, content["templates"]) for p in of_class]


def sample(prompts: Sequence[str], *, rounds: int, count: int, seed: int) -> list[list[str]]:
  """`count` prompts for each of `rounds` rounds, none of them twice."""
  distinct = list(dict.fromkeys(prompts))
  if rounds * count > len(distinct):
    raise ValueError(
      f"{rounds} rounds (one to warm up) of --prompts={count} are more than the {len(distinct)} "
      "distinct prompts of the vocabulary. Lower --prompts or --repeats."
    )
  chosen = np.random.default_rng(seed).permutation(len(distinct))[: rounds * count]
  return [[distinct[i] for i in part] for part in chosen.reshape(rounds, count)]


def setting(recipe: str, *, batch: int, row_length: int) -> ml_collections.ConfigDict:
  """The configuration of the encoder, of `batch` rows a call."""
  config = configs.load(recipe)
  config.batch_size = config.eval_batch_size = batch
  config.data.row_length = row_length
  config = configs.resolve(config)
  configs.check(config)
  return config


def share_weights(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Random weights in the format of transformers, in `folder`, which is made.

  Twice as large as CLIP's own beginning: there the embeddings of any two texts are nearly the same,
  and equal ones would show little.
  """
  import jax

  from grain_jax import trees
  from grain_jax.convert import hf_clip
  from grain_jax.models import grain

  model = grain.build(config)
  params = jax.jit(lambda: initial.init_params(model, config))()
  params = trees.map_with_name(
    lambda name, x: np.asarray(2 * x if name.endswith("kernel") else x), params
  )
  hf_clip.save(folder, config=config, params=params, step=0)


# texts -> (embeddings [n, E], tokens computed, padding included)
Encode = Callable[[Sequence[str]], tuple[np.ndarray, int]]


def ours(folder: pathlib.Path, config: ml_collections.ConfigDict) -> Encode:
  """Our encoder with the weights of `folder`."""
  import jax

  from grain_jax import encoders as encoders_lib
  from grain_jax import tokenizer as tokenizers
  from grain_jax.convert import convert
  from grain_jax.models import grain
  from grain_jax.runtime import mesh as meshes

  theirs, params = convert.read("hf_clip", folder)
  for key in ("width", "depth", "heads", "context", "activation", "norm_eps"):
    assert theirs.model.text[key] == config.model.text[key], key
  mesh = meshes.create(config, jax.devices()[:1])
  batches = 0

  def on_batch() -> None:
    nonlocal batches
    batches += 1

  tokenizer = tokenizers.Tokenizer(context=theirs.model.text.context)
  theirs.data.row_length, theirs.eval_batch_size = config.data.row_length, config.eval_batch_size
  encoders = encoders_lib.make(
    theirs,
    grain.build(theirs),
    jax.device_put(params, meshes.replicated(mesh)),
    mesh=mesh,
    tokenizer=tokenizer,
    on_batch=on_batch,
  )

  def encode(texts: Sequence[str]) -> tuple[np.ndarray, int]:
    before = batches
    with jax.set_mesh(mesh):
      embeddings = encoders.text(texts)
    rows = (batches - before) * config.eval_batch_size
    return embeddings, rows * config.data.row_length

  return encode


def peer(folder: pathlib.Path, *, batch: int, form: str) -> Encode:
  """CLIPTextModel of transformers with its projection, and the tokenizer of `folder`."""
  import torch
  import transformers

  torch.set_num_threads(cores())
  transformers.logging.set_verbosity_error()  # of the image tower, which is not read
  transformers.logging.disable_progress_bar()
  model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  padding = {"padded": "max_length", "trimmed": "longest"}[form]

  def encode(texts: Sequence[str]) -> tuple[np.ndarray, int]:
    parts, tokens = [], 0
    for start in range(0, len(texts), batch):
      chunk = list(texts[start : start + batch])
      inputs = tokenizer(
        chunk, padding=padding, truncation=True, max_length=tokenizer.model_max_length,
        return_tensors="pt",
      )  # fmt: skip
      with torch.inference_mode():
        embeddings = torch.nn.functional.normalize(model(**inputs).text_embeds, dim=-1)
      parts.append(embeddings.numpy())
      tokens += inputs.input_ids.numel()
    return np.concatenate(parts), tokens

  return encode


def cores() -> int:
  """CPU cores this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def serve(side: str, folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """A side's process: a line with a round's number is that round; answers with what it took."""
  weights = folder / "weights"
  if side == "ours":
    encode = ours(weights, config)
  else:
    encode = peer(weights, batch=config.eval_batch_size, form=side)
  rounds = json.loads((folder / "rounds.json").read_text())
  for line in sys.stdin:
    number = int(line)
    began = time.perf_counter()
    embeddings, tokens = encode(rounds[number])
    taken = time.perf_counter() - began
    np.save(folder / f"{side}-{number}.npy", embeddings)
    print(json.dumps({"seconds": taken, "tokens": tokens}), flush=True)


def measure(
  folder: pathlib.Path, *, rounds: int, flags_of_sides: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
  """{side: {'seconds': of each round, 'tokens': of each round}}, round 0 left out: it warms up."""
  found: dict[str, dict[str, list[float]]] = {s: {"seconds": [], "tokens": []} for s in SIDES}
  workers: dict[str, subprocess.Popen] = {}
  try:
    for side in SIDES:
      workers[side] = subprocess.Popen(
        [
          sys.executable, "-m", "bench.zero_shot", f"--serve={side}", f"--folder={folder}",
          *flags_of_sides,
        ],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      )  # fmt: skip
    for number in range(rounds + 1):
      for side, worker in workers.items():
        worker.stdin.write(f"{number}\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
          raise RuntimeError(f"the side {side!r} ended with code {worker.wait()}; see above.")
        for kind, value in json.loads(line).items():
          if number:
            found[side][kind].append(value)
      taken = ", ".join(f"{s} {f['seconds'][-1]:.2f}" for s, f in found.items() if f["seconds"])
      say(f"round {number} of {rounds}: {taken} s" if number else "all sides are warm")
  finally:
    for worker in workers.values():
      worker.kill()
      worker.communicate()
  return found


def differences(folder: pathlib.Path, *, rounds: int) -> dict[str, float]:
  """Largest difference of our embeddings from each peer's, number by number, and their spread.

  `spread` is the root mean square of how far the numbers of an embedding lie from their mean over
  the prompts: what a side that answers the same to everything would miss by.
  """
  found = {"padded": 0.0, "trimmed": 0.0}
  spread = []
  for number in range(rounds + 1):
    mine = np.load(folder / f"ours-{number}.npy")
    spread.append(mine.std(axis=0))
    for side in found:
      other = np.load(folder / f"{side}-{number}.npy")
      found[side] = max(found[side], float(np.abs(mine - other).max()))
  return {**found, "spread": float(np.sqrt(np.mean(np.square(spread))))}


def summary(
  found: Mapping[str, Mapping[str, Sequence[float]]], *, texts: int, text_tokens: int
) -> dict[str, Any]:
  """What --json prints, but for differences and settings.

  Args:
    found: of `measure`.
    texts: prompts a round.
    text_tokens: of all rounds' prompts, start and end included, without any padding.
  """
  speed = {side: texts / statistics.median(found[side]["seconds"]) for side in SIDES}
  tokens = {side: int(sum(found[side]["tokens"])) for side in SIDES}
  return {
    "prompts_per_s": {
      **speed,
      **{name: speed["ours"] / speed[side] for name, side in _RATIOS.items()},
    },
    "tokens": {
      "texts": text_tokens,
      **tokens,
      **{name: tokens[side] / tokens["ours"] for name, side in _RATIOS.items()},
    },
  }


def table(result: Mapping[str, Any]) -> str:
  """The results for people, in Markdown."""
  speed, tokens = result["prompts_per_s"], result["tokens"]
  lines = ["| | prompts/s | tokens computed | of them text |", "|---" * 4 + "|"]
  for side in SIDES:
    share = tokens["texts"] / tokens[side]
    lines.append(f"| {side} | {speed[side]:.1f} | {tokens[side]:,} | {share:.1%} |")
  lines += ["", "prompts/s, ours / padded: {ratio:.2f}, ours / trimmed: {ratio_trimmed:.2f}"]
  lines[-1] = lines[-1].format(**speed)
  lines.append("tokens, padded / ours: {ratio:.2f}, trimmed / ours: {ratio_trimmed:.2f}")
  lines[-1] = lines[-1].format(**tokens)
  lines.append(
    "largest difference of embeddings: {padded:.1e} (padded), {trimmed:.1e} (trimmed); spread over "
    "prompts {spread:.1e}".format(**result["max_difference"])
  )
  return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in result["settings"].items())])


def main() -> None:
  flag = flags.FLAGS
  for name in ("prompts", "repeats", "batch"):
    if flag[name].value < 1:
      raise ValueError(f"--{name}={flag[name].value}: at least 1 is needed. Raise it.")
  config = setting(flag.recipe, batch=flag.batch, row_length=flag.row_length)
  if flag.serve:
    serve(flag.serve, pathlib.Path(flag.folder), config)
    return
  rounds = sample(
    all_prompts(pathlib.Path(flag.vocabulary)),
    rounds=flag.repeats + 1, count=flag.prompts, seed=flag.seed,
  )  # fmt: skip
  load = round(os.getloadavg()[0], 2)
  if load > _BUSY * cores():
    say(f"warning: the load is {load} beforehand: the ratios flatter us. Use a quiet machine.")
  os.environ["JAX_PLATFORMS"] = "cpu"
  from grain_jax import tokenizer as tokenizers

  lengths = [
    len(ids)
    for texts in rounds[1:]
    for ids in tokenizers.Tokenizer(context=config.model.text.context).encode_batch(texts)
  ]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "rounds.json").write_text(json.dumps(rounds))
    share_weights(config, folder / "weights")
    found = measure(
      folder,
      rounds=flag.repeats,
      flags_of_sides=[f"--{f}={flag[f].value}" for f in ("recipe", "batch", "row_length")],
    )
    result = summary(found, texts=flag.prompts, text_tokens=sum(lengths))
    result["max_difference"] = differences(folder, rounds=flag.repeats)
  result["settings"] = {
    "prompts": flag.prompts, "repeats": flag.repeats, "batch": flag.batch,
    "row_length": flag.row_length, "mean_tokens": round(statistics.mean(lengths), 2),
    "longest": max(lengths), "padded_to": config.model.text.context, "seed": flag.seed,
    "cores": cores(), "load_before": load, "platform": platform.platform(),
    **{name: metadata.version(name) for name in ("jax", "torch", "transformers")},
  }  # fmt: skip
  print(json.dumps(result) if flag.json else table(result))


if __name__ == "__main__":
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  flags.DEFINE_integer("prompts", 2048, "Prompts a round.")
  flags.DEFINE_integer("repeats", 5, "Rounds, of which the median counts.")
  flags.DEFINE_integer("batch", 32, "Rows a call, of all sides.")
  flags.DEFINE_integer("row_length", 128, "Tokens in our packed rows.")
  flags.DEFINE_integer("seed", 0, "Of the choice of prompts.")
  flags.DEFINE_string("vocabulary", str(VOCABULARY), "Class names and templates.")
  flags.DEFINE_string("recipe", CONFIG, "The text tower, FILE or FILE:argument.")
  flags.DEFINE_string("serve", "", "For the processes of the sides; not given by default.")
  flags.DEFINE_string("folder", "", "For the processes of the sides; not given by default.")
  cli.run(main)
