"""`grain_jax.plan`: a whole plan on virtual CPUs, the command, bad input."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from numpy.testing import assert_allclose

from grain_jax import flops as counter
from grain_jax.plan import __main__ as plan
from grain_jax.plan import chips as plan_chips
from grain_jax.plan import estimate as plan_estimate
from grain_jax.plan import program as plan_program

CONTRACT = (
  "fits", "batch_per_chip", "memory_per_chip_bytes", "flops_per_chip", "pass_flops_per_chip",
  "useful_flops_per_chip",
  "collective_bytes_per_chip", "step_seconds_estimate", "bound_by", "compile_seconds", "chip_hours",
)  # fmt: skip
# A model of a few thousand parameters beside the token embedding.
SMALL = (
  "configs/cc12m.py:model.embed_dim=16,model.image.size=32,model.image.width=32,"
  "model.image.depth=2,model.image.heads=2,model.text.width=32,model.text.depth=2,"
  "model.text.heads=2,model.text.vocab_size=500,model.decoder.width=32,model.decoder.depth=2,"
  "model.decoder.heads=2,model.decoder.mlp_dim=32,loss.matcher=device,batch_size=32"
)


@pytest.fixture(scope="module")
def small():
  from grain_jax import config as configs

  return configs.load(SMALL)


@pytest.fixture(scope="module")
def planner(small):
  options = plan_estimate.Options(examples=1000, count="unrolled")
  return plan_estimate.Planner(small, plan_chips.parse("cpu:8"), options)


@pytest.fixture(scope="module")
def found(planner):
  return planner.plan(4)


def test_a_plan_has_the_keys_of_the_contract(found):
  assert set(CONTRACT) <= set(found)
  assert json.loads(json.dumps(found)) == found
  assert found["fits"] is True and found["batch_per_chip"] == 4
  memory = dict(found["memory_per_chip_bytes"])
  assert memory.pop("total") == sum(memory.values())


def test_memory_of_the_state_is_what_adam_needs(found, planner):
  """Two moments of each parameter and a few scalars, whole on each chip."""
  memory = found["memory_per_chip_bytes"]
  params = planner.traced(4).state.params
  assert memory["parameters"] == 4 * sum(p.size for p in jax.tree.leaves(params))
  assert_allclose(memory["optimizer"], 2 * memory["parameters"], rtol=1e-3)
  assert memory["temporaries"] > 0


def test_gradients_are_reduced_once(found):
  """Each chip sends 2 x 7/8 of the float32 gradient, and the features beside it."""
  expected = 2 * 7 / 8 * found["memory_per_chip_bytes"]["parameters"]
  assert 0.95 * expected < found["collective_bytes_per_chip"]["all-reduce"] < 1.5 * expected


def test_the_estimate_follows_from_its_parts(found):
  seconds = found["seconds_by_resource"]
  assert found["step_seconds_estimate"] == max(seconds.values())
  assert seconds[found["bound_by"]] == max(seconds.values())
  assert_allclose(seconds["arithmetic"], found["flops_per_chip"] / 1e11)
  assert_allclose(seconds["memory"], found["memory_traffic_bytes_per_chip"] / 20e9)
  assert found["steps"] == 35 * (1000 // 32)
  assert_allclose(found["chip_hours"], found["steps"] * max(seconds.values()) * 8 / 3600)
  assert_allclose(found["samples_per_second"], 32 / max(seconds.values()))


def test_useful_is_less_than_executed_and_causes_are_part_of_the_traffic(found):
  assert 0 < found["useful_flops_per_chip"] < found["flops_per_chip"]
  causes = [cause["bytes_per_sample"] for cause in found["memory_traffic_causes"]]
  assert len(causes) == 3 and causes == sorted(causes, reverse=True)
  assert sum(causes) < found["memory_traffic_bytes_per_sample"]


def test_scanned_and_unrolled_counts_agree(small, found):
  """Products alone against XLA's count, which has element-wise work on top: 15 % in this model."""
  options = plan_estimate.Options(examples=1000, count="scanned")
  scanned = plan_estimate.Planner(small, plan_chips.parse("cpu:8"), options).plan(4)
  assert (found["counted"], scanned["counted"]) == ("unrolled", "scanned")
  assert 0.8 * found["flops_per_chip"] < scanned["flops_per_chip"] <= found["flops_per_chip"]
  assert_allclose(
    scanned["collective_bytes_per_chip"]["all-reduce"],
    found["collective_bytes_per_chip"]["all-reduce"],
    rtol=0.1,
  )


