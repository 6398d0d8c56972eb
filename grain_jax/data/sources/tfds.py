"""A dataset prepared by TensorFlow Datasets, of any name, with a mapping of its features by flags.

FOLDER is TFDS's data_dir with --dataset=NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION (the
newest where none is given), or the folder of a version, which holds dataset_info.json. It must have
been prepared (`tfds build NAME --data_dir=FOLDER`); nothing is downloaded and none of its code is
needed. A record's key is SPLIT/INDEX, or the value of --id_key. The split validation becomes val.

  image     --image_key: by default the feature image, or the only or first one that is an image
  captions  --caption_key, several: texts, lists of texts or classes (by name). By default what is
            named like captions, as --source=webdataset has it; of captions that are objects their
            text
  regions   --boxes_key and --labels_key, by default objects/bbox and objects/label where these
            are: boxes are (ymin, xmin, ymax, xmax) in [0, 1], as TFDS has them, unless --box_format
            and --box_units say otherwise; labels are texts or classes. --scores_key. Those of
            which is_crowd or is_group_of stands beside the boxes are around many: left out, counted

A "/" leads into features of features: objects/bbox.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import schema
from grain_jax.data import box_formats, records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, mapping, splits, texts

BLOCK = 4096  # records a block
FLAGS = (
  base.Flag("input", "TFDS's data_dir, or the folder of a version"),
  base.Flag("data_dir", "the same, by TFDS's own name"),
  base.Flag("dataset", "NAME[/CONFIG][:VERSION]; not where --input is the folder of a version"),
  base.Flag("split", "train, or train+validation; default: all of them"),
  base.Flag("image_key", "feature of the image"),
  base.Flag("caption_key", "features of captions, the original's first", [], many=True),
  base.Flag("long_captions", "those whose list is one text in sentences", [], many=True),
  base.Flag("id_key", "feature of unique keys; default: the split and the index"),
  base.Flag("boxes_key", "feature of lists of boxes"),
  base.Flag("labels_key", "feature of their labels"),
  base.Flag("scores_key", "feature of their scores"),
  base.Flag("box_format", "of all boxes", "yxyx", choices=box_formats.FORMATS),
  base.Flag("box_units", "of all boxes", "fractions", choices=box_formats.UNITS),
  base.tolerance_flag(1e-3),
  *base.COMMON_FLAGS,
)


def source(
  input: str | pathlib.Path | None = None,  # noqa: A002
  *,
  data_dir: str | pathlib.Path | None = None,
  dataset: str | None = None,
  split: str | None = None,
  image_key: str | None = None,
  caption_key: Sequence[str] = (),
  long_captions: Sequence[str] = (),
  id_key: str | None = None,
  boxes_key: str | None = None,
  labels_key: str | None = None,
  scores_key: str | None = None,
  box_format: str = "yxyx",
  box_units: str = "fractions",
  tolerance: float = 1e-3,
  val_fraction: float = 0.0,
  licence: str = "",
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """A prepared dataset of TFDS; flags and mapping stand at the head of this file."""
  flags: dict[str, Any] = {**locals()}
  flags |= {name: list(flags[name]) for name in ("caption_key", "long_captions")}
  del flags["licence"], flags["data_dir"]
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  if input is None and data_dir is None:
    raise ValueError("--input: name TFDS's data_dir, or the folder of a version.")
  name = "--input" if input is not None else "--data_dir"
  folder = _find(base.existing(input if input is not None else data_dir, name), dataset)
  flags |= {"input": str(folder), "dataset": None}
  builder = _Prepared(folder)
  wanted = list(builder.counts) if split is None else split.split("+")
  for own in wanted:
    if own not in builder.counts:
      raise ValueError(f"--split = {own}: {folder} has {', '.join(builder.counts)}. Use those.")
  if bool(boxes_key) != bool(labels_key):
    raise ValueError("--boxes_key and --labels_key: each needs the other. Give both.")
  image, captions, boxes, labels = _choose(folder, builder, flags)
  read_keys = [key for key in (*captions, id_key, boxes, labels, scores_key) if key]
  if boxes:
    beside = mapping.crowd_paths(boxes, separator="/")
    read_keys += [key for key in beside if key in builder.features()]

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for own in wanted:
      for start in range(0, builder.counts[own], BLOCK):
        yield {"split": own, "start": start, "stop": min(start + BLOCK, builder.counts[own])}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    own = block["split"]
    for index, values in builder.read(own, block["start"], block["stop"], image, read_keys):
      key: Any = f"{own}/{index}"
      if id_key:
        value = mapping.look_up(values, id_key, separator="/")
        key = str(value) if isinstance(value, (int, str)) and value != "" else None
      if key is None:
        yield splits.usual(own), records.Refused(f"{own}/{index}", "records", "no_key")
        continue
      target = base.split_of(key, splits.usual(own), val_fraction)
      data = mapping.look_up(values, image, separator="/")
      if not isinstance(data, bytes):
        yield target, records.Refused(key, "records", records.MISSING_IMAGE)
        continue
      found = {
        name: mapping.text(mapping.look_up(values, name, separator="/"), builder.names(name))
        for name in captions
      }
      regions: list[Any] = []
      if boxes:
        regions, lost = mapping.regions(
          key,
          _of(values, boxes),
          _of(values, labels),
          _of(values, scores_key),
          around_many=mapping.crowds(values, boxes, separator="/"),
          names=builder.names(labels),
        )
        for refused in lost:
          yield target, refused
      yield (
        target,
        {
          schema.RECORD_KEY: key,
          schema.RECORD_IMAGE: data,
          schema.RECORD_CAPTIONS: texts.captions(found, names=captions, long=long_captions),
          schema.RECORD_REGIONS: regions,
          schema.RECORD_NEGATIVES: [],
        },
      )

  stamps = [inputs.stamp(folder / name) for name in ("dataset_info.json", "features.json")]
  return base.Source(
    "tfds",
    {**flags, "files": stamps},
    read,
    about={"licence": licence},
    blocks=blocks,
    recipe={"kind": "tfds", "arguments": {**flags, "licence": licence}},
    total=sum(builder.counts[own] for own in wanted),
    tolerance=tolerance,
    images=lambda: (path for path in sorted(folder.iterdir()) if path.is_file()),
    max_pixels=max_pixels,
    box_format=box_format,
    box_units=box_units,
    flags_for_boxes=bool(boxes),
  )


class _Prepared:
  """A dataset on the disk."""

  def __init__(self, folder: pathlib.Path):
    from grain_jax.data import host_tensorflow

    self._tfds = host_tensorflow.datasets()
    try:
      self._builder = self._tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS raises a dozen kinds for a file that is damaged
      why = " ".join(str(error).split())[:200]
      raise ValueError(f"{folder} is no dataset that TFDS reads: {why}. Build it again.") from None
    found = self._builder.info.splits
    self.counts: dict[str, int] = {name: int(found[name].num_examples) for name in found}
    self.names = functools.cache(self._names)

  def features(self) -> dict[str, Any]:
    """Features by their path, those of dicts and sequences after them."""
    return dict(_walk("", self._builder.info.features))

  def _names(self, path: str | None) -> Sequence[str]:
    feature = self.features().get(path or "")
    while feature is not None and not hasattr(feature, "int2str"):
      feature = getattr(feature, "feature", None)
    names = getattr(feature, "names", None)
    return tuple(names) if isinstance(names, list) else ()

  def _parts(self, path: str) -> list[str]:
    """Names that lead to a feature; some have a "/" in them."""
    return [path] if path in self._builder.info.features.keys() else path.split("/")  # noqa: SIM118

  def read(
    self, split: str, start: int, stop: int, image: str, keys: Sequence[str]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, values of the features named) of some records; the image as its file's bytes."""
    decoders: Any = self._tfds.decode.SkipDecoding()
    head, *parts = self._parts(image)
    for part in reversed(parts):
      decoders = {part: decoders}
    decoders = {head: decoders}
    part = f"{split}[{start}:{stop}]"
    if "array_record" in str(self._builder.info.file_format).lower():
      data = self._builder.as_data_source(split=part, decoders=decoders)
      found: Iterable[Any] = (data[i] for i in range(len(data)))
    else:
      config = self._tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
      wanted = {self._parts(key)[0]: True for key in (image, *keys)}
      decoders = self._tfds.decode.PartialDecoding(wanted, decoders=decoders)
      found = self._tfds.as_numpy(
        self._builder.as_dataset(
          split=part, shuffle_files=False, decoders=decoders, read_config=config
        )
      )
    for index, values in enumerate(found, start=start):
      yield index, _plain(values)


