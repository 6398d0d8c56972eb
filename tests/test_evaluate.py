"""Evaluations of a finished run, and encoders over any number of rows."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import grain_jax
from bench import kills
from grain_jax import encoders as encoders_lib
from grain_jax import evaluate, trees
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import run_folder, weights
from grain_jax.data import dataset
from grain_jax.evals import built
from grain_jax.evals.inputs.options import Options
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes


def run(*flags):
  environment = {**os.environ, "XLA_FLAGS": kills.XLA_FLAGS}
  command = [sys.executable, "-m", "grain_jax.evaluate", *flags]
  return subprocess.run(command, cwd=kills.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_gives_the_results_of_the_run(finished_run, tmp_path, monkeypatch):
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    monkeypatch.delenv(name)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  workdir = shutil.copytree(finished_run, tmp_path / "run")
  (workdir / "results.json").unlink()
  done = run(f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert (workdir / "results.json").read_text() == (finished_run / "results.json").read_text()
  assert "unseen/top1" in done.stdout
  assert list((tmp_path / "cache" / "grain_jax" / "jax").iterdir())  # compiled programs are kept


EVERYTHING = (
  "zero_shot,retrieval,grounding,composition,segmentation,detection,region_classification"
)


@pytest.fixture(scope="module")
def pictures(scenes_dir, tmp_path_factory):
  """The single objects as an image folder, one of them broken: DIR/mine/CLASS/N.jpg."""
  root = tmp_path_factory.mktemp("datasets")
  data = dataset.open_dataset(scenes_dir)
  for i in range(data.num_records("objects")):
    record = data.parse("objects", i)
    folder = root / "mine" / data.class_names[record.label].split()[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i}.jpg").write_bytes(record.image if i != 7 else record.image[:99])
  return root


@pytest.fixture(scope="module")
def clip_run(tiny_clip, tmp_path_factory):
  """A CLIP of random weights as an imported folder, which has no data of its own."""
  folder = tmp_path_factory.mktemp("clip") / "run"
  model = grain.build(tiny_clip)
  params = trees.map_with_name(
    lambda name, leaf: np.full(leaf.shape, 0.1, np.float32),
    jax.eval_shape(lambda: initial.init_params(model, tiny_clip)),
  )
  run_folder.write(folder, config=tiny_clip, params=params, source={})
  return folder


@pytest.mark.slow
def test_one_device_eight_and_two_processes_count_every_example_once(
  finished_run, pictures, tmp_path
):
  """Batches of 40, so that the last one is partial in every split."""

  def start(name, devices, *flags):
    environment = {
      **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": kills.XLA_FLAGS
      + f" --xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [
      sys.executable, "-m", "grain_jax.evaluate", f"--workdir={finished_run}",
      f"--out={tmp_path / name}", "--batch_size=40", f"--evals={EVERYTHING},zero_shot:mine",
      f"--datasets={pictures}", "--protocols=templates,name", *flags,
    ]  # fmt: skip
    return subprocess.Popen(
      command, cwd=kills.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True,
    )  # fmt: skip

  address = (f"--coordinator_address=127.0.0.1:{kills.free_port()}", "--num_processes=2")
  started = [
    start("one", 1),
    start("eight", 8),
    *(start("two", 4, *address, f"--process_id={i}") for i in range(2)),
  ]
  said = [process.communicate(timeout=300)[0] for process in started]
  assert [process.returncode for process in started] == [0] * 4, said
  one, eight, two = (
    json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "eight", "two")
  )
  assert one["zero_shot/examples"] == 64 and one["zero_shot/rows"] == 80
  assert one["retrieval/examples"] == 24 and one["retrieval/rows"] == 40
  assert one["zero_shot/mine/examples"] == 63 and one["zero_shot/mine/rows"] == 64
  assert one == eight == two
  assert one["grounding/mean_iou"] == round(one["grounding/mean_iou"], 6)
  assert "1 of 64 pictures cannot be read" in said[0]
  assert "wrote" in said[2] and "wrote" not in said[3]  # the first process alone


@pytest.mark.slow
def test_two_processes_whose_files_differ_end_before_anything_is_encoded(
  clip_run, pictures, tmp_path
):
  """Of a folder that lacks a picture every later one would be taken for the one before it."""
  other = shutil.copytree(pictures, tmp_path / "other")
  next(iter(sorted(other.glob("mine/*/*.jpg")))).unlink()
  address = (f"--coordinator_address=127.0.0.1:{kills.free_port()}", "--num_processes=2")
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": kills.XLA_FLAGS}
  started = [
    subprocess.Popen(
      [
        sys.executable, "-m", "grain_jax.evaluate", f"--checkpoint={clip_run}",
        f"--out={tmp_path / 'out'}", "--evals=zero_shot:mine", f"--datasets={root}",
        "--batch_size=8", *address, f"--process_id={i}",
      ],
      cwd=kills.ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )
    for i, root in enumerate((pictures, other))
  ]  # fmt: skip
  said = [process.communicate(timeout=300)[1] for process in started]
  assert [process.returncode for process in started] == [1, 1], said
  for text in said:
    assert re.search("different evaluations: zero_shot:mine is '64 items, .* '63 items, ", text)
  assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_results_of_one_step_add_up_and_stand_in_the_report(finished_run, tmp_path):
  workdir = shutil.copytree(finished_run, tmp_path / "run")
  before = json.loads((workdir / "results.json").read_text())
  done = run(f"--workdir={workdir}", "--evals=composition")
  assert done.returncode == 0, done.stderr
  after = json.loads((workdir / "results.json").read_text())
  assert before.items() < after.items()
  assert after["composition/examples"] == 24
  page = (workdir / "report.html").read_text()
  assert "Composition" in page and "Retrieval" in page and "loss curves" in page
  assert f"python -m grain_jax.evaluate --workdir={workdir} --evals=composition" in page
  set_name = f"{json.loads((workdir / 'config.json').read_text())['data']['dir']}".split("/")[-1]
  assert f"<td>{set_name}/objects · seen</td>" in page and "the built data" not in page
  assert ">config.json</a>" not in page and '<a href="config.json">' in page


def test_the_page_of_a_run_says_what_made_it(finished_run):
  page = (finished_run / "report.html").read_text()
  facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(?:<a [^>]*>)?(.*?)(?:</a>)?</dd>", page))
  assert facts["steps"] == f"{kills.STEPS} of {kills.STEPS}"
  assert facts["images seen"] == f"{kills.STEPS * 8}, in batches of 8"  # kills.TINY
  assert facts["seed"] == "0" and facts["version"] == f"grain_jax {grain_jax.__version__}"
  assert facts["command"].startswith("python -m grain_jax.main --config=")
  assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", facts["evaluated"])
  assert '<a href="config.json">' in page


def test_an_imported_model_is_no_step_of_a_run(clip_run):
  facts = evaluate.describe(
    evaluate.EvaluatedModel(str(clip_run), *weights.open_checkpoint(clip_run))
  )
  assert not {"steps", "images seen", "seed", "command"} & facts.keys()  # nor is pytest ours
  assert facts["configuration"] == str(clip_run / "config.json")


def test_the_set_of_a_folder_is_called_by_its_name(tiny, tmp_path, monkeypatch):
  (tmp_path / "mine").mkdir()
  monkeypatch.chdir(tmp_path / "mine")
  for folder in ("data/mine/", ".", str(tmp_path / "mine")):
    tiny.data.dir = folder
    assert built.set_names(tiny)["zero_shot"] == "mine/objects"
    assert built.set_names(tiny)["grouping"] == "mine/val"


@pytest.mark.parametrize(
  ("evals", "options", "words"),
  [
    (["food101"], {}, "'food101' is unknown. Choose from zero_shot, retrieval"),
    (["composition:valse"], {}, "valse/existence.json. Get the eleven files of data/"),
    (["grounding:coco"], {}, "grounding:coco needs region queries: this model has no decoder"),
    (["zero_shot"], {}, "--evals=zero_shot read a dataset that grain_jax.data.build wrote"),
    (["zero_shot"], {"protocols": ("best",)}, "protocols: 'best' is unknown. Choose from name"),
    ([], {"root": pathlib.Path("nowhere")}, "--datasets=nowhere: there is no such folder"),
    (
      ["zero_shot:mine"],
      {"protocols": ("regions",)},
      "mine by protocol regions needs region queries",
    ),
  ],
)
def test_what_cannot_be_evaluated_is_one_line(clip_run, pictures, evals, options, words):
  with pytest.raises(ValueError) as caught:
    evaluate.evaluate(clip_run, evals, options=Options(**{"root": pictures, **options}))
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_asked_for_by_name_and_cannot_be_done_is_an_error(scenes_dir, clip_run):
  """On the command line; in Python, and of a run's own, it is left out."""
  config, _ = weights.load(clip_run)
  config.data.dir, config.evals = str(scenes_dir), ("retrieval", "grounding")
  data, said = dataset.open_dataset(scenes_dir), []
  evaluate.check(config, data, say=said.append)
  assert said == [
    "not evaluated: grounding: the model has no region queries (config.method = clip)"
  ]
  with pytest.raises(ValueError, match="--evals: not evaluated: grounding: the model has no"):
    evaluate.check(config, data, required=True)
  done = run(
    f"--checkpoint={clip_run}", "--evals=grounding", f"--data_dir={scenes_dir}"
  )  # fmt: skip
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "ValueError: --evals: not evaluated: grounding" in done.stderr


