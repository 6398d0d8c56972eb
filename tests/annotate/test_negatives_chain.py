"""annotate negatives over the embedded scenes, the build that adds them, a run that reads them."""

import collections
import json

import pytest
import tiny_language

from grain_jax import schema
from grain_jax.annotate import __main__ as command
from grain_jax.data import build, dataset, pipeline
from grain_jax.training import loop


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  tiny_language.make_tagger(root / "tagger")
  tiny_language.make_masked(root / "masked")
  return {"spacy": str(root / "tagger"), "model": str(root / "masked")}


SCENES = ["--source=scenes", "--train=48", "--val=8", "--objects_per_class=1", "--concepts=16"]


@pytest.mark.slow
def test_from_the_scenes_captions_to_a_run_that_reads_them(folders, tmp_path, capsys):
  out, data = tmp_path / "negatives", tmp_path / "data"
  flags = [f"--spacy={folders['spacy']}", f"--model={folders['model']}"]
  flags += ["--min_probability=0", "--max_similarity=1", "--per_region=3", "--batch_size=5"]
  assert command.main(["negatives", *SCENES, f"--out={out}", "--ray_address=none", *flags]) == 0
  assert "negatives/no_verb" in capsys.readouterr().out
  lines = [
    json.loads(line)
    for path in sorted((out / "annotations").glob("*.jsonl"))
    for line in path.read_text().splitlines()
  ]
  by_key = {line["key"]: line for line in lines}
  assert build.main([*SCENES, f"--out={data}", f"--annotated={out}"]) in (0, None)
  opened = dataset.open_dataset(data)
  has = collections.Counter()
  for i in range(48):
    parsed = opened.parse("train", i)
    line = by_key[parsed.key.decode()]
    assert [(c.decode(), k.decode()) for c, k in parsed.negatives] == [
      (entry["caption"], entry["kind"]) for entry in line["negatives"]
    ]
    assert [[t.decode() for t in texts] for texts in parsed.region_negatives] == [
      region["negatives"] for region in line["regions"]
    ]
    has.update({kind.decode() for _, kind in parsed.negatives})
    has["regions"] += sum(map(bool, parsed.region_negatives))
  assert has["relation"] > 8 and has["attribute"] > 30 and has["object"] > 10
  assert has["regions"] > 40 and not has["action"]  # no verb is said of a scene

  from configs import ce_clip_coco

  c = ce_clip_coco.get_config("runlocal")
  c.data.update(dir=str(data), threads=1)
  c.model.image.update(width=32, depth=1, heads=2)
  c.model.text.update(width=32, depth=1, heads=2)
  c.batch_size, c.steps, c.evals, c.eval_every = 48, 3, (), 0
  c.optimizer.warmup_steps, c.log_every, c.save_every = 1, 1, 3
  c.data.row_length = 160  # all fit
  filled = {}
  for of in ("any", "caption"):
    c.data.negatives_of = of
    batches = pipeline.train_batches(opened, c)
    mask = next(batches)["text_mask"]
    batches.close()
    assert mask.shape == (48, 1 + 4) and mask[:, 0].all()
    filled[of] = mask[:, 1:].sum(0).tolist()
  assert filled["any"] == [has[kind] for kind in schema.NEGATIVE_KINDS]
  # Those of the second caption stand beside it alone.
  assert all(a <= b for a, b in zip(filled["caption"], filled["any"], strict=True))
  assert 30 < sum(filled["caption"]) < sum(filled["any"])
  loop.train(c, str(tmp_path / "run"))
  rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  ranks = [row[name] for row in rows for name in row if name.endswith("rank")]
  assert rows[-1]["step"] == 3 and ranks and all(value > 0 for value in ranks)
