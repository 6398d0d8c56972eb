"""Checkpoints there and back, on other devices, in part, and when damaged."""

import errno
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from grain_jax import failures
from grain_jax.runtime import checkpoint


def mesh_of(devices):
  return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


def abstract(tree, mesh, spec=None):
  sharding = NamedSharding(mesh, spec or P())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding if x.ndim else NamedSharding(mesh, P())
    ),
    tree,
  )


@pytest.fixture
def state(rng):
  """On eight devices, cut along the first dimension."""
  sharding = NamedSharding(mesh_of(8), P("data"))
  kernel = jax.device_put(rng.normal(size=(16, 3)).astype(np.float32), sharding)
  return {
    "step": jax.device_put(jnp.int32(3), NamedSharding(mesh_of(8), P())),
    "params": {"kernel": kernel},
    "opt_state": {"mu": kernel * 2},
  }


def values(tree):
  return jax.tree.map(np.asarray, tree)


def save(folder, state, *steps, keep=None):
  checkpoints = checkpoint.Checkpoints(folder, keep=keep)
  for step in steps:
    changed = {**state, "step": jnp.int32(step)}
    checkpoints.save(step, changed, {"step": step, "config": {"x": [1, 2]}})
  checkpoints.wait()
  return checkpoints


def damage(folder, step, how):
  """Cuts every file of the state short, empties them, or takes the state or its meta away."""
  place = folder / str(step) / ("meta" if how == "no meta" else "state")
  for file in [p for p in place.rglob("*") if p.is_file()]:
    if how.startswith("no"):
      file.unlink()
    else:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if how == "cut" else b"")


@pytest.mark.parametrize(("devices", "spec"), [(8, P("data")), (1, P()), (2, P("data")), (8, P())])
def test_restored_on_any_devices_bit_for_bit(tmp_path, state, devices, spec):
  checkpoints = save(tmp_path, state, 3)
  restored, meta = checkpoints.restore(abstract(state, mesh_of(devices), spec))
  jax.tree.map(assert_array_equal, values(restored), values(state))
  assert meta == {"step": 3, "config": {"x": [1, 2]}}
  assert len(restored["params"]["kernel"].sharding.device_set) == devices
  checkpoints.close()


def test_only_large_arrays_are_written_in_parts(tmp_path, caplog):
  """Each part of an array that all devices hold is cut out by a program of its own."""
  everywhere = NamedSharding(mesh_of(8), P())
  programs = {}
  for size in (8 * 2**18 - 8, 8 * 2**18):  # of float32; in eight parts they have 1 MiB, or less
    array = jax.device_put(np.arange(size, dtype=np.float32), everywhere)
    caplog.clear()
    with jax.log_compiles():
      checkpoints = save(tmp_path / str(size), {"params": array}, 1)
    programs[size] = [r for r in caplog.messages if "XLA compilation of jit(slice)" in r]
    restored, _ = checkpoints.restore({"params": abstract(array, mesh_of(8))})
    assert_array_equal(restored["params"], array)
    checkpoints.close()
  assert [len(found) for found in programs.values()] == [0, 8]


def test_parameters_alone_can_be_restored(tmp_path, state):
  save(tmp_path, state, 3).close()
  checkpoints = checkpoint.Checkpoints(tmp_path)
  restored, _ = checkpoints.restore({"params": abstract(state["params"], mesh_of(1))})
  assert restored.keys() == {"params"}
  assert_array_equal(restored["params"]["kernel"], np.asarray(state["params"]["kernel"]))


def test_latest_and_the_number_kept(tmp_path, state):
  checkpoints = checkpoint.Checkpoints(tmp_path / "new")
  assert checkpoints.latest() is None
  checkpoints = save(tmp_path / "more", state, 1, 2, 5, keep=2)
  assert checkpoints.latest() == 5
  assert sorted(p.name for p in (tmp_path / "more").iterdir() if p.name.isdigit()) == ["2", "5"]


