"""`python -m grain_jax.annotate ground` from flags to a built dataset; what is told before."""

import json

import pytest
import safetensors.numpy
import tiny_detectors
import toy_data

from grain_jax.annotate import __main__ as command
from grain_jax.annotate import ground, report
from grain_jax.data import build, dataset, sources
from grain_jax.data.building import flags as build_flags


def write_described(folder, lines):
  """What `annotate describe` leaves."""
  (folder / "annotations").mkdir(parents=True)
  with (folder / "annotations" / "000000.jsonl").open("w") as file:
    file.writelines(json.dumps(line) + "\n" for line in lines)
  (folder / "manifest.json").write_text('{"stage": "describe"}')


@pytest.fixture
def pictures(tmp_path):
  """Toy pictures, each with two descriptions, the first with a region of its own."""
  root = tmp_path / "in"
  root.mkdir()
  lines, known = [], []
  for i in range(5):
    record = toy_data.record(i, regions=2)
    (root / f"{i}.jpg").write_bytes(record["image"])
    own = [{"description": "white", "box": [0, 0, 1, 1]}] if i == 0 else []
    lines.append({"image": f"{i}.jpg", "captions": ["boxes"], "regions": own})
    known.append({"key": f"{i}.jpg", "descriptions": ["a red box", "the green box on the right"]})
  (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  write_described(tmp_path / "described", known)
  return tmp_path


def run(tmp_path, *flags, **changes):
  values = {"source": "folder", "input": tmp_path / "in", "annotated": tmp_path / "described",
            "out": tmp_path / "out", "ray_address": "none", "device": "cpu", **changes}  # fmt: skip
  given = [f"--{name}={value}" for name, value in values.items() if value is not None]
  return command.main(["ground", *given, *flags])


@pytest.mark.parametrize("kind", tiny_detectors.KINDS)
def test_from_descriptions_to_shards(pictures, kind, capsys):
  model = tiny_detectors.KINDS[kind](pictures / "model")
  flags = ["--threshold=0", "--top_k=2", "--box_nms=1", "--batch_size=2"]
  assert run(pictures, *flags, model=model) == 0
  out = capsys.readouterr().out
  manifest = json.loads((pictures / "out" / "manifest.json").read_text())
  assert manifest["counts"]["descriptions"] == 10 and manifest["counts"]["failed"] == 0
  assert manifest["counts"]["regions"] == 5 * 2 * 2 + 1 and "21" in out
  assert manifest["totals"]["descriptions"] == manifest["totals"]["descriptions_with_box"] == 10
  lines = (pictures / "out" / "annotations" / "000000.jsonl").read_text().splitlines()
  first = json.loads(lines[0])
  assert first["descriptions"] == ["a red box", "the green box on the right"]
  assert [r["description"] for r in first["regions"]] == [
    "white", *["a red box"] * 2, *["the green box on the right"] * 2,
  ]  # fmt: skip
  arguments = ["--source=folder", f"--input={pictures / 'in'}", f"--out={pictures / 'built'}",
               f"--annotated={pictures / 'out'}"]  # fmt: skip
  assert not build.main(arguments)
  page = pictures / "report.html"
  arguments = ["--source=folder", f"--input={pictures / 'in'}", f"--out={page}"]
  assert report.main([*arguments, f"--annotated={pictures / 'out'}"]) == 0
  assert "<b>4.20</b>boxes an image" in page.read_text()
  parsed = dataset.open_dataset(pictures / "built").parse("train", 0)
  assert len(parsed.descriptions) == len(parsed.boxes) == (5 if parsed.key == b"0.jpg" else 4)


def test_what_cannot_be_is_told_in_one_line_before_anything(pictures, tmp_path, capsys):
  model = tiny_detectors.owlv2(tmp_path / "model")

  def told(*flags, **changes):
    try:
      code = run(pictures, *flags, **{"model": model, **changes})
    except SystemExit as end:
      code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists(), error
    return error

  assert "--model = " in told(model=tmp_path / "none")
  (tmp_path / "empty").mkdir()
  assert "lacks config.json and preprocessor_config.json" in told(model=tmp_path / "empty")
  assert "no descriptions to look for" in told(annotated=None)
  assert "--threshold = 1.5: not in [0, 1]" in told("--threshold=1.5")
  assert "--threshold = nan: not in [0, 1]" in told("--threshold=nan")
  assert "--top_k = 0: give 1 or more" in told("--top_k=0")
  assert "required" in told(model=None)
  config = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
  assert "model_type 'clip', which is no detector" in told()
  (model / "config.json").write_text("[]")
  assert "model_type None" in told()


def test_weights_that_cannot_be_read_are_told_in_one_line(pictures, tmp_path, capsys):
  model = tiny_detectors.owlv2(tmp_path / "model")
  (model / "model.safetensors").write_bytes(b"\x00" * 99)
  assert run(pictures, model=model) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "cannot be loaded" in error and "Fetch it again" in error
  arrays = safetensors.numpy.load_file(tiny_detectors.owlv2(model) / "model.safetensors")
  del arrays["box_head.dense0.weight"]
  safetensors.numpy.save_file(arrays, model / "model.safetensors", {"format": "pt"})
  assert run(pictures, model=model, out=tmp_path / "third") == 2
  assert "lack 1 arrays of Owlv2ForObjectDetection, box_head.dense0.w" in capsys.readouterr().err
  preprocessor = json.loads((model / "preprocessor_config.json").read_text())
  tiny_detectors.owlv2(model)
  (model / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "do_center_crop": 1}))
  assert run(pictures, model=model, out=tmp_path / "other") == 2
  assert "do_center_crop" in capsys.readouterr().err


def test_other_weights_are_another_annotation(pictures, tmp_path, capsys):
  model = tiny_detectors.owlv2(tmp_path / "model")
  assert run(pictures, model=model) == 0
  tiny_detectors.owlv2(model, seed=1)
  assert run(pictures, model=model) == 2
  assert "another settings" in capsys.readouterr().err


def test_a_gpu_is_asked_for_unless_the_cpu_is():
  values = {flag.name: flag.default for flag in ground.FLAGS}
  assert ground.Ground({**values, "device": "auto"}).num_gpus == 1
  assert ground.Ground({**values, "device": "cpu"}).num_gpus == 0


def test_no_flag_is_that_of_a_source():
  own = {flag.name for flag in ground.FLAGS}
  for kind in sources.KINDS:
    assert not own & {flag.name for flag in build_flags.of_source(kind)}, kind
