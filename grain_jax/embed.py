"""`python -m grain_jax.embed --checkpoint=PATH --images=DIR --out=FILE.npz`: embeddings in bulk.

FILE.npz opens with `numpy.load(FILE, allow_pickle=False)` and holds

  embeddings   f32 [n, E], L2-normalised
  paths        str [n]: of the images, from their folder            (--images)
  labels       i64 [n], where there are any                         (--images)
  label_names  str [C]: what the labels mean, unless they are numbers of the user's own
  regions      f32 [n, Q, E], L2-normalised                         (--regions)
  boxes        f32 [n, Q, 4]: (ymin, xmin, ymax, xmax) in [0, 1]    (--regions)
  texts        str [n]                                              (--texts)
  metadata     str []: a JSON object with the checkpoint, a fingerprint of the whole model, how
               images were resized, and how many inputs there were

--images is a folder (its images and those of its sub-folders, hidden ones left out, by path), a
.txt file with the path of an image a line, or a .csv file with the columns `image` and, if there
are labels, `label`; paths in files start from the file's folder, white space around them is left
out. Images that cannot be read are counted, named and left out. `paths` and `texts` have the width
of the longest in every row: one that memory cannot hold is refused before anything is encoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from grain_jax import cli, local_files, places, schema, tokenizing
from grain_jax import encoders as encoders_lib
from grain_jax.convert import weights
from grain_jax.evals import retrieval
from grain_jax.evals.inputs import files
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.models import attention, grain
from grain_jax.runtime import addresses, compile_cache, devices, distributed
from grain_jax.runtime import mesh as meshes

_SAY_EVERY = 10.0  # seconds between lines of progress


def embed_images(
  encoders: Encoders,
  inputs: files.Inputs,
  *,
  regions: bool = False,
  warn: Callable[[str], None] = print,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """(arrays, counts) of the images that can be read, in their order; names as in the module.

  Args:
    encoders: of the model.
    inputs: the images.
    regions: whether region embeddings and their boxes are wanted too.
    warn: gets one line about images that cannot be read.

  Raises:
    failures.TransientError: the storage of an image fails.
    ValueError: none can be read, or a model without region queries is asked for regions.
  """
  if regions:
    encoders.require_regions("--regions")

  def encode(images: np.ndarray) -> tuple[np.ndarray, ...]:
    whole = (encoders.image(images),)
    return whole + encoders.regions(images) if regions else whole

  encoded = images_lib.encode(encode, inputs.files, encoders, what="embed", warn=warn)
  arrays = {"embeddings": retrieval.check_embeddings(encoded.values[0], name="the image encoder")}
  if regions:
    arrays["regions"] = retrieval.check_embeddings(encoded.values[1], name="the region encoder")
    corners = schema.center_to_corners(encoded.values[2])
    arrays["boxes"] = np.clip(corners, 0, 1).astype(np.float32)
  arrays["paths"] = np.array([inputs.paths[i] for i in encoded.index])
  if inputs.labels is not None:
    arrays["labels"] = inputs.labels[encoded.index]
  if inputs.label_names is not None:
    arrays["label_names"] = np.array(inputs.label_names)
  return arrays, {"examples": len(encoded.index), "rows": encoded.total}


def embed_texts(encoders: Encoders, texts: Sequence[str]) -> dict[str, np.ndarray]:
  """The arrays of texts; equal ones are encoded once."""
  return {"embeddings": retrieval.encode_texts(encoders.text, texts), "texts": np.array(texts)}


def open_encoders(
  config: ml_collections.ConfigDict,
  params: Any,
  *,
  batch_size: int,
  on_batch: Callable[[], None] = lambda: None,
) -> tuple[Encoders, jax.sharding.Mesh]:
  """Encoders on all devices of all processes, for use within `jax.set_mesh` of their mesh.

  Args:
    config: of the model.
    params: its parameters, sharded or not.
    batch_size: images, or rows of text, a call; rounded up to a multiple of the devices.
    on_batch: called after each.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  devices = len(jax.devices())
  config.mesh.update(data=-1, fsdp=1, tensor=1)
  config.accumulate = 1
  config.batch_size = config.eval_batch_size = -(-batch_size // devices) * devices
  mesh = meshes.create(config)
  encoders = encoders_lib.make(
    config,
    grain.build(config),
    meshes.replicate(params, mesh),
    mesh=mesh,
    tokenizer=tokenizing.make_or_ids(config),
    on_batch=on_batch,
    announce=distributed.process_index() == 0,
  )
  return encoders, mesh


@contextlib.contextmanager
def output(path: str, *, overwrite: bool) -> Iterator[Callable[..., None]]:
  """A function that writes FILE.npz, all or nothing: `write(arrays, metadata)`.

  The place is tried out on entry, before anything is encoded.

  Raises:
    ValueError: the file exists, or nothing can be written there; one line.
  """
  out = places.open_place(path, "--out")
  remote = places.is_bucket(out)
  try:
    if out.is_dir():
      raise ValueError(f"--out={out} is a folder. Name a file in it: {out / 'embeddings.npz'}.")
    if out.exists() and not overwrite:
      raise ValueError(f"--out={out} exists already. Name another file, or add --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    if remote:
      temporary.write_text("")  # the right to write is tried
      temporary.unlink()
      temporary = local_files.temporary_folder() / out.name
    temporary.touch()
  except OSError as error:
    line = f"--out={out} cannot be written ({error.strerror}). Name another place."
    raise ValueError(line) from error

  def write(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    with temporary.open("wb") as file:
      np.savez(file, **arrays, metadata=np.array(json.dumps(metadata)))
    if remote:
      places.upload(temporary, out)
    else:
      temporary.replace(out)

  try:
    yield write
  finally:
    temporary.unlink(missing_ok=True)


def check_space(
  path: str, config: ml_collections.ConfigDict, names: Sequence[str], *, regions: bool
) -> None:
  """Raises a one-line ValueError where the result is larger than the disk or the memory takes.

  Args:
    path: of the file to be.
    config: of the model.
    names: texts, or paths of images. Their array has the width of the longest in every row, in
      memory too, here and where it is read: NumPy has no other one that opens without pickle.
    regions: whether region embeddings are wanted.
  """
  queries, rows = config.model.num_queries if regions else 0, len(names)
  width, longest = max((len(name), i) for i, name in enumerate(names))
  text = 4 * rows * width
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if text > memory:
    raise ValueError(
      f"--out={path}: number {longest + 1:,} of {rows:,} inputs is {width:,} characters long, and "
      f"an array with room for it in every row takes {text / 1e9:.1f} GB, of {memory / 1e9:.1f} GB "
      "of memory. Shorten it, or leave it out."
    )
  needed = 4 * rows * (config.model.embed_dim * (1 + queries) + 4 * queries) + text
  folder = tempfile.gettempdir() if places.is_bucket(path) else places.at(path).parent
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise ValueError(
      f"--out={path}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there. "
      "Name another place."
    )


class _Progress:
  """'12,800 pictures at 410/s' on stderr every few seconds; called after each batch."""

  def __init__(self, total: int, batch_size: int, *, calls_per_image: int):
    self._total, self._batch, self._calls = total, batch_size, calls_per_image
    self._done, self._start = 0, time.monotonic()
    self._next = self._start + _SAY_EVERY

  def __call__(self) -> None:
    self._done += 1
    now = time.monotonic()
    if now >= self._next and distributed.process_index() == 0:
      self._next = now + _SAY_EVERY
      seen = min(self._done // self._calls * self._batch, self._total)
      speed = seen / (now - self._start)
      print(f"{seen:,} of {self._total:,} pictures, {speed:.0f}/s", file=sys.stderr, flush=True)


def main() -> None:
  with distributed.session(addresses.from_flags()), devices.explaining(devices.ENCODING):
    _main(flags.FLAGS)


def _main(flag: flags.FlagValues) -> None:
  if bool(flag.images) == bool(flag.texts):
    raise ValueError("give either --images=DIR or --texts=FILE.txt.")
  if flag.texts and (flag.regions or flag.labels):
    raise ValueError("--regions and --labels are for --images, not for --texts.")
  inputs, texts = None, []
  if flag.images:
    inputs = files.find(flag.images, labels=flag.labels)
    names = inputs.paths
  else:
    names = texts = files.read_lines(pathlib.Path(flag.texts), "--texts")
    if not texts:
      raise ValueError(f"--texts={flag.texts} holds no text. Write one into each line.")
  devices.check_found()
  total = len(names)
  digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
  distributed.check_equal("command", {"--checkpoint": flag.checkpoint, "inputs": (total, digest)})
  first = distributed.process_index() == 0
  opened = output(flag.out, overwrite=flag.overwrite) if first else contextlib.nullcontext()
  with opened as write:
    compile_cache.use()
    config, params, step = weights.open_checkpoint(flag.checkpoint, step=flag.step)
    if first:
      check_space(flag.out, config, names, regions=flag.regions)
    batch_size = min(flag.batch_size or config.eval_batch_size, total)
    progress = _Progress(total, batch_size, calls_per_image=1 + flag.regions)
    encoders, mesh = open_encoders(
      config, params, batch_size=batch_size, on_batch=progress if flag.images else lambda: None
    )

    def warn(line: str) -> None:
      if first:
        print(f"warning: {line}", flush=True)

    with jax.set_mesh(mesh):
      if inputs is not None:
        arrays, counts = embed_images(encoders, inputs, regions=flag.regions, warn=warn)
      else:
        arrays, counts = embed_texts(encoders, texts), {"examples": total, "rows": total}
    metadata = {
      "kind": "images" if inputs is not None else "texts",
      "source": flag.images or flag.texts,
      "checkpoint": flag.checkpoint,
      "step": step,
      "fingerprint": encoders_lib.model_fingerprint(config, params),
      "resize": encoders.resize,
      "size": encoders.size,
      **counts,
    }
    if write is not None:
      write(arrays, metadata)
      print(
        f"{flag.out}: {counts['examples']:,} of {counts['rows']:,} {metadata['kind']}, "
        f"{arrays['embeddings'].shape[1]} numbers each",
        flush=True,
      )
      if line := attention.summary():
        print(line, flush=True)


if __name__ == "__main__":
  flags.DEFINE_string(
    "checkpoint", None, "Workdir of a run, or a folder of weights.", required=True
  )
  flags.DEFINE_integer("step", None, "Checkpoint of a run; the newest by default.")
  flags.DEFINE_string(
    "images",
    None,
    "Folder of pictures, or a .txt or .csv file naming them; by default --texts is given.",
  )
  flags.DEFINE_string(
    "texts", None, "A file with a text a line, without the blank ones; by default none."
  )
  flags.DEFINE_string("out", None, "The .npz file to be written.", required=True)
  flags.DEFINE_bool("overwrite", False, "Write over a file that is there.")
  flags.DEFINE_enum(
    "labels",
    "",
    ("", "folders"),
    "folders: classes are the sub-folders; by default the labels of a .csv, if any.",
  )
  flags.DEFINE_bool("regions", False, "Region embeddings and boxes too.")
  flags.DEFINE_integer(
    "batch_size",
    None,
    "Pictures a call, over all devices; by default as many as the model's eval_batch_size.",
    lower_bound=1,
  )
  cli.run(main)
