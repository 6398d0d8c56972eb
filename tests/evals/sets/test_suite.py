"""Names of evaluations, what they read, and the zero-shot average beside composition."""

import json

import pytest

from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import classification, suite


def test_names_and_groups_become_sets_each_once():
  found = suite.parse(["zero_shot:food101", "zero_shot:paper", "composition:aro", "retrieval:mine"])
  names = [f"{spec.family}:{spec.name}" for spec in found]
  assert names[0] == "zero_shot:food101" and len(names) == 11 + 4 + 1 == len(set(names))
  assert names[-1] == "retrieval:mine"  # a folder of one's own
  assert names[-2].startswith("composition:aro_")


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("zeroshot:food101", "zeroshot:food101' is unknown. Families: zero_shot, retrieval"),
    ("composition:sugarcrep", "Sets of composition: composition:sugarcrepe"),
    ("waterbirds", "'waterbirds' is unknown. Sets of waterbirds: waterbirds:val"),
  ],
)
def test_unknown_names_are_one_line_with_the_nearest(name, words):
  with pytest.raises(ValueError, match=words) as caught:
    suite.parse([name])
  assert "\n" not in str(caught.value)


class Fake:
  """A family that knows any set but those said to be missing."""

  def __init__(self, missing=()):
    self.SETS, self.missing, self.ran = {}, missing, []

  def check(self, name, options):
    if name in self.missing:
      raise ValueError(f"{name} is not here")

  def run(self, encoders, name, options):
    self.ran.append(name)
    return {f"zero_shot/{name}/top1": 0.5}


@pytest.mark.parametrize("missing", [(), ("dtd", "cub200")])
def test_composition_is_never_without_the_zero_shot_average(monkeypatch, missing):
  zero_shot, composition = Fake(missing), Fake()
  monkeypatch.setattr(suite, "FAMILIES", {"zero_shot": zero_shot, "composition": composition})
  monkeypatch.setattr(suite.classification, "check", zero_shot.check)
  lines = []
  specs = [suite.Spec("zero_shot", "food101"), suite.Spec("composition", "sugarcrepe")]
  results = suite.run(specs, None, Options(warn=lines.append))
  assert composition.ran == ["sugarcrepe"]
  assert sorted(zero_shot.ran) == sorted(set(classification.PAPER) - set(missing))
  assert zero_shot.ran.count("food101") == 1
  assert ("zero_shot/average11/top1" in results) == (not missing)
  assert bool(lines) == bool(missing)
  if missing:
    assert "2 of 11 sets are not at hand: dtd, cub200" in lines[0]


def test_a_trial_says_so_and_its_figures_stand_beside_no_other_count(monkeypatch):
  """Results of one step add up; those of other pictures of the same set do not."""

  class Counted(Fake):
    def run(self, encoders, name, options):
      head = options.protocols[0]
      rows = {"examples": options.limit or 50, "rows": options.limit or 50}
      return {f"zero_shot/{name}/{head}/top1": 0.5} | {
        f"zero_shot/{name}/{key}": value for key, value in rows.items()
      }

  monkeypatch.setattr(suite, "FAMILIES", {"zero_shot": Counted()})
  specs = [suite.Spec("zero_shot", name) for name in classification.PAPER]
  trial = suite.run(specs, None, Options(limit=10, protocols=("name",)))
  assert trial["zero_shot/dtd/limit"] == trial["zero_shot/average11/limit"] == 10
  whole = suite.run(specs[:1], None, Options(protocols=("templates",)))
  merged = suite.merge({"retrieval/pairs": 3, **trial}, whole)
  assert merged["retrieval/pairs"] == 3 and merged["zero_shot/cifar10/rows"] == 50
  assert "zero_shot/cifar10/name/top1" not in merged and "zero_shot/cifar10/limit" not in merged
  assert merged["zero_shot/dtd/name/top1"] == 0.5 and merged["zero_shot/dtd/limit"] == 10
  assert not any(name.startswith("zero_shot/average11") for name in merged)
  more = suite.merge(whole, suite.run(specs[:1], None, Options(protocols=("name",))))
  assert {f"zero_shot/cifar10/{head}/top1" for head in ("name", "templates")} < more.keys()
  ten = suite.run(specs[1:], None, Options(protocols=("templates",)))
  assert suite.merge(whole, ten)["zero_shot/average11/templates/top1"] == 0.5