def test_a_runs_own_outside_sets_and_limit_hold_where_no_flag_is_given(tiny_clip, pictures):
  tiny_clip.datasets, tiny_clip.eval_limit = str(pictures), 7

  def settle(**given):
    said = []
    found = evaluate._with_settings_of_run(Options(**given), tiny_clip, said.append)
    return found.root, found.limit, len(said)

  assert settle() == (pictures, 7, 2)
  assert settle(root=pathlib.Path("."), limit=0) == (pathlib.Path("."), 0, 0)
  assert settle(root=pathlib.Path("."), limit=3) == (pathlib.Path("."), 3, 0)
  tiny_clip.datasets = "/nowhere"
  with pytest.raises(ValueError, match="config.datasets = '/nowhere' of the run: .*--datasets=DIR"):
    settle()


def test_the_evaluations_of_a_run_read_its_sets(clip_run, pictures, tmp_path):
  folder = shutil.copytree(clip_run, tmp_path / "run")
  config = json.loads((folder / "config.json").read_text())
  config |= {"evals": ["zero_shot:mine"], "datasets": str(pictures), "eval_limit": 20}
  (folder / "config.json").write_text(json.dumps(config))
  outcome, evaluated = evaluate.evaluate(folder)
  assert outcome.results["zero_shot/mine/rows"] == outcome.results["zero_shot/mine/limit"] == 20
  assert "the first 20 pictures" in evaluate.describe(evaluated)["a trial"]
  outcome, evaluated = evaluate.evaluate(folder, options=Options(limit=0))
  assert outcome.results["zero_shot/mine/rows"] == 64
  assert "a trial" not in evaluate.describe(evaluated)


