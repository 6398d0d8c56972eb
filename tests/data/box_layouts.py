"""Small sets with boxes in their published layouts: images of 40 x 20 and files of annotations."""

import json

import numpy as np
import toy_data

from grain_jax.data import build, dataset
from grain_jax.data.building import flags as build_flags

WIDTH, HEIGHT = 40, 20


def image(root, name):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  seed = sum(map(ord, name))
  path.write_bytes(toy_data.jpeg(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3))))


def write(root, name, content):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return path


def lines(*entries):
  return "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries)


def size(**more):
  return {"width": WIDTH, "height": HEIGHT, **more}


def coco(root):
  """train2017 of two images and val2017 of one, with captions and instances."""
  images = {
    "train2017": [size(id=n, file_name=f"{n:012d}.jpg") for n in (9, 25)],
    "val2017": [size(id=139, file_name="000000000139.jpg")],
  }
  categories = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 10, "name": "traffic light", "supercategory": "outdoor"},
  ]
  captions = {
    "train2017": [(9, "A meal.\n"), (25, " A giraffe "), (9, "Lunch"), (77, "of no image")],
    "val2017": [(139, "A room")],
  }
  boxes = {
    "train2017": [
      (9, 10, [10, 5, 20, 10], 0),
      (9, 1, [0, 0, 40, 20], 1),
      (9, 99, [0, 0, 4, 4], 0),
      (25, 1, [4, 2, 8.5, 4.25], 0),
      (25, 1, [30, 2, -8, 4], 0),
      (25, 1, [30, 2, 80, 4], 0),
      (25, 1, [float("nan"), 2, 8, 4], 0),
      (25, 1, [1, 2, 3], 0),
    ],
    "val2017": [],
  }
  for split, several in images.items():
    for entry in several:
      image(root, f"{split}/{entry['file_name']}")
    said = [{"id": i, "image_id": n, "caption": c} for i, (n, c) in enumerate(captions[split])]
    content = {"info": {}, "images": several, "licenses": [], "annotations": said}
    write(root, f"annotations/captions_{split}.json", content)
    said = [
      {"id": i, "image_id": n, "category_id": c, "bbox": b, "iscrowd": k, "area": 1.5}
      | {"segmentation": {"counts": [1, 2], "size": [20, 40]} if k else [[1.5, 2, 3, 4, 5, 6]]}
      for i, (n, c, b, k) in enumerate(boxes[split])
    ]
    content = {"annotations": said, "categories": categories, "images": several}
    write(root, f"annotations/instances_{split}.json", content)


def visual_genome(root):
  """Two images in two folders; the key "id" of the first, "image_id" of the second."""
  url = "https://cs.stanford.edu/people/rak248"
  data = [
    size(image_id=1, url=f"{url}/VG_100K_2/1.jpg", coco_id=None, flickr_id=None),
    size(image_id=2, url=f"{url}/VG_100K/2.jpg", coco_id=9, flickr_id=3),
  ]
  image(root, "VG_100K_2/1.jpg")
  image(root, "VG_100K/2.jpg")
  write(root, "image_data.json", data)

  def region(number, of, phrase, x, y, width, height):
    box = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": number, "image_id": of, "phrase": phrase, "synsets": [], **box}

  regions = [
    {
      "regions": [
        region(1, 1, "the clock is green ", 10, 5, 20, 10),
        region(2, 1, "", 0, 0, 4, 4),
        region(3, 1, "shade is along the street", 0, 0, 41, 20),
        region(4, 1, "a line", 0, 0, 0, 4),
        region(5, 1, "far outside", 60, 0, 4, 4),
      ],
      "id": 1,
    },
    {"regions": [region(6, None, "a 1 px dot", 39, 19, 1, 1)], "image_id": 2},
    {"regions": [region(7, 3, "of no image", 0, 0, 4, 4)], "id": 3},
  ]
  write(root, "region_descriptions.json", regions)


