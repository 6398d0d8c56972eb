"""Composition on outside datasets, from the files that their projects publish. DIR is --datasets.

| set | annotations | images |
|---|---|---|
| sugarcrepe | DIR/sugarcrepe/{add,replace,swap}_*.json, seven files | DIR/coco/val2017 |
| aro_relation, aro_attribution | DIR/aro/visual_genome_*.json | DIR/aro/images |
| aro_coco_order | DIR/aro/coco_order.json, else Karpathy's (see `aro`) | DIR/coco/val2014 |
| aro_flickr30k_order | DIR/aro/flickr30k_order.json, else Karpathy's | DIR/flickr30k/images |
| valse | DIR/valse/PIECE.json, eleven files | see `valse_image` |
| vl_checklist | DIR/vl_checklist/data/{Attribute,Object,Relation}/**.json | DIR/{vg,swig,hake} |

All are pairwise: s(caption) > s(false caption), a tie is wrong (see `composition`). An average is
given only where everything that it averages has examples.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grain_jax.evals import composition
from grain_jax.evals.composition import Crop, Item, Score, Verdicts
from grain_jax.evals.inputs import annotations
from grain_jax.evals.inputs.annotations import field
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find
from grain_jax.evals.sets import aro

Results = dict[str, float | int]

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel")
SUGARCREPE += ("swap_att", "swap_obj")
VALSE = ("existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial")
VALSE += ("relations", "actant-swap", "action-replacement", "coreference-standard")
VALSE += ("coreference-hard", "foil-it")
VALSE_VOTES = 2  # annotators, of three, for whom the caption holds and the foil does not
VL_CHECKLIST = {
  "attribute": ("action", "color", "material", "size", "state"),
  "object": ("center", "margin", "mid", "large", "medium", "small"),
  "relation": ("action", "spatial"),
}
VL_CHECKLIST_FILES = 56  # named by the project's corpus.json

_GET_SUGARCREPE = "Get the seven files of data/ from github.com/RAIVNLab/sugar-crepe."
_GET_VALSE = "Get the eleven files of data/ from github.com/Heidelberg-NLP/VALSE."
_GET_VALSE_PICTURES = (
  f"{annotations.GET_COCO[:-1]}, Visual7W (github.com/yukezhu/visual7w-toolkit) into "
  "DIR/visual7w/images, SWiG (github.com/allenai/swig, images_512) into DIR/swig, "
  "VisualDialog_val2018 (visualdialog.org) into DIR/visdial."
)
_GET_VL_CHECKLIST = "Get data/ from github.com/om-ai-lab/VL-CheckList into DIR/vl_checklist."
_GET_VL_PICTURES = (
  "Get VG_100K and VG_100K_2 (visualgenome.org) into DIR/vg, SWiG (github.com/allenai/swig, "
  "images_512) into DIR/swig, HAKE (github.com/DirtyHarryLYL/HAKE) into DIR/hake, laid out as in "
  "VL-CheckList's DATASETS.md."
)


@dataclasses.dataclass(frozen=True)
class Set:
  """An outside dataset for composition."""

  read: Callable[[Options, str], list[Item]]  # options, name of the evaluation -> items
  results: Callable[[Sequence[Item], Verdicts], Results]  # by names below composition/SET/
  how: str  # where the images come from


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the set cannot be evaluated."""
  what = f"composition:{name}"
  items = SETS[name].read(options, what)
  if not items:
    raise ValueError(f"{what}: its files hold no item that counts. Get them once more.")
  paths = (i.image.path if isinstance(i.image, Crop) else i.image for i in items)
  annotations.check_images(paths, what, SETS[name].how)


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  return (SETS[name].read(options, f"composition:{name}"),)


def run(encoders: Encoders, name: str, options: Options) -> Results:
  """Results of one set.

  Args:
    encoders: of the model.
    name: one of `SETS`.
    options: with `limit`, the first so many items of each file.

  Returns:
    `composition/{name}/...`: fractions in [0, 1] as the set's project averages them, see the
    functions named in `SETS`; `.../examples` of `.../rows` items counted.
  """
  what = f"composition:{name}"
  items = SETS[name].read(options, what)
  verdicts = composition.evaluate(encoders, items, what=what, warn=options.warn)
  results = SETS[name].results(items, verdicts)
  if "accuracy_trigrams" in results:
    options.warn(
      f"{what}: made of two of the four perturbations; compare it with no published figure. "
      f"Give DIR/aro/{name.split('_')[1]}_order.json for all four"
    )
  if results.get("files", VL_CHECKLIST_FILES) < VL_CHECKLIST_FILES:
    options.warn(f"{what}: {results['files']} of its {VL_CHECKLIST_FILES} files are there")
  results |= {"examples": int(verdicts.counted.sum()), "rows": len(items)}
  return {f"composition/{name}/{key}": value for key, value in results.items()}


