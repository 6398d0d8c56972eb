"""Mesh sizes, batch cuts and sharding rules on eight virtual devices; TPU slices by stand-ins."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps


@pytest.mark.parametrize(
  ("asked", "shape", "shards"),
  [
    ({}, (8, 1, 1), 8),
    ({"fsdp": 4}, (2, 4, 1), 8),
    ({"tensor": 2}, (4, 1, 2), 4),
    ({"data": 1, "fsdp": -1, "tensor": 4}, (1, 2, 4), 2),
  ],
)
def test_an_axis_of_minus_one_takes_what_is_left(tiny, asked, shape, shards):
  tiny.mesh.update(asked)
  mesh = meshes.create(tiny)
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == meshes.AXES
  assert meshes.num_shards(mesh) == shards


@pytest.mark.parametrize(
  "asked", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": -1, "tensor": 3}]
)
def test_axes_that_do_not_multiply_to_the_devices_are_an_error(tiny, asked):
  tiny.mesh.update(asked)
  with pytest.raises(ValueError, match=r"^config\.mesh \(data=.*8 devices.*-1"):
    meshes.create(tiny)


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
def test_a_batch_that_does_not_divide_names_its_neighbours(tiny, key):
  tiny[key] = 20
  with pytest.raises(ValueError, match=rf"config\.{key} = 20 .* 8 devices .*Try 16 or 24\."):
    meshes.create(tiny)


def devices_of(owners):
  """Stand-ins for devices [data, fsdp, tensor] from the numbers of their processes."""
  return np.vectorize(lambda p: types.SimpleNamespace(process_index=p), otypes=[object])(owners)


@pytest.mark.parametrize(
  ("owners", "shares"),
  [
    ([[[0]], [[0]], [[1]], [[1]]], [(0, 1), (2, 3)]),
    ([[[0], [0]], [[1], [1]]], [(0, 1), (2, 3)]),
    ([[[0, 0]], [[1, 1]]], [(0,), (1,)]),
    ([[[0, 0, 1, 1]]], [(0,), (0,)]),  # the tensor axis spans both: the same examples
    ([[[0, 1]], [[2, 3]]], [(0,), (0,), (1,), (1,)]),
    ([[[1]], [[0]]], [(1,), (0,)]),  # in the order of the mesh, not of the processes
    ([[[0]], [[1]], [[1]], [[0]]], [(0, 3), (1, 2)]),  # as on TPUs, where it follows the links
  ],
)
def test_every_process_reads_the_shards_of_the_batch_that_its_devices_hold(owners, shares):
  devices = devices_of(owners)
  rows = devices.shape[0] * devices.shape[1]
  found = [meshes.process_batch_shards(devices, p) for p in range(len(shares))]
  assert found == [(share, rows) for share in shares]


def test_shards_of_the_batch_that_overlap_are_an_error():
  with pytest.raises(ValueError, match=r"^config\.mesh\.tensor = 3 cuts the 2 processes unevenly"):
    meshes.process_batch_shards(devices_of([[[0, 0, 0]], [[0, 1, 1]]]), 0)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What `mesh_utils` reads of a device."""

  id: int
  process_index: int
  coords: tuple[int, int, int]
  device_kind: str
  slice_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"