def mdetr(root):
  """RefCOCO with two expressions of an image, Flickr30k with two sentences of one."""
  name = "COCO_train2014_000000581857.jpg"
  image(root, f"train2014/{name}")
  expressions = ["the lady with the blue shirt", "lady back left"]
  images = [
    size(id=i, file_name=name, original_id=581857, caption=text, dataset_name="refcoco")
    for i, text in enumerate(expressions)
  ]
  boxes = [
    {"id": i, "image_id": i, "bbox": [10, 5, 20, 10], "iscrowd": 0, "category_id": 1, "area": 1}
    | {"tokens_positive": [[0, len(text)]]}
    for i, text in enumerate(expressions)
  ]
  categories = [{"id": 1, "name": "object"}]
  content = {"images": images, "annotations": boxes, "categories": categories}
  write(root, "finetune_refcoco_train.json", content)
  image(root, "flickr30k-images/1000092795.jpg")
  sentences = ["Two young guys with shaggy hair", "A café, deux 😀 amis"]
  images = [
    size(id=i, file_name="1000092795.jpg", caption=text, original_img_id=1, sentence_id=i)
    for i, text in enumerate(sentences)
  ]
  given = [
    (0, [4, 2, 8, 4], [[0, 3], [4, 9], [10, 14]]),
    (0, [20, 2, 8, 4], [[0, 14]]),
    (0, [0, 0, 40, 20], [[20, 26], [0, 3]]),
    (1, [0, 0, 20, 20], [[13, 19]]),
    (1, [0, 0, 20, 20], [[13, 20]]),
    (1, [0, 0, 20, 20], [[-3, 2]]),
    (1, [0, 0, 20, 20], []),
    (7, [0, 0, 20, 20], [[0, 1]]),
  ]
  boxes = [
    {"id": i, "image_id": n, "bbox": b, "tokens_positive": s, "iscrowd": 0, "category_id": 1}
    for i, (n, b, s) in enumerate(given)
  ]
  content = {"annotations": boxes, "images": images, "categories": categories}
  write(root, "final_flickr_separateGT_val.json", content)


def odvg(root):
  """Grounding lines with one box and several, and detection lines."""
  for name in ("a.jpg", "b.jpg"):
    image(root, name)
  grounding = {
    "caption": "a dog and two cats",
    "regions": [
      {"phrase": "a dog", "bbox": [10, 5, 30, 15], "tokens_positive": [[0, 5]]},
      {"phrase": "two cats", "bbox": [[0, 0, 4, 2], [4, 2, 8, 4]], "tokens_positive": [[10, 18]]},
      {"bbox": [0, 0, 40, 20], "tokens_positive": [[10, 13], [2, 5]]},
      {"bbox": [0, 0, 40, 20], "tokens_positive": [[10, 30]]},
      {"bbox": [0, 0, 40, 20]},
      {"phrase": "inverted", "bbox": [30, 5, 10, 15]},
      5,
    ],
  }
  again = {"caption": "pets", "regions": []}
  text = lines(
    size(filename="a.jpg", grounding=grounding),
    "{not json",
    size(filename="a.jpg", grounding=again),
    size(grounding=again),
  )
  write(root, "flickr_train_vg.json", text)
  instances = [
    {"bbox": [10, 5, 30, 15], "label": 0, "category": "person"},
    {"bbox": [0, 0, 40, 20], "label": 1},
    {"bbox": [0, 0, 40, 20], "label": 7},
  ]
  entry = size(filename="b.jpg", detection={"instances": instances})
  write(root, "annotations/o365_train_od.json", lines(entry))
  write(root, "labels.json", {"0": "person", "1": "traffic light"})