def test_a_certain_step(tmp_path, state):
  checkpoints = save(tmp_path, state, 1, 2)
  restored, meta = checkpoints.restore(abstract(state, mesh_of(1)), step=1)
  assert int(restored["step"]) == meta["step"] == 1
  with pytest.raises(ValueError, match=r"has no checkpoint of step 7; it has \[1, 2\]"):
    checkpoints.restore(abstract(state, mesh_of(1)), step=7)


def test_no_checkpoint_at_all(tmp_path, state):
  with pytest.raises(ValueError, match="holds no checkpoint"):
    checkpoint.Checkpoints(tmp_path).restore(abstract(state, mesh_of(1)))


@pytest.mark.parametrize("how", ["cut", "empty", "no state", "no meta"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, state, caplog, how):
  save(tmp_path, state, 1, 2).close()
  damage(tmp_path, 2, how)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  restored, meta = checkpoints.restore(abstract(state, mesh_of(1)))
  assert int(restored["step"]) == meta["step"] == 1
  assert "checkpoint 2" in caplog.text and "passed over" in caplog.text
  assert checkpoints.read_newest_meta()["step"] == (1 if how == "no meta" else 2)
  # Training comes to step 2 again, and saves it again.
  checkpoints.save(2, {**state, "step": jnp.int32(2)}, {"step": 2})
  checkpoints.wait()
  restored, _ = checkpoints.restore(abstract(state, mesh_of(1)))
  assert int(restored["step"]) == 2
  with pytest.raises(ValueError, match="has no checkpoint of step 9"):
    checkpoints.restore(abstract(state, mesh_of(1)), step=9)
  checkpoints.close()


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path, state):
  save(tmp_path, state, 1, 2).close()
  damage(tmp_path, 2, "cut")
  with pytest.raises(ValueError, match="checkpoint 2 of steps .* can be read"):
    checkpoint.Checkpoints(tmp_path).restore(abstract(state, mesh_of(1)), step=2)


def test_parameters_of_another_shape_are_an_error(tmp_path, state):
  """Silently cutting or padding them would be worse than any error."""
  save(tmp_path, state, 3).close()
  other = {**state, "params": {"kernel": jnp.zeros((8, 3))}}
  with pytest.raises(ValueError, match=r"checkpoint 3 is of another model.*\[16, 3\].*\[8, 3\]"):
    checkpoint.Checkpoints(tmp_path).restore(abstract(other, mesh_of(1)))


def test_what_was_being_written_when_the_process_died_is_not_listed(tmp_path, state):
  save(tmp_path, state, 1).close()
  for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17"):
    (tmp_path / name / "state").mkdir(parents=True)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.latest() == 1
  checkpoints.save(2, state, {"step": 2})
  checkpoints.wait()
  assert checkpoints.latest() == 2
  checkpoints.close()