def test_a_batch_is_compiled_once(planner, found, monkeypatch):
  monkeypatch.setattr(plan_program, "compile", lambda traced: pytest.fail("compiled again"))
  assert planner.fits(4) == (True, found["memory_per_chip_bytes"]["total"])


def test_rematerialisation_shows_in_executed_alone(small, found):
  config = small.copy_and_resolve_references()
  config.model.remat = "block"
  options = plan_estimate.Options(examples=1000, count="scanned")
  planner = plan_estimate.Planner(config, plan_chips.parse("cpu:8"), options)
  assert_allclose(planner.useful_flops(4), found["useful_flops_per_chip"])
  plain = plan_estimate.Planner(small, plan_chips.parse("cpu:8"), options)
  executed, once = (sum(counter.count(p.traced(4).jaxpr).values()) for p in (planner, plain))
  assert 1.1 * once < executed < 4 / 3 * once


def test_table_for_people(found):
  text = plan.table(found)
  for words in ("fits", "yes", "memory per chip", "useful per sample", "chip-hours", "step at"):
    assert words in text
  refused = found | {"fits": False, "step_seconds_estimate": None, "notes": ["so it is"]}
  assert "NO" in plan.table(refused) and plan.table(refused).endswith("note: so it is")


def test_h100_is_planned_with_the_device_solver_and_says_so(small):
  config = small.copy_and_resolve_references()
  config.loss.matcher = "host"
  planned, notes = plan_estimate.for_machine(config, plan_chips.parse("h100:8"), batch_per_chip=2)
  assert planned.loss.matcher == "device" and planned.batch_size == 16
  assert any("loss.matcher=device" in note for note in notes)
  assert config.loss.matcher == "host", "the caller's configuration stays as it is"


@pytest.mark.parametrize(
  ("message", "size"),
  [
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
      "required for HLO temporaries (20.25G) exceeds available HBM (15.75G).",
      20.25 * 2**30,
    ),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.5G of 2G", 2.5 * 2**30),
    ("INTERNAL: something else", None),
  ],
)  # fmt: skip
def test_a_tpu_compilers_refusal_says_what_it_wanted(message, size):
  assert plan_program._bytes_wanted(message) == size


def test_a_tpus_peak_is_its_total(planner):
  """Of 9 GB arguments and 12 GB temporaries, which hold the donated again, 13 GB at the peak."""
  whole = planner.traced(4)
  held = plan_program._memory(whole, 0)["total"]
  device = types.SimpleNamespace(platform="tpu")
  mesh = types.SimpleNamespace(devices=np.array([device]))
  stats = types.SimpleNamespace(
    argument_size_in_bytes=held + 7,
    temp_size_in_bytes=12 * 10**9,
    output_size_in_bytes=10,
    alias_size_in_bytes=4,
    generated_code_size_in_bytes=100,
    peak_memory_in_bytes=13 * 10**9,
  )
  on_tpu = plan_program._memory(dataclasses.replace(whole, mesh=mesh), stats)
  assert on_tpu["total"] == 13 * 10**9 + 100 and on_tpu["padding"] == 7
  device.platform = "gpu"
  on_gpu = plan_program._memory(dataclasses.replace(whole, mesh=mesh), stats)
  assert on_gpu["total"] == held + 7 + 12 * 10**9 + 6 + 100