def _of(values: Any, path: str | None) -> Any:
  return mapping.look_up(values, path, separator="/") if path else None


def _walk(prefix: str, feature: Any) -> Iterator[tuple[str, Any]]:
  inner = getattr(feature, "feature", feature)
  if hasattr(inner, "items"):  # a FeaturesDict
    for name, part in inner.items():
      path = f"{prefix}{name}"
      yield path, part
      yield from _walk(f"{path}/", part)


def _plain(value: Any) -> Any:
  """Arrays as lists, bytes of texts as texts; an image's bytes stay."""
  if isinstance(value, Mapping):
    return {name: _plain(item) for name, item in value.items()}
  if hasattr(value, "to_list"):  # a ragged tensor
    value = value.to_list()
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, bytes):
    with contextlib.suppress(UnicodeDecodeError):
      return value.decode("utf-8")
  return value


def _find(root: pathlib.Path, dataset: str | None) -> pathlib.Path:
  """The folder of a version."""
  if (root / "dataset_info.json").is_file():
    if dataset:
      raise ValueError(f"--dataset = {dataset}: {root} is one dataset already. Leave it out.")
    return root
  if not dataset:
    raise ValueError(
      f"{root} holds no dataset_info.json: it is no prepared dataset. Give --dataset=NAME where it "
      "is TFDS's data_dir."
    )
  name, _, version = dataset.partition(":")
  if ".." in pathlib.PurePath(name).parts or pathlib.PurePath(name).is_absolute():
    raise ValueError(f"--dataset = {dataset} is no name of a dataset. Use NAME[/CONFIG][:VERSION].")
  folder = root / name
  found = {path.parent.name: path.parent for path in folder.glob("*/dataset_info.json")}
  if version and version in found:
    return found[version]
  if found and not version:
    return max(found.items(), key=lambda item: [int(x) for x in re.findall(r"\d+", item[0])])[1]
  configs = sorted({path.parents[1].name for path in folder.glob("*/*/dataset_info.json")})
  if found:
    there = f"there is {', '.join(sorted(found))}"
  else:
    there = f"it has the configs {', '.join(configs)}" if configs else "nothing of it is there"
  raise ValueError(
    f"--dataset = {dataset} is not prepared in {root} ({there}). Name one that is, or prepare it: "
    f"tfds build {name} --data_dir={root}."
  )