def test_wrong_flags_answer_at_once():
  done = run()
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "give either --workdir (a run) or --checkpoint" in done.stderr


def test_the_place_of_results_is_looked_at_before_all_else(clip_run, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate, "evaluate", lambda *args, **options: pytest.fail("evaluated"))
  (tmp_path / "file").write_text("")
  (tmp_path / "results.json").write_text("[1]")
  flag = types.SimpleNamespace(
    workdir=None, checkpoint=str(clip_run), datasets=None, tfds_dir=None, download=False,
    limit=None, protocols=["templates"], descriptors=None, evals=[], data_dir="", step=None,
    batch_size=0,
  )  # fmt: skip
  for out, words in (("file", "File exists"), ("file/x", "Not a directory"), ("", "holds a list")):
    flag.out = str(tmp_path / out)
    with pytest.raises(ValueError, match=words) as caught:
      evaluate._main(flag)
    assert flag.out in str(caught.value) and "\n" not in str(caught.value)


def test_flags_in_the_users_folder(clip_run, pictures, tmp_path, monkeypatch):
  shutil.copytree(clip_run, tmp_path / "run")
  (tmp_path / "sets").symlink_to(pictures)
  (tmp_path / "texts").mkdir()
  names = sorted(path.name for path in (pictures / "mine").iterdir())
  (tmp_path / "texts" / "mine.json").write_text(json.dumps({name: ["round"] for name in names}))
  monkeypatch.setenv("HOME", str(tmp_path))

  def results(home):
    flag = types.SimpleNamespace(
      workdir=None, checkpoint=f"{home}/run", datasets=f"{home}/sets", tfds_dir=None,
      download=False, limit=3, protocols=["descriptors"], descriptors=f"{home}/texts",
      evals=["zero_shot:mine"], data_dir="", step=None, batch_size=0, out=f"{home}/out",
    )  # fmt: skip
    evaluate._main(flag)
    return json.loads((tmp_path / "out" / "results.json").read_text())

  assert results("~") == results(tmp_path)