class _Refusing:
  """A traced step whose compilation runs out of memory."""

  def lower(self):
    return self

  def compile(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: HLO temporaries (20.25G) exceeds 15.75G")


def test_what_the_compiler_refuses_does_not_fit(small, planner, monkeypatch):
  whole = planner.traced(4)
  refused = plan_program.Traced(_Refusing(), whole.state, whole.batch, whole.mesh)
  other = plan_estimate.Planner(small, planner.machine, plan_estimate.Options(count="scanned"))
  monkeypatch.setattr(other, "compiled", lambda batch: plan_program.compile(refused))
  result = other.plan(4)
  assert result["fits"] is False and result["step_seconds_estimate"] is None
  assert result["memory_per_chip_bytes"]["total"] == 20.25 * 2**30
  assert any("does not fit" in note for note in result["notes"])
  assert "NO" in plan.table(result)


def command(*args, **env):
  return subprocess.run(
    [sys.executable, "-m", "grain_jax.plan", *args],
    env={**os.environ, **env},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (("--topology=v5e:5x5",), "v5e:2x2"),
    (("--topology=cpu:8", "--batch_per_chip=-1"), "must not be negative"),
    (("--topology=cpu:8", "--count=rolled"), "Choose one of scanned, unrolled"),
    (("--topology=cpu:8", "--examples=0"), "--examples=0 must be positive"),
    (("--topology=cpu:8", "--config.batch_size=20"), "does not divide by the 8 devices"),
    (("--topology=cpu:8", "--config.mesh.fsdp=3"), "does not multiply to the 8 devices"),
    (("--topology=cpu:8", "--config.batch_siz=8"), "Did you mean config.batch_size"),
    ((), "--topology must be given"),
  ],
)
def test_bad_input_is_one_line_and_an_exit_code(args, words):
  done = command(f"--config={SMALL}", *args)
  assert done.returncode != 0 and done.stdout == ""
  line = done.stderr.strip().splitlines()[-1]
  assert words in line and "Traceback" not in done.stderr


def test_a_changed_cuda_plugin_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(topologies, "get_topology_desc", lambda *args, topology: None)
  with pytest.raises(ValueError, match="Use jax 0.10.2") as error:
    plan_program.devices(plan_chips.parse("h100:8"))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:8"])
def test_missing_wheels_are_named(topology, small, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install -r requirements-plan.txt"):
    plan_program.devices(plan_chips.parse(topology))


def test_missing_wheels_are_named_where_no_plugin_of_jax_is_installed(monkeypatch):
  """importlib asks for the package before the module in it, and raises where there is none."""
  real = importlib.util.find_spec

  def find_spec(name, package=None):
    if name.partition(".")[0] in ("jax_plugins", "jax_cuda12_plugin"):
      if "." in name:
        raise ModuleNotFoundError("No module named 'jax_plugins'", name="jax_plugins")
      return None
    return real(name, package)

  monkeypatch.setattr(importlib.util, "find_spec", find_spec)
  with pytest.raises(ValueError, match="GPU plans need jax-cuda12-plugin") as error:
    plan_program.devices(plan_chips.parse("h100:8"))
  assert "\n" not in str(error.value)


@pytest.mark.slow
def test_json_is_one_object():
  done = command(
    f"--config={SMALL}", "--topology=cpu:2", "--json", "--count=scanned", "--batch_per_chip=8"
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert set(CONTRACT) <= set(found) and found["batch_size"] == 16


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: make test-plan",
)
def test_a_tpu_that_is_not_there():
  done = command(
    f"--config={SMALL},loss.matcher=host", "--topology=v5e:2x2", "--json", "--batch_per_chip=8",
    "--count=unrolled",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert found["fits"] and found["counted"] == "unrolled"
  chosen = [note.partition("=")[0] for note in found["notes"]]
  assert chosen == ["model.remat", "model.unroll"]  # the matcher stays, and attention
  assert found["flops_per_chip"] > found["useful_flops_per_chip"]


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None,
  reason="the CUDA plugin is not installed: make test-plan",
)
def test_h100s_that_are_not_there():
  done = command(f"--config={SMALL},loss.matcher=host", "--topology=h100:16", "--json")
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert found["fits"] and found["chips"] == 16
  assert any("loss.matcher=device" in note for note in found["notes"])
