"""docs/data.md: every build command as printed, on made-up files."""

import json
import pathlib
import re
import shlex

import box_layouts

from grain_jax.data import build, dataset, sources

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "data.md"


def commands():
  page = PAGE.read_text().split("\n## Sets with boxes\n")[1]
  blocks = re.findall(r"```console\n(.*?)```", page, re.S)
  return [line for block in blocks for line in block.strip().splitlines()]


def test_every_command_of_the_page(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for kind, layout in box_layouts.ALL.items():
    layout(pathlib.Path({"lvis": "coco", "mdetr": "grounding"}.get(kind, kind)))
  sentences = {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "cocoid": 9}
  sentences |= {"split": "test", "sentences": [{"raw": "A meal."}]}
  box_layouts.write(pathlib.Path("karpathy"), "dataset_coco.json", {"images": [sentences]})
  for command in commands():
    program, *arguments = shlex.split(command.removeprefix("python -m "))
    assert program == "grain_jax.data.build"
    # Of made-up files, with a fault of each kind, more is dropped than of the published ones.
    assert build.main([*arguments, "--workers=0", "--allow_dropped=1"]) == 0, capsys.readouterr()
    out = next(a.partition("=")[2] for a in arguments if a.startswith("--out="))
    opened = dataset.open_dataset(out)
    assert sum(opened.num_records(split) for split in opened.manifest["splits"]) >= 1
    assert json.loads((pathlib.Path(out) / "manifest.json").read_text())["splits"]


def test_the_page_has_every_set_with_boxes():
  page = PAGE.read_text().split("\n## Sets with boxes\n")[1]
  run = {re.search(r"--source=(\w+)", command)[1] for command in commands()}
  assert run == set(box_layouts.ALL) <= set(sources.KINDS)
  assert all(f"| `{kind}` |" in page for kind in box_layouts.ALL)
