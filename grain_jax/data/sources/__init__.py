"""What people have, as records: one reader a file, and the table of them.

A reader's module has `FLAGS`, what `grain_jax.data.build` asks for it, and `source(...)`, which
takes them by name and gives a `base.Source`. Its docstring says what it reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from grain_jax.data.sources import base

# --source=KIND -> what it reads, in a few words; the module has the kind's name.
KINDS: dict[str, str] = {
  "scenes": "the embedded images",
  "folder": "a folder of one's own images with a file of annotations",
  "published": "the annotation files published with GRAIN",
  "webdataset": "tars of images with texts, as img2dataset writes them; GRIT's lists of boxes",
  "parquet": "Parquet files that hold images and texts, as hubs deliver them",
  "grit": "GRIT's Parquet files of boxes and phrases, over images on the disk",
  "finehard": "FineHARD's JSON files of boxes, descriptions and false ones, over its images",
  "dreamlip": "DreamLIP's CSV files of long captions, over images that img2dataset downloaded",
  "neg_clip": "NegCLIP's TSV files of captions and false ones, over COCO's images",
  "ce_clip": "CE-CLIP's generated false captions, over COCO's images",
  "tfds": "a dataset prepared by TensorFlow Datasets",
  "visual_genome": "Visual Genome's region descriptions",
  "coco": "COCO's captions and instances",
  "mdetr": "MDETR's and GLIP's files: RefCOCO, RefCOCO+, RefCOCOg, Flickr30k Entities, GoldG",
  "odvg": "lines of grounding or detection, of MM-GDINO and LLMDet",
  "lvis": "LVIS, with its definitions or names as descriptions",
  "objects365": "Objects365, v1 or v2",
  "open_images": "Open Images' boxes",
}


def module(kind: str) -> ModuleType:
  """The module of a kind, with `FLAGS` and `source`."""
  return importlib.import_module(f"{__name__}.{kind}")


def make(recipe: Mapping[str, Any]) -> base.Source:
  """A source once more, in another process.

  Args:
    recipe: `Source.recipe` of the first one.
  """
  from grain_jax.data.sources import options

  made = module(recipe["kind"]).source(**recipe["arguments"])
  return options.apply(made, recipe.get("options", {}))