def test_a_batch_of_less_than_one_is_refused(clip_run):
  with pytest.raises(ValueError, match=r"^batch_size = -1 must be positive, or 0: the run's own"):
    evaluate.evaluate(clip_run, ["zero_shot:mine"], batch_size=-1)
  done = run(f"--checkpoint={clip_run}", "--evals=zero_shot:mine", "--batch_size=-1")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "--batch_size=-1: -1 is not a" in done.stderr


@pytest.mark.slow
def test_load_gives_the_parameters_of_a_step_on_eight_devices(finished_run):
  state = kills.final_state(finished_run)
  config, params, step = weights.load_run(str(finished_run))
  assert step == kills.STEPS and config.model.image.width == 32
  for name, value in trees.named_leaves(params):
    assert len(value.sharding.device_set) == 8
    assert_array_equal(value, state[f"params/{name}"])
  _, older, step = weights.load_run(str(finished_run), step=kills.STEPS - 3)
  assert step == kills.STEPS - 3
  assert np.any(
    older["query_decoder"]["query_embedding"] != params["query_decoder"]["query_embedding"]
  )


@pytest.mark.slow
def test_a_run_loads_where_its_training_batch_does_not_divide(finished_run, monkeypatch):
  six = jax.devices()[:6]
  monkeypatch.setattr(jax, "devices", lambda: six)
  config, params, _ = weights.load_run(str(finished_run))
  assert config.batch_size == 8
  assert len(params["query_decoder"]["query_embedding"].sharding.device_set) == 6
  with pytest.raises(ValueError, match="config.eval_batch_size = 32 does not divide by the 6"):
    evaluate.evaluate(str(finished_run))


def test_encoders_take_any_number_of_rows(tiny, rng):
  """Against the model applied to one row at a time, each text in a row of its own."""
  tiny.model.image.depth = tiny.model.text.depth = tiny.model.decoder.depth = 1
  model = grain.build(tiny)
  params = trees.map_with_name(
    lambda name, leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(lambda: initial.init_params(model, tiny)),
  )
  tokenizer = tokenizers.Tokenizer(context=tiny.model.text.context)
  images = rng.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)  # batches of 8: one and a part
  texts = [f"a photo of {n} red apples" + ", and more" * (n % 5) for n in range(43)]
  mesh = meshes.create(tiny)
  with jax.set_mesh(mesh):
    encoders = encoders_lib.make(tiny, model, params, mesh=mesh, tokenizer=tokenizer)
    image, text, (regions, boxes) = (
      encoders.image(images), encoders.text(texts), encoders.regions(images)
    )  # fmt: skip
  assert image.shape == (11, 16) and boxes.shape == (11, 5, 4)

  apply = jax.jit(lambda m, *a: model.apply({"params": params}, *a, method=m), static_argnums=0)
  for i in (0, 7, 10):
    one = apply("encode_regions", images[i : i + 1])
    assert_allclose(image[i], one[0][0], atol=1e-5)
    assert_allclose(regions[i], one[1][0], atol=1e-5)
    assert_allclose(boxes[i], one[2][-1][0], atol=1e-5)
  for i in (0, 20, 42):
    ids = tokenizer.encode(texts[i])
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (tokens > 0).astype(np.int32)
    positions = segments * np.arange(40, dtype=np.int32)
    ends = np.array([[len(ids) - 1]], np.int32)
    assert_allclose(
      text[i], apply("encode_text", tokens, segments, positions, ends)[0, 0], atol=1e-5
    )