def read_sugarcrepe(path: pathlib.Path, images: pathlib.Path) -> list[Item]:
  """Items of one file of SugarCrepe (Hsieh et al., NeurIPS 2023); their kind is its stem."""
  return [
    Item(
      images / field(entry, "filename", str, where),
      (field(entry, "caption", str, where),),
      (field(entry, "negative_caption", str, where),),
      path.stem,
    )
    for where, entry in annotations.entries(annotations.read_json(path), path)
  ]


def read_valse(path: pathlib.Path, root: pathlib.Path) -> list[Item]:
  """Items of one piece of VALSE (Parcalabescu et al., ACL 2022); their kind is its stem.

  Only those with `VALSE_VOTES` or more votes, as the authors count: "mturk": {"caption": votes}.
  """
  return [
    Item(
      valse_image(root, entry, where),
      (field(entry, "caption", str, where),),
      (field(entry, "foil", str, where),),
      path.stem,
    )
    for where, entry in annotations.entries(annotations.read_json(path), path)
    if field(field(entry, "mturk", dict, where), "caption", int, where) >= VALSE_VOTES
  ]


def valse_image(root: pathlib.Path, entry: Mapping, where: str) -> pathlib.Path:
  """Where the image of an entry lies.

  COCO_*2014_* below ROOT/coco, VisualDialog_val2018_* below ROOT/visdial; else by dataset:
  visual7w in ROOT/visual7w/images, SWiG in ROOT/swig, coco2017 and coco_2017 in ROOT/coco/val2017.
  """
  name, dataset = (field(entry, key, str, where) for key in ("image_file", "dataset"))
  if name.startswith("COCO_"):
    return annotations.coco_2014(root, name)
  if name.startswith("VisualDialog_val2018_"):
    return root / "visdial" / "VisualDialog_val2018" / name
  folders = {
    "visual7w": root / "visual7w" / "images",
    "SWiG": root / "swig",
    "coco2017": root / "coco" / "val2017",
    "coco_2017": root / "coco" / "val2017",
  }
  if dataset not in folders:
    raise ValueError(f"{where}: dataset = {dataset!r} is none of {', '.join(folders)}.")
  return folders[dataset] / name


def read_vl_checklist(path: pathlib.Path, data: pathlib.Path, root: pathlib.Path) -> list[Item]:
  """Items of one file of VL-CheckList (Zhao et al., EMNLP 2022 demos), by its layout.

  A file is a list of [image, {"POS": [text, ...], "NEG": [text, ...]}], of which the first texts
  count. Its path below `data` tells the rest: data/Object/Size/vg_size/vg_obj_small.json is of
  type 'object', property 'small', source 'vg'. Kind: "object/small/vg/PATH".
  """
  parts = path.relative_to(data).with_suffix("").parts
  type_, prop = parts[0].lower(), parts[-1].split("_")[-1]
  sources = [word for part in parts[1:] for word in part.split("_")]
  source = next((word for word in sources if word in ("vg", "vaw", "swig", "hake")), None)
  if source is None or prop not in VL_CHECKLIST.get(type_, ()):
    raise ValueError(f"{path} is no file of VL-CheckList's data/. {_GET_VL_CHECKLIST}")
  images = root / ("vg" if source == "vaw" else source)  # VAW annotates Visual Genome
  kind = f"{type_}/{prop}/{source}/{'/'.join(parts)}"
  items = []
  known: dict[str, pathlib.Path] = {}
  for where, entry in annotations.entries(annotations.read_json(path), path):
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
      raise ValueError(f"{where} is no [picture, {{'POS', 'NEG'}}]. {_GET_VL_CHECKLIST}")
    true, false = (annotations.texts(entry[1], side, where)[:1] for side in ("POS", "NEG"))
    image = known.setdefault(entry[0], images / entry[0])
    items.append(Item(image, true, false, kind))
  return items


def sugarcrepe_results(items: Sequence[Item], verdicts: Verdicts) -> Results:
  """Each file; `add`, `replace`, `swap`: the means of theirs; `average`: of all seven."""
  scores = composition.by_kind([item.kind for item in items], verdicts)
  results = _each(scores)
  for change in ("add", "replace", "swap"):
    own = [name for name in SUGARCREPE if name.startswith(change)]
    results |= _mean(change, results, own)
  return results | _mean("average", results, SUGARCREPE)