def tpu(bounds, *, kind="TPU v5 lite", slices=1, host=(2, 2, 1), cores=1):
  """Chips of TPU slices as libtpu 0.0.42 numbers them: x fastest, process by process."""
  x, y, z = bounds
  chips = []
  for part in range(slices):
    hosts = {}
    for at in itertools.product(range(z), range(y), range(x), range(cores)):
      coords, core = at[2::-1], at[3]
      machine = tuple(c // h for c, h in zip(coords, host, strict=True))[::-1]
      hosts.setdefault(machine, []).append((coords, core))
    for machine in sorted(hosts):
      process = part * len(hosts) + sorted(hosts).index(machine)
      for coords, core in hosts[machine]:
        number = len(chips)
        chips.append(Chip(number, process, coords, kind, part, core))
  return chips


DESCRIBE = """
import json, sys
from jax.experimental import topologies
shape, slices = sys.argv[1], {"num_slices": int(sys.argv[2])} if sys.argv[2] != "1" else {}
devices = topologies.get_topology_desc(shape, platform="tpu", **slices).devices
print(json.dumps([
  [d.process_index, list(d.coords), d.device_kind, getattr(d, "slice_index", 0), d.core_on_chip,
   d.platform] for d in devices
]))
"""


@pytest.mark.plan
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: make test-plan",
)
@pytest.mark.parametrize(
  ("shape", "accelerator", "bounds", "kind", "slices"),
  [
    ("v6e:16x16", "v6e-256", (16, 16, 1), "TPU v6 lite", 1),
    ("v5p:4x4x4", "v5p-128", (4, 4, 4), "TPU v5", 1),
    ("v5e:4x4", "v5litepod-16", (4, 4, 1), "TPU v5 lite", 2),
  ],
)
def test_the_stand_ins_are_as_libtpu_describes_them(shape, accelerator, bounds, kind, slices):
  env = os.environ | {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": accelerator, "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }  # fmt: skip
  command = [sys.executable, "-c", DESCRIBE, shape, str(slices)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
  want = [
    [c.process_index, list(c.coords), c.device_kind, c.slice_index, c.core_on_chip, c.platform]
    for c in tpu(bounds, kind=kind, slices=slices)
  ]
  assert json.loads(done.stdout.splitlines()[-1]) == want


@pytest.mark.parametrize(
  ("bounds", "kind", "axes"),
  [
    ((16, 16, 1), "TPU v6 lite", {"fsdp": 8}),
    ((16, 16, 1), "TPU v6 lite", {"fsdp": 8, "tensor": 4}),
    ((4, 4, 4), "TPU v5", {"fsdp": 8}),
    ((4, 4, 4), "TPU v5", {"fsdp": 4, "tensor": 2}),
  ],
)
def test_a_physical_axis_of_a_tpu_is_split(tiny, bounds, kind, axes):
  tiny.batch_size = tiny.eval_batch_size = 256
  tiny.mesh.update(axes)
  chips = tpu(bounds, kind=kind)
  mesh = meshes.create(tiny, chips)
  assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(chips)))
  places = np.array([chip.coords for chip in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
  # A group of the axis with the most traffic is a box of chips: as many as its corners are apart.
  axis = 2 if "tensor" in axes else 1
  groups = np.moveaxis(places, axis, 2).reshape(-1, places.shape[axis], 3)
  assert set(np.prod(groups.max(1) - groups.min(1) + 1, axis=-1)) == {places.shape[axis]}


def test_slices_follow_each_other_along_data(tiny):
  tiny.batch_size = tiny.eval_batch_size = 32
  chips = tpu((4, 4, 1), slices=2)
  for fsdp, tensor in ((1, 1), (4, 1), (2, 4), (1, 16)):
    tiny.mesh.update(data=-1, fsdp=fsdp, tensor=tensor)
    mesh = meshes.create(tiny, chips[::-1])  # whatever the order that they come in
    data = mesh.shape["data"]
    numbers = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert (numbers == np.arange(2).repeat(data // 2)[:, None, None]).all()
    want = mesh_utils.create_hybrid_device_mesh(
      (data // 2, fsdp, tensor), (2, 1, 1), chips, allow_split_physical_axes=True
    )
    if (fsdp, tensor) != (1, 1):  # there the order along the ring goes by the order given
      assert (mesh.devices == want).all()


def test_fsdp_over_slices_is_said_and_tensor_over_them_is_an_error(tiny, caplog):
  chips = tpu((2, 2, 1), slices=4)
  tiny.batch_size = tiny.eval_batch_size = 16
  tiny.mesh.update(data=2, fsdp=8)
  mesh = meshes.create(tiny, chips)
  numbers = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)[..., 0]
  assert numbers.tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
  (line,) = caplog.messages
  assert "data=2, fsdp=8" in line and "by the 4 slices, so fsdp goes over the network" in line
  tiny.mesh.update(data=2, fsdp=1, tensor=8)
  with pytest.raises(ValueError, match=r"^config\.mesh \(data=2, .*Make data a multiple of 4\.$"):
    meshes.create(tiny, chips)
  with pytest.raises(ValueError, match=r"^the 4 slices have 4, 4, 4, 3 devices: config\.mesh"):
    meshes.arrange((15, 1, 1), chips[:-1])


@pytest.mark.parametrize(("platform", "slices"), [("cpu", 1), ("gpu", 1), ("gpu", 2)])
def test_other_devices_keep_the_order_of_their_numbers(tiny, platform, slices):
  """Runs on them are compared bit for bit with older ones; JAX calls a node of GPUs a slice."""
  tiny.mesh.fsdp = 4
  devices = [
    dataclasses.replace(chip, platform=platform, device_kind=platform, coords=None)
    for chip in tpu((8 // slices, 1, 1), slices=slices)
  ]
  mesh = meshes.create(tiny, devices)
  assert [device.id for device in mesh.devices.flat] == list(range(8))


KINDS = (
  ("TPU v2", 2), ("TPU v3", 2), ("TPU v4", 1), ("TPU v4 lite", 1), ("TPU v5 lite", 1),
  ("TPU v5p", 1), ("TPU v5", 1), ("TPU v6 lite", 1), ("TPU7x", 2), ("TPU v9", 2),
)  # fmt: skip
SIDES = st.sampled_from([1, 2, 3, 4, 6, 8, 10, 12, 14, 20, 28])


def divisors(number):
  return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def machines(draw):
  """(chips, sizes of the axes) of some TPU."""
  kind, cores = draw(st.sampled_from(KINDS))
  flat = kind in ("TPU v2", "TPU v3", "TPU v5 lite", "TPU v6 lite")
  bounds = (draw(SIDES), draw(SIDES), 1 if flat else draw(st.sampled_from([1, 2, 4, 14])))
  slices = draw(st.sampled_from([1, 1, 2, 3, 4]))
  host = draw(st.sampled_from([(2, 2, 1), (4, 2, 1), (1, 1, 1)]))
  chips = tpu(bounds, kind=kind, slices=slices, host=host, cores=cores)
  tensor = draw(st.sampled_from(divisors(len(chips))))
  fsdp = draw(st.sampled_from(divisors(len(chips) // tensor)))
  return chips, (len(chips) // tensor // fsdp, fsdp, tensor)


@given(machines())
def test_every_mesh_of_every_tpu_is_made_or_refused_in_one_line(machine):
  chips, shape = machine
  try:
    devices = meshes.arrange(shape, chips)
  except ValueError as error:
    assert str(error).startswith("config.mesh") and "\n" not in str(error)
    slices = chips[-1].slice_index + 1
    assert math.prod(shape[:2]) % slices  # only then
    return
  assert devices.shape == shape
  assert sorted(chip.id for chip in devices.flat) == list(range(len(chips)))

  # Which parts of the batch a process reads, against JAX's own account of where they lie.
  mesh = jax.sharding.Mesh(devices, meshes.AXES)
  rows = shape[0] * shape[1]
  held = {}
  for chip, (index,) in meshes.batch_sharding(mesh).devices_indices_map((rows,)).items():
    held.setdefault(chip.process_index, set()).add(range(rows)[index].start)
  try:
    shares = {process: meshes.process_batch_shards(devices, process) for process in held}
  except ValueError as error:
    assert "cuts the" in str(error) and shape[2] > 1
    return
  assert shares == {process: (tuple(sorted(own)), rows) for process, own in held.items()}


def test_batch_lies_in_order_over_the_devices(tiny):
  mesh = meshes.create(tiny)
  rows = np.arange(24).reshape(8, 3)
  array = meshes.to_global({"x": rows}, mesh)["x"]
  assert_array_equal(array, rows)
  for i, device in enumerate(mesh.devices.flat):
    (shard,) = [s for s in array.addressable_shards if s.device == device]
    assert_array_equal(shard.data, rows[i : i + 1])


def test_rules_place_parameters_and_their_moments_alike(tiny):
  mesh = meshes.create(tiny)
  params = {"fc1": {"kernel": jnp.zeros((2, 8, 4)), "bias": jnp.zeros((2, 4))}}
  moments = {"count": jnp.zeros((), jnp.int32), "mu": params, "nu": params, "other": jnp.zeros(8)}
  state = steps.TrainState(jnp.zeros((), jnp.int32), params, moments)
  rules = [["^fc1/kernel$", [None, "fsdp", "tensor"]]]  # lists, as JSON gives them back
  placed = meshes.state_shardings(state, mesh, rules)
  for tree in (placed.params, placed.opt_state["mu"], placed.opt_state["nu"]):
    assert tree["fc1"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert tree["fc1"]["bias"].spec == P()
  assert placed.step.spec == placed.opt_state["count"].spec == placed.opt_state["other"].spec == P()


@pytest.mark.parametrize(
  ("rule", "words"),
  [
    (("kernle$", ("fsdp",)), "'kernle\\$' matches no parameter"),
    (("bias$", (None, "fsdp", None)), "more dimensions than a parameter"),
    (("kernel$", ("rows",)), "'rows'.*data, fsdp, tensor"),
    (("kernel$", ("data",)), "cuts 2 of .* into 8 parts"),
  ],
)
def test_a_rule_that_cannot_be_kept_is_an_error(tiny, rule, words):
  params = {"fc1": {"kernel": jnp.zeros((2, 8, 4)), "bias": jnp.zeros((2, 4))}}
  state = steps.TrainState(jnp.zeros((), jnp.int32), params, ())
  with pytest.raises(ValueError, match=rf"^config\.mesh\.rules: .*{words}"):
    jax.block_until_ready(meshes.state_shardings(state, meshes.create(tiny), [rule]))