def test_without_composition_nothing_else_is_evaluated(monkeypatch):
  zero_shot = Fake()
  monkeypatch.setattr(suite, "FAMILIES", {"zero_shot": zero_shot})
  suite.run([suite.Spec("zero_shot", "dtd")], None, Options())
  assert zero_shot.ran == ["dtd"]


def test_a_missing_set_is_said_before_anything_is_encoded(tmp_path):
  with pytest.raises(ValueError, match="composition:sugarcrepe") as caught:
    suite.check(suite.parse(["composition:sugarcrepe"]), Options(root=tmp_path))
  assert "github.com/RAIVNLab/sugar-crepe" in str(caught.value) and "\n" not in str(caught.value)


SUGAR = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
REGION = {"description": "a dog", "box": [0, 0, 1, 1], "negatives": ["a cat"]}
INSTANCES = {
  "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 8}],
  "annotations": [{"image_id": 1, "category_id": 2, "bbox": [0, 0, 4, 4]}],
  "categories": [{"id": 2, "name": "dog"}],
}
ITEM = [{"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}]
# Evaluations, a file of each, and what it holds.
READ = {
  "zero_shot:mine": ("mine/dog/1.png", ""),
  "retrieval:mine": ("mine/captions.jsonl", json.dumps({"image": "1.jpg", "caption": "a dog"})),
  "grounding:mine": ("mine/regions.jsonl", json.dumps({"image": "1.jpg", "regions": [REGION]})),
  "fine_grained:mine": ("mine/regions.jsonl", json.dumps({"image": "1.jpg", "regions": [REGION]})),
  "detection:mine": ("mine/instances.json", json.dumps(INSTANCES)),
  "region_classification:mine": ("mine/instances.json", json.dumps(INSTANCES)),
  "composition:sugarcrepe": ("sugarcrepe/add_att.json", json.dumps(ITEM)),
  "segmentation:voc2012": ("voc2012/ImageSets/Segmentation/val.txt", "1\n"),
  "grouping:voc2012": ("voc2012/ImageSets/Segmentation/val.txt", "1\n"),
  "waterbirds:val": ("waterbirds/metadata.csv", "img_filename,y,place,split\n1.jpg,0,1,1\n"),
}


def test_processes_can_tell_whether_they_read_the_same(tmp_path):
  """Wherever the sets lie; another name, text or box of a set shows in that set alone."""
  assert {name.partition(":")[0] for name in READ} == suite.FAMILIES.keys()
  specs = suite.parse(list(READ))

  def describe(root, **changes):
    for name in SUGAR:
      (root / "sugarcrepe").mkdir(parents=True, exist_ok=True)
      (root / "sugarcrepe" / f"{name}.json").write_text("[]")
    for path, text in READ.values():
      file = root / changes.get(path, path)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(changes.get("text", {}).get(path, text))
    return suite.describe_contents(specs, Options(root=root, warn=pytest.fail))

  want = describe(tmp_path / "a")
  assert list(want) == list(READ) and describe(tmp_path / "b" / "c") == want
  assert want["zero_shot:mine"].startswith("1 items, digest ")
  for i, (changed, old, new) in enumerate(
    (
      ("mine/captions.jsonl", "a dog", "a cat"),
      ("mine/regions.jsonl", "1]", "0.9]"),
      ("mine/instances.json", "4, 4", "4, 5"),
      ("sugarcrepe/add_att.json", "1.jpg", "2.jpg"),
      ("voc2012/ImageSets/Segmentation/val.txt", "1", "2"),
      ("waterbirds/metadata.csv", "0,1,1", "1,1,1"),
    )
  ):
    text = dict(READ.values())[changed].replace(old, new)
    found = describe(tmp_path / f"changed{i}", text={changed: text})
    differ = {name for name in READ if found[name] != want[name]}
    assert differ == {name for name, (path, _) in READ.items() if path == changed}, changed
  found = describe(tmp_path / "named", **{"mine/dog/1.png": "mine/dog/2.png"})
  assert [name for name in READ if found[name] != want[name]] == ["zero_shot:mine"]
