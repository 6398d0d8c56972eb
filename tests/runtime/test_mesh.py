"""Mesh sizes, batch cuts and sharding rules on eight virtual devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
def test_every_process_reads_the_parts_of_the_batch_that_its_devices_hold(owners, shares):
  devices = devices_of(owners)
  rows = devices.shape[0] * devices.shape[1]
  found = [meshes.batch_share(devices, p) for p in range(len(shares))]
  assert found == [(share, rows) for share in shares]


def test_parts_of_the_batch_that_overlap_are_an_error():
  with pytest.raises(ValueError, match=r"^config\.mesh\.tensor = 3 cuts the 2 processes unevenly"):
    meshes.batch_share(devices_of([[[0, 0, 0]], [[0, 1, 1]]]), 0)


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