@pytest.mark.parametrize("gone", ["commit_success.txt", "meta", "state/manifest.ocdbt", "state"])
def test_a_half_deleted_newest_checkpoint_is_named_and_passed_over(tmp_path, state, caplog, gone):
  """As a process leaves it that dies while it deletes, or a disk that loses a file."""
  save(tmp_path, state, 1, 2).close()
  path = tmp_path / "2" / gone
  shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
  (tmp_path / "7").mkdir()  # nothing left but the folder
  checkpoints = checkpoint.Checkpoints(tmp_path)
  restored, _ = checkpoints.restore(abstract(state, mesh_of(1)))
  assert "checkpoint 7 in" in caplog.text and "passed over" in caplog.text
  assert int(restored["step"]) == (2 if gone == "commit_success.txt" else 1)
  checkpoints.save(7, {**state, "step": jnp.int32(7)}, {"step": 7})
  checkpoints.wait()
  assert checkpoints.restore(abstract(state, mesh_of(1)))[1] == {"step": 7}
  checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path, state):
  results = {1: 0.2, 2: 0.9, 3: 0.5, 4: float("nan"), 5: 0.9, 6: 0.1}
  options = {"keep": 2, "best_metric": "val/r1", "keep_best": 1}

  def steps(*, saved, opened=None):
    checkpoints = opened or checkpoint.Checkpoints(tmp_path, **options)
    for step in saved:
      checkpoints.save(step, {**state, "step": jnp.int32(step)}, {"step": step})
      checkpoints.record(step, {"val/r1": results[step], "other": 1.0})
    checkpoints.close()
    return sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())

  assert steps(saved=[1, 2, 3]) == [2, 3]
  assert steps(saved=[4, 5, 6]) == [2, 5, 6]  # the record outlives the process
  note = json.loads((tmp_path / "best.json").read_text())
  assert (note["metric"], note["best"], note["results"]["4"]) == ("val/r1", 2, None)
  other = checkpoint.Checkpoints(tmp_path, keep=2, best_metric="other", keep_best=1)
  assert other.best() is None  # of another metric nothing is on record
  with pytest.raises(ValueError, match="best_metric = 'other' is not a result.*val/r1"):
    other.record(6, {"val/r1": 0.5})
  other.close()


def test_a_checkpoint_of_another_model_is_named_not_passed_over(tmp_path, state):
  save(tmp_path, state, 1, 2).close()
  checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
  wanted = {"params": {"kernel": state["params"]["kernel"], "bias": jnp.zeros(3)}}
  with pytest.raises(ValueError, match=r"checkpoint 2 is of another model: it has no 'params/bias"):
    checkpoints.restore(abstract(wanted, mesh_of(1)))
  wanted = {"params": {"weight": state["params"]["kernel"]}}
  with pytest.raises(ValueError, match=r"it has no 'params/weight' \[16, 3\]"):
    checkpoints.restore(abstract(wanted, mesh_of(1)))
  wider = {"params": {**state["params"], "bias": jnp.zeros(3)}}
  save(tmp_path / "wider", wider, 1).close()
  with pytest.raises(ValueError, match=r"its 'params/bias' \[3\] is not in the model"):
    checkpoint.Checkpoints(tmp_path / "wider").restore(
      abstract({"params": state["params"]}, mesh_of(1))
    )


def test_a_disk_that_takes_no_more_is_said_in_one_line(tmp_path, state):
  """Every write past 64 bytes of a file fails, as on a full disk."""
  checkpoints = save(tmp_path, state, 1)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
  try:
    with pytest.raises(checkpoint.SaveError) as caught:
      checkpoints.save(2, {**state, "step": jnp.int32(2)}, {"step": 2})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert "checkpoint 2 in" in str(caught.value) and "checkpoint 1 is kept" in str(caught.value)
  assert "\n" not in str(caught.value)
  reopened = checkpoint.Checkpoints(tmp_path)
  assert reopened.restore(abstract(state, mesh_of(1)))[1]["step"] == 1
  reopened.close()


def test_reading_beside_a_run_leaves_what_it_writes(tmp_path, state):
  save(tmp_path, state, 1).close()
  half = tmp_path / "2.orbax-checkpoint-tmp"
  half.mkdir()
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert reader.restore(abstract(state, mesh_of(1)))[1]["step"] == 1
  reader.close()
  assert half.exists()


def test_one_that_a_run_replaces_while_it_is_read_is_no_loss(tmp_path, state, monkeypatch):
  """It was listed, and is gone when it is read: the newer one is taken."""
  save(tmp_path, state, 1).close()
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  read, seen = checkpoint.Checkpoints._read_again, []

  def replaced(self, step, like):
    seen.append(step)
    if len(seen) == 1:
      save(tmp_path, state, 2).close()
      shutil.rmtree(tmp_path / "1")
    return read(self, step, like)

  monkeypatch.setattr(checkpoint, "WAITS", (0.0,))
  monkeypatch.setattr(checkpoint.Checkpoints, "_read_again", replaced)
  assert reader.restore(abstract(state, mesh_of(1)))[1]["step"] == 2 and seen == [1, 2]
  reader.close()