def valse_results(items: Sequence[Item], verdicts: Verdicts) -> Results:
  """Each piece, and `average`: the mean of the eleven."""
  results = _each(composition.by_kind([item.kind for item in items], verdicts))
  return results | _mean("average", results, VALSE)


def vl_checklist_results(items: Sequence[Item], verdicts: Verdicts) -> Results:
  """`type/property`, each type, `average` of the three types, and `files` evaluated.

  A property is the mean over its sources of the means over their files (the project's radar.py), a
  type the mean of its properties.
  """
  scores = composition.by_kind([item.kind for item in items], verdicts)
  files: dict[str, dict[str, list[float]]] = {}
  for kind, score in scores.items():
    type_, prop, source, _ = kind.split("/", 3)
    own = files.setdefault(f"{type_}/{prop}", {}).setdefault(source, [])
    if score.examples:
      own.append(score.accuracy)
  results: Results = {}
  for name, sources in files.items():
    if all(sources.values()):
      results[name] = sum(sum(own) / len(own) for own in sources.values()) / len(sources)
  for type_, properties in VL_CHECKLIST.items():
    results |= _mean(type_, results, [f"{type_}/{name}" for name in properties])
  return results | _mean("average", results, VL_CHECKLIST) | {"files": len(scores)}


def _each(scores: Mapping[str, Score]) -> Results:
  """The accuracy of each kind that has examples, and how many."""
  results: Results = {}
  for kind, score in scores.items():
    if score.examples:
      results[kind] = score.accuracy
    results[f"{kind}/examples"] = score.examples
  return results


def _mean(name: str, results: Results, members: Iterable[str]) -> Results:
  """{name: mean of the members}, or nothing where one of them is missing."""
  values = [results.get(member) for member in members]
  found = [value for value in values if value is not None]
  return {name: sum(found) / len(found)} if len(found) == len(values) else {}


def _sugarcrepe(options: Options, what: str) -> list[Item]:
  items: list[Item] = []
  for name in SUGARCREPE:
    path = find(options, "sugarcrepe", f"{name}.json", what=what, how=_GET_SUGARCREPE)
    own = read_sugarcrepe(path, path.parents[1] / "coco" / "val2017")
    items += own[: options.limit or None]
  return items


def _valse(options: Options, what: str) -> list[Item]:
  items: list[Item] = []
  for name in VALSE:
    path = find(options, "valse", f"{name}.json", what=what, how=_GET_VALSE)
    items += read_valse(path, path.parents[1])[: options.limit or None]
  return items


def _vl_checklist(options: Options, what: str) -> list[Item]:
  data = find(options, "vl_checklist", "data", what=what, how=_GET_VL_CHECKLIST)
  found: dict[str, None] = {}
  items: list[Item] = []
  paths = sorted(path for part in VL_CHECKLIST for path in data.glob(f"{part.title()}/**/*.json"))
  for path in paths:
    own = read_vl_checklist(path, data, data.parents[1])[: options.limit or None]
    found |= dict.fromkeys("/".join(item.kind.split("/")[:2]) for item in own)
    items += own
  missing = [f"{t}/{p}" for t, names in VL_CHECKLIST.items() for p in names]
  missing = [name for name in missing if name not in found]
  if missing:
    raise ValueError(f"{what}: {data} has nothing of {', '.join(missing)}. {_GET_VL_CHECKLIST}")
  return items


def _limited(read: Callable[[Options, str], list[Item]]) -> Callable[[Options, str], list[Item]]:
  return lambda options, what: read(options, what)[: options.limit or None]


SETS: dict[str, Set] = {
  "sugarcrepe": Set(_sugarcrepe, sugarcrepe_results, annotations.GET_COCO),
  "aro_relation": Set(_limited(aro.read_relation), aro.relation_results, aro.GET),
  "aro_attribution": Set(_limited(aro.read_attribution), aro.attribution_results, aro.GET),
  "aro_coco_order": Set(
    _limited(aro.order_reader("coco")), aro.order_results, annotations.GET_COCO
  ),
  "aro_flickr30k_order": Set(
    _limited(aro.order_reader("flickr30k")), aro.order_results, annotations.GET_FLICKR30K
  ),
  "valse": Set(_valse, valse_results, _GET_VALSE_PICTURES),
  "vl_checklist": Set(_vl_checklist, vl_checklist_results, _GET_VL_PICTURES),
}
