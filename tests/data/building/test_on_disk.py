"""What a build looks up on disk: the same as dictionaries give, and gone when the build ends."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import toy_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grain_jax import failures
from grain_jax.data import build
from grain_jax.data.building import on_disk

KEYS = st.sampled_from(["0.jpg", "1.jpg", "é.jpg", "\ud83d", "", "2.jpg"])
VALUES = st.none() | st.lists(st.text(max_size=3), max_size=3) | st.text(max_size=3)


@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  files=st.lists(st.lists(st.tuples(KEYS, VALUES), max_size=6), max_size=4), same=st.booleans()
)
def test_an_index_finds_what_json_loads_finds(tmp_path, monkeypatch, files, same):
  """Also where all keys have one hash."""
  if same:
    monkeypatch.setattr(on_disk, "_hash", lambda key: 7)
  monkeypatch.setattr(on_disk, "_BATCH", 4)
  paths = []
  for i, pairs in enumerate(files):
    paths.append(tmp_path / f"{i}.json")
    members = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    paths[-1].write_text("{" + members + "}")
  contents = [json.loads(path.read_text()) for path in paths]
  (tmp_path / "members.sqlite").unlink(missing_ok=True)
  index = on_disk.MemberIndex.make(tmp_path, paths)
  for key in ("0.jpg", "1.jpg", "é.jpg", "\ud83d", "", "2.jpg", "none"):
    assert index.find(key) == {i: c[key] for i, c in enumerate(contents) if key in c}
  assert [index.first_key(i) for i in range(len(paths))] == [next(iter(c), None) for c in contents]
  index.close()


def published(folder, count, *, boxes=5):
  """Files of `count` images, all of which are links to one picture."""
  folder.mkdir(parents=True, exist_ok=True)
  picture = toy_data.record(0)["image"]
  (folder / "0.jpg").write_bytes(picture)
  texts, found, described = {}, {}, {}
  lines = ["filepath,title"]
  for i in range(count):
    name = f"./{'/' * (i % 3)}{i}.jpg"
    lines.append(f"{name},a caption of picture {i}")
    texts[name] = f"a longer caption of picture {i}"
    found[name] = [
      {"description": f"thing {i % 7} {b}", "bbox": [0, 0, 96 * (b + 1), 480], "score": b / 9}
      for b in range(boxes)
    ]
    described[name] = [f"thing {i % 7} {b}" for b in range(boxes + 1)]
    if i:
      os.link(folder / "0.jpg", folder / f"{i}.jpg")
  (folder / "captions.csv").write_text("\n".join(lines) + "\n")
  for name, content in (("texts", texts), ("boxes", found), ("described", described)):
    keys = sorted(content, key=lambda key: hash((key, name)))  # in an order of its own
    (folder / f"{name}.json").write_text(json.dumps({key: content[key] for key in keys}))
  return [
    "--source=published", f"--images={folder}", f"--captions={folder / 'captions.csv'}",
    f"--generated={folder / 'texts.json'}", f"--boxes={folder / 'boxes.json'}",
    f"--descriptions={folder / 'described.json'}",
  ]  # fmt: skip


PEAK = """
import resource, sys
from grain_jax.data.sources import base, published
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = sys.argv[1]
names = {"captions": "captions.csv"} | {
  kind: [f"{folder}/{name}.json"]
  for kind, name in (("generated", "texts"), ("boxes", "boxes"), ("descriptions", "described"))
}
source = published.source(folder, **names | {"captions": f"{folder}/captions.csv"})
for _ in base.iterate(source):
  pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tmp_path):
  """From 2,000 images to 40,000 by less than the files grow."""
  grown = []
  for count in (2_000, 40_000):
    folder = tmp_path / str(count)
    published(folder, count)
    done = subprocess.run(
      [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True,
      cwd=pathlib.Path(__file__).parents[3],
    )  # fmt: skip
    grown.append(int(done.stdout.splitlines()[-1]) * 1024)
  size = sum(path.stat().st_size for path in (tmp_path / "40000").glob("*.json"))
  assert size > 20e6 and grown[1] - grown[0] < 16e6, (grown, size)


@pytest.mark.parametrize("failing", [False, True])
def test_the_index_goes_with_the_build(tmp_path, monkeypatch, failing):
  flags = published(tmp_path / "in", 4)
  seen = []
  find = on_disk.MemberIndex.find

  def watched(self, key):
    seen.append(sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("out*/**/*.sqlite")))
    if failing:
      raise ValueError("it broke")
    return find(self, key)

  monkeypatch.setattr(on_disk.MemberIndex, "find", watched)
  assert build.main([*flags, f"--out={tmp_path / 'out'}"]) == 2 * failing
  assert {path.rsplit("/")[-1] for path in seen[-1]} >= {"members.sqlite"}
  assert all("out.part/" in path for path in seen[0])  # beside --out, not on a small /tmp
  assert not list(tmp_path.glob("out*/**/*.sqlite")) and not list(tmp_path.glob("out.part*"))


def test_keys_are_told_apart(tmp_path):
  seen = on_disk.SeenKeys(tmp_path)
  assert [seen.add(key) for key in ("a", "b", "a", "\ud83d", "", "\ud83d")] == [
    True, True, False, True, True, False,
  ]  # fmt: skip
  seen.close()


def test_a_disk_that_is_full_is_one_line(tmp_path):
  seen = on_disk.SeenKeys(tmp_path)
  pages = seen._database.execute("PRAGMA page_count").fetchone()[0]
  seen._database.execute(f"PRAGMA max_page_count = {pages}")
  full = "cannot be written or read: database or disk is full"
  with pytest.raises(failures.TransientError, match=full) as e:
    for i in range(100_000):
      seen.add(str(i))
  assert "\n" not in str(e.value)