def stale(monkeypatch, times, *, error=None):
  """The first `times` reads of a state fail as on a network file system."""
  monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0))
  restore, calls = checkpoint.ocp.PyTreeCheckpointHandler.restore, []

  def failing(*arguments, **named):
    calls.append(1)
    if len(calls) <= times:
      raise error or OSError(errno.ESTALE, "Stale file handle")
    return restore(*arguments, **named)

  monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", failing)
  return calls


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_is_tried_again_before_a_checkpoint_is_passed_over(
  tmp_path, state, monkeypatch, times
):
  save(tmp_path, state, 1, 2).close()
  calls = stale(monkeypatch, times)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.restore(abstract(state, mesh_of(1)))[1]["step"] == 2
  assert len(calls) == times + 1


def test_storage_that_fails_every_time_is_no_damage(tmp_path, state, monkeypatch):
  save(tmp_path, state, 1, 2).close()
  stale(monkeypatch, 1000, error=ValueError("DATA_LOSS: x [OS error 5: EIO Input/output error]"))
  with pytest.raises(failures.TransientError, match="checkpoint 2 cannot be read .* may be whole"):
    checkpoint.Checkpoints(tmp_path).restore(abstract(state, mesh_of(1)))


def test_a_save_that_fails_warns_and_the_next_one_is_the_next_try(tmp_path, state, caplog):
  """As where a disk was full for a while."""
  checkpoints = save(tmp_path, state, 1)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
  try:
    checkpoints.save(2, {**state, "step": jnp.int32(2)}, {"step": 2})
    while not checkpoints._failure:
      checkpoints.check()
    checkpoints.check()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  checkpoints.save(3, {**state, "step": jnp.int32(3)}, {"step": 3})
  checkpoints.wait()
  said = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
  assert len(said) == 1 and "checkpoint 2 in" in said[0] and "the next try" in said[0]
  assert checkpoint.Checkpoints(tmp_path).restore(abstract(state, mesh_of(1)))[1]["step"] == 3


def test_the_last_checkpoint_is_tried_several_times(tmp_path, state, monkeypatch):
  checkpoints = save(tmp_path, state, 1)
  monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0))
  real, left = checkpoints._manager.save, [2]

  def failing(*arguments, **named):
    if left[0]:
      left[0] -= 1
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(*arguments, **named)

  monkeypatch.setattr(checkpoints._manager, "save", failing)
  checkpoints.save_surely(2, {**state, "step": jnp.int32(2)}, {"step": 2})
  assert left == [0] and checkpoints.latest() == 2
  left[0] = 3
  with pytest.raises(checkpoint.SaveError, match="No space left .* Make room or mend") as error:
    checkpoints.save_surely(3, {**state, "step": jnp.int32(3)}, {"step": 3})
  assert failures.restart_helps(error.value) and left == [0]


def test_the_fresh_state_does_not_count_among_those_kept(tmp_path, state):
  checkpoints = save(tmp_path, state, 0, keep=2)
  assert checkpoints._steps() == [0]
  for step, kept in ((2, [2]), (4, [2, 4]), (6, [4, 6])):
    checkpoints.save(step, {**state, "step": jnp.int32(step)}, {"step": step})
    checkpoints.wait()
    assert [s for s in checkpoints._steps() if s] == kept
  assert 0 not in checkpoints._steps()


def test_one_process_decides_where_a_run_begins(tmp_path, state, monkeypatch):
  """A listing that lags on another machine must not part it from the others."""
  checkpoints = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint.distributed, "broadcast", lambda name, value: "7")
  assert checkpoints.latest() is None and checkpoints.agree_on_latest() == 7