def lvis(root):
  """train with an image, val with one that lies in train2017; no file names."""
  address = "http://images.cocodataset.org"
  categories = [
    {"id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "synonyms": ["spray_can"]}
    | {"def": "a dispenser that holds a substance under pressure", "frequency": "c"},
    {"id": 2, "name": "bow_(weapon)", "def": "a weapon for shooting arrows", "frequency": "r"},
  ]
  for split, number in (("train", 9), ("val", 25)):
    image(root, f"train2017/{number:012d}.jpg")
    entry = size(id=number, coco_url=f"{address}/train2017/{number:012d}.jpg")
    entry |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    boxes = [
      {"id": 1, "image_id": number, "category_id": c, "bbox": b, "area": 2.0, "segmentation": [[]]}
      for c, b in ((1, [10, 5, 20, 10]), (2, [0.5, 0.25, 4, 2]))
    ]
    content = {"images": [entry], "annotations": boxes, "categories": categories}
    write(root, f"lvis_v1_{split}.json", content)


def objects365(root):
  """v2: train in patches, one image among those known to be missing."""
  names = [
    "images/v1/patch8/objects365_v1_00420917.jpg",
    "images/v2/patch16/objects365_v2_00908726.jpg",
  ]
  image(root, "train/patch8/objects365_v1_00420917.jpg")
  images = [size(id=i, file_name=name, license=5, url="") for i, name in enumerate(names)]
  boxes = [
    {"id": 1, "image_id": 0, "category_id": 2, "bbox": [10, 5, 20, 10], "iscrowd": 0},
    {"id": 2, "image_id": 0, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
    {"id": 3, "image_id": 0, "category_id": 1, "bbox": [0, 0, 4, 2], "iscrowd": 0},
    {"id": 4, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 2], "iscrowd": 0},
  ]
  categories = [{"id": 1, "name": "Person"}, {"id": 2, "name": "Sneakers"}]
  content = {"images": images, "annotations": boxes, "categories": categories}
  write(root, "annotations/zhiyuan_objv2_train.json", content)


def open_images(root):
  """train and validation; rows of one image apart; XMin,XMax,YMin,YMax."""
  image(root, "train/000002b66c9c498e.jpg")
  image(root, "train/00000b4dcff7f799.jpg")
  image(root, "validation/0001eeaf4aed83f9.jpg")
  header = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
    "IsDepiction,IsInside\n"
  )
  rows = [
    "000002b66c9c498e,xclick,/m/01g317,1,0.012500,0.195312,0.148438,0.587500,0,1,0,0,0",
    "000002b66c9c498e,xclick,/m/01g317,1,0.5,1,0.25,0.75,0,1,1,0,0",
    "00000b4dcff7f799,activemil,/m/0284d,1,0.25,0.5,0.125,1,-1,-1,-1,-1,-1",
    "000002b66c9c498e,xclick,/m/0284d,1,0,0.25,0,0.5,0,0,0,1,0",
    "00000b4dcff7f799,xclick,/m/none,1,0,0.25,0,0.5,0,0,0,0,0",
    "00000b4dcff7f799,xclick,/m/0284d,1,0.5,0.25,0,0.5,0,0,0,0,0",
    "00000b4dcff7f799,xclick,/m/0284d,1,0.5,nan,0,0.5,0,0,0,0,0",
  ]
  write(root, "oidv6-train-annotations-bbox.csv", header + "\n".join(rows) + "\n")
  row = "0001eeaf4aed83f9,xclick,/m/0284d,1,0.0,0.5,0.25,0.75,0,0,0,0,0\n"
  write(root, "validation-annotations-bbox.csv", header + row)
  write(root, "class-descriptions-boxable.csv", '/m/01g317,Person\n/m/0284d,"Cat, big"\n')


ALL = {
  f.__name__: f for f in (coco, visual_genome, mdetr, odvg, lvis, objects365, open_images)
}  # fmt: skip


def built(kind, root, out, *flags, workers=0):
  """The dataset of a folder, built as the command builds it."""
  arguments = [f"--source={kind}", f"--input={root}", f"--out={out}", *flags]
  source = build_flags.source(build_flags.parse(arguments, description=""))
  build.build(source, out, workers=workers, allow_dropped=1, say=toy_data.quiet)
  return dataset.open_dataset(out)


def content(opened):
  """{split: {key: (captions, [(description, box)])}}, boxes in float32."""
  found = {}
  for split in opened.manifest["splits"]:
    for index in range(opened.num_records(split)):
      r = opened.parse(split, index)
      texts = [text.decode() for text in r.descriptions]
      regions = list(zip(texts, map(tuple, r.boxes.tolist()), strict=True))
      captions = [text.decode() for text in r.captions]
      found.setdefault(split, {})[r.key.decode()] = (captions, regions)
  return found


def box(ymin, xmin, ymax, xmax):
  """As a shard holds it."""
  return tuple(np.array([ymin, xmin, ymax, xmax], np.float32).tolist())


def dropped(opened):
  """{(kind, reason): how many}."""
  reasons = opened.manifest["kept_and_dropped"]
  return {(kind, why): n for kind in reasons for why, n in reasons[kind]["reasons"].items()}