def _choose(
  folder: pathlib.Path, builder: _Prepared, flags: Mapping[str, Any]
) -> tuple[str, list[str], str | None, str | None]:
  """(image, captions, boxes, labels): the features that the flags name, or that are usual."""
  features = builder.features()
  keys = [flags[f"{name}_key"] for name in ("image", "id", "boxes", "labels", "scores")]
  for key in filter(None, (*keys, *flags["caption_key"])):
    if key not in features:
      raise ValueError(f"{folder} has no feature {key!r}, but {', '.join(features)}. Name those.")
  images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
  image = flags["image_key"] or ("image" if "image" in images else next(iter(images), None))
  if image is None:
    raise ValueError(f"{folder} has no image among {', '.join(features)}. Choose another dataset.")
  captions = flags["caption_key"]
  if not captions:
    found = texts.find_names(features)
    captions = [name for name in found if name in texts.ORIGINAL][:1]
    captions += [name for name in found if name not in texts.ORIGINAL]
    # coco_captions and its like have objects of a text and an id.
    captions = [f"{name}/text" if f"{name}/text" in features else name for name in captions]
  if not captions:
    raise ValueError(
      f"{folder} has the features {', '.join(features)}: which holds captions? Say so with "
      "--caption_key; a class serves too, by its name."
    )
  boxes, labels = flags["boxes_key"], flags["labels_key"]
  if not boxes and {"objects/bbox", "objects/label"} <= features.keys():
    boxes, labels = "objects/bbox", "objects/label"
  return image, list(captions), boxes, labels
