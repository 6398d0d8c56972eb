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
are labels, `label`; paths in files start from the file's folder. Images that cannot be read are
counted, named and left out.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from grain_jax import cli, failures, places, schema, trees
from grain_jax import encoders as encoders_lib
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import weights
from grain_jax.evals import retrieval
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.models import grain
from grain_jax.runtime import addresses, distributed
from grain_jax.runtime import mesh as meshes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SAY_EVERY = 10.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Images to embed."""

  files: Sequence[pathlib.Path]  # n of them
  paths: Sequence[str]  # of each, as it is written into the result
  labels: np.ndarray | None = None  # i64 [n]
  label_names: Sequence[str] | None = None


def find(images: str, *, labels: str = "") -> Inputs:
  """The images of --images.

  Args:
    images: a folder, or a .txt or .csv file; see the module.
    labels: 'folders': an image's label is the sub-folder that it lies in, of the first level.

  Raises:
    ValueError: there is nothing there, or no image in it; one line.
  """
  places.check(images, "--images")
  path = pathlib.Path(images)
  if labels and not path.is_dir():
    raise ValueError(f"--labels={labels} is for a folder of pictures, and --images={path} is none.")
  if path.is_dir():
    return _find_in_folder(path, labels=labels)
  if not path.is_file():
    raise ValueError(f"--images={path}: there is no such folder or file. Correct the path.")
  if path.suffix.lower() == ".txt":
    names, own = _lines(path, "--images"), None
  elif path.suffix.lower() == ".csv":
    names, own = _columns(path)
  else:
    raise ValueError(
      f"--images={path} is no folder, and no .txt (a path a line) or .csv file (columns image, "
      "label). Give one of them."
    )
  if not names:
    raise ValueError(f"--images={path} names no picture. Write the path of one into each line.")
  places.check_all({f"--images={path}: image": names})
  found = Inputs([path.parent / name for name in names], names)
  return found if own is None else dataclasses.replace(found, **_numbered(own))


def _find_in_folder(folder: pathlib.Path, *, labels: str) -> Inputs:
  files = (pathlib.Path(file) for file in _walk(str(folder), frozenset()))
  paths = sorted(file.relative_to(folder).as_posix() for file in files)
  if not paths:
    raise ValueError(
      f"--images={folder} holds no picture ({', '.join(SUFFIXES)}), nor do its sub-folders. "
      "Give another folder."
    )
  found = Inputs([folder / path for path in paths], paths)
  if not labels:
    return found
  loose = [path for path in paths if "/" not in path]
  if loose:
    raise ValueError(
      f"--labels=folders: {len(loose)} pictures of {folder} lie in no class folder, the first is "
      f"{loose[0]}. Move them into FOLDER/CLASS/, or leave --labels away."
    )
  names = [path.split("/")[0] for path in paths]
  return dataclasses.replace(found, **_by_name(names))


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
  """Images below a folder; links are followed, but not back to a folder that they lie in."""
  real = os.path.realpath(folder)
  if real in above:
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        yield from _walk(entry.path, above | {real})
      elif entry.name.lower().endswith(SUFFIXES):
        yield entry.path


def _read(path: pathlib.Path, flag: str) -> str:
  try:
    return failures.retry_read(lambda: path.read_text(encoding="utf-8-sig"), path)
  except OSError as error:
    raise ValueError(f"{flag}={path}: {error.strerror}. Correct the path.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{flag}={path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _lines(path: pathlib.Path, flag: str) -> list[str]:
  """Lines that are not blank, without the white space around them."""
  return [line.strip() for line in _read(path, flag).split("\n") if line.strip()]


def _columns(path: pathlib.Path) -> tuple[list[str], list[str] | None]:
  """The columns image and, if there is one, label of a CSV file."""
  table = csv.DictReader(_read(path, "--images").splitlines())
  columns = table.fieldnames or ()
  if "image" not in columns:
    raise ValueError(
      f"--images={path} has the columns {', '.join(columns)}: no column image. Write image,label "
      "into its first line."
    )
  rows = list(table)
  labelled = "label" in columns
  for row in rows:
    if not row["image"] or (labelled and not row["label"]):
      raise ValueError(
        f"--images={path}: picture {row['image']!r} has the label {row.get('label')!r}. Give each "
        "line both."
      )
  return [row["image"] for row in rows], [row["label"] for row in rows] if labelled else None


def _numbered(labels: Sequence[str]) -> dict[str, Any]:
  """Labels that are whole numbers as they are; others by their place among the sorted names."""
  if all(label.isascii() and label.isdigit() for label in labels):
    return {"labels": np.array([int(label) for label in labels], np.int64)}
  return _by_name(labels)


def _by_name(labels: Sequence[str]) -> dict[str, Any]:
  names, index = np.unique(labels, return_inverse=True)
  return {"labels": index.astype(np.int64), "label_names": names.tolist()}


def embed_images(
  encoders: Encoders,
  inputs: Inputs,
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
    tokenizer=tokenizers.Tokenizer(context=config.model.text.context),
    on_batch=on_batch,
  )
  return encoders, mesh


def fingerprint(config: ml_collections.ConfigDict, params: Any) -> str:
  """Hex digest of a model: of its configuration and all of its parameters.

  All processes that hold shards of them must call it.
  """
  digest = hashlib.blake2b(digest_size=16)
  digest.update(json.dumps(config.model.to_dict(), sort_keys=True, default=str).encode())
  digest.update(config.method.encode())
  for name, leaf in trees.named_leaves(params):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(meshes.to_host(leaf)).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


@contextlib.contextmanager
def output(path: str, *, overwrite: bool) -> Iterator[Callable[..., None]]:
  """A function that writes FILE.npz, all or nothing: `write(arrays, metadata)`.

  The place is tried out on entry, before anything is encoded.

  Raises:
    ValueError: the file exists, or nothing can be written there; one line.
  """
  places.check(path, "--out")
  out = pathlib.Path(path)
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    if out.is_dir():
      raise ValueError(f"--out={out} is a folder. Name a file in it: {out / 'embeddings.npz'}.")
    if out.exists() and not overwrite:
      raise ValueError(f"--out={out} exists already. Name another file, or add --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
  except OSError as error:
    line = f"--out={out} cannot be written ({error.strerror}). Name another place."
    raise ValueError(line) from error

  def write(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    with temporary.open("wb") as file:
      np.savez(file, **arrays, metadata=np.array(json.dumps(metadata)))
    temporary.replace(out)

  try:
    yield write
  finally:
    temporary.unlink(missing_ok=True)


def check_space(path: str, config: ml_collections.ConfigDict, *, rows: int, regions: bool) -> None:
  """Raises a one-line ValueError where the result is larger than what is free on the disk."""
  queries = config.model.num_queries if regions else 0
  needed = 4 * rows * (config.model.embed_dim * (1 + queries) + 4 * queries)
  free = shutil.disk_usage(pathlib.Path(path).parent).free
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
  with distributed.session(addresses.from_flags()):
    _main(flags.FLAGS)


def _main(flag: flags.FlagValues) -> None:
  if bool(flag.images) == bool(flag.texts):
    raise ValueError("give either --images=DIR or --texts=FILE.txt.")
  if flag.texts and (flag.regions or flag.labels):
    raise ValueError("--regions and --labels are for --images, not for --texts.")
  inputs, texts = None, []
  if flag.images:
    inputs = find(flag.images, labels=flag.labels)
    names = inputs.paths
  else:
    names = texts = _lines(pathlib.Path(flag.texts), "--texts")
    if not texts:
      raise ValueError(f"--texts={flag.texts} holds no text. Write one into each line.")
  total = len(names)
  digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
  distributed.check_equal("command", {"--checkpoint": flag.checkpoint, "inputs": (total, digest)})
  first = distributed.process_index() == 0
  opened = output(flag.out, overwrite=flag.overwrite) if first else contextlib.nullcontext()
  with opened as write:
    config, params, step = weights.open_checkpoint(flag.checkpoint, step=flag.step)
    if first:
      check_space(flag.out, config, rows=total, regions=flag.regions)
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
      "fingerprint": fingerprint(config, params),
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


if __name__ == "__main__":
  flags.DEFINE_string(
    "checkpoint", None, "Workdir of a run, or a folder of weights.", required=True
  )
  flags.DEFINE_integer("step", None, "Checkpoint of a run; the newest by default.")
  flags.DEFINE_string("images", None, "Folder of pictures, or a .txt or .csv file naming them.")
  flags.DEFINE_string("texts", None, "A file with a text a line, instead of pictures.")
  flags.DEFINE_string("out", None, "The .npz file to be written.", required=True)
  flags.DEFINE_bool("overwrite", False, "Write over a file that is there.")
  flags.DEFINE_enum("labels", "", ("", "folders"), "folders: classes are the sub-folders.")
  flags.DEFINE_bool("regions", False, "Region embeddings and boxes too.")
  flags.DEFINE_integer("batch_size", None, "Pictures a call, over all devices.", lower_bound=1)
  cli.run(main)
