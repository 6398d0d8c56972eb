"""cuDNN's attention without a GPU: refusals are injected, its mathematics is XLA's."""

import errno
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from numpy.testing import assert_allclose

from grain_jax.models import attention, fused_attention, grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

REAL = jax.nn.dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
  """No answer or note of another test."""
  yield
  fused_attention._probe.cache_clear()
  attention._implementations.clear()


@pytest.fixture
def cudnn(monkeypatch):
  """A GPU whose cuDNN takes what `taken(query_length, key_length, masked)` says, in float32 too.

  It keeps the shapes of all calls.
  """

  class Fake:
    taken = staticmethod(lambda query, key, masked: True)
    calls: list = []

    def __call__(self, query, key, value, *, mask=None, implementation, **options):
      assert implementation == "cudnn"
      self.calls.append(query.shape)
      if not self.taken(query.shape[1], key.shape[1], mask is not None):
        raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}.\nMore of it.")
      return REAL(query, key, value, mask=mask, implementation="xla", **options)

  fake = Fake()
  fake.calls = []
  monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
  monkeypatch.setattr(fused_attention, "unavailable", lambda: "")
  return fake


def inputs(rng, *, batch=8, queries=9, keys=9, heads=2, width=8, dtype=jnp.bfloat16):
  query, weight = rng.normal(size=(2, batch, queries, heads, width))
  key, value = rng.normal(size=(2, batch, keys, heads, width))
  return [jnp.asarray(x, dtype) for x in (query, key, value)], jnp.asarray(weight, jnp.float32)


def both(arrays, weight, *, fused, mask=None):
  def loss(*arrays):
    out = attention.attend(*arrays, mask=mask, fused=fused, part="test")
    return jnp.sum(out * weight), out

  gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_as_xla(arrays, weight, *, fused, mask=None):
  got = both(arrays, weight, fused=fused, mask=mask)
  for x, y in zip(got, both(arrays, weight, fused="xla", mask=mask), strict=True):
    assert_allclose(x, y, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("queries, keys", [(9, 9), (4, 7), (1, 9), (8, 8)])
def test_lengths_that_are_refused_are_padded_and_nothing_changes(rng, cudnn, queries, keys):
  cudnn.taken = lambda query, key, masked: query % 2 == key % 2 == 0
  arrays, weight = inputs(rng, queries=queries, keys=keys)
  assert_as_xla(arrays, weight, fused="auto")
  assert cudnn.calls[-1][1] == queries + queries % 2
  note = attention.implementations()["test"]
  assert note.startswith("cuDNN, ") and ("padded" in note) == bool(queries % 2 or keys % 2)


def test_padding_of_masked_attention_goes_into_the_mask(rng, cudnn):
  cudnn.taken = lambda query, key, masked: query % 8 == key % 8 == 0
  arrays, weight = inputs(rng)
  mask = np.tril(np.ones((9, 9), bool))[None, None]
  assert_as_xla(arrays, weight, fused="cudnn", mask=mask)
  assert attention.implementations()["test"] == "cuDNN, 9 padded to 16 tokens"


def test_auto_takes_masks_and_leaves_float32_to_xla(rng, cudnn):
  arrays, weight = inputs(rng)
  both(arrays, weight, fused="auto", mask=np.ones((1, 1, 9, 9), bool))
  assert attention.implementations() == {"test": "cuDNN, 9 tokens"} and cudnn.calls
  cudnn.calls.clear()
  both([x.astype(jnp.float32) for x in arrays], weight, fused="auto")
  assert attention.implementations() == {"test": "XLA (float32)"} and not cudnn.calls


def test_what_is_refused_at_tracing_goes_to_xla_and_is_said(rng, cudnn, caplog):
  cudnn.taken = lambda query, key, masked: False
  arrays, weight = inputs(rng)
  assert_as_xla(arrays, weight, fused="auto")
  want = "XLA (cuDNN refuses: Unsupported sequence length Q 9)"
  assert attention.implementations() == {"test": want}
  said = [r.getMessage() for r in caplog.records]
  assert said == [f"attention of the test: {want}"]


def test_what_is_refused_at_compiling_is_padded_or_goes_to_xla(rng, cudnn, monkeypatch):
  real, tries = fused_attention.compile_probe, []

  def compiles(lengths):
    def probe(traced):
      tries.append(traced.jaxpr.out_avals[0].shape[1])
      if len(tries) not in lengths:
        raise jax.errors.JaxRuntimeError("INTERNAL: no plan for this graph")
      real(traced)

    return probe

  arrays, weight = inputs(rng)
  monkeypatch.setattr(fused_attention, "compile_probe", compiles({3}))
  assert_as_xla(arrays, weight, fused="auto")
  assert attention.implementations()["test"] == "cuDNN, 9 padded to 16 tokens"
  fused_attention._probe.cache_clear()
  monkeypatch.setattr(fused_attention, "compile_probe", compiles(set()))
  assert_as_xla(arrays, weight, fused="auto")
  want = "XLA (cuDNN refuses: INTERNAL: no plan for this graph)"
  assert attention.implementations()["test"] == want
  with pytest.raises(ValueError, match="impossible for the test .* no plan") as error:
    both(arrays, weight, fused="cudnn")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    OSError(errno.EIO, "Input/output error"),
  ],
)
def test_what_fails_for_the_moment_is_no_refusal(rng, cudnn, monkeypatch, error):
  """Else one process of many would go by XLA for good."""
  arrays, weight = inputs(rng)
  with monkeypatch.context() as patched:
    patched.setattr(fused_attention, "compile_probe", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=re.escape(str(error))):
      both(arrays, weight, fused="auto")
  both(arrays, weight, fused="auto")
  assert attention.implementations()["test"] == "cuDNN, 9 tokens"


def test_a_kernel_without_room_in_shared_memory_is_refused(monkeypatch):
  said = "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 9, available: 8"
  refuse = mock.Mock(side_effect=jax.errors.JaxRuntimeError(said))
  monkeypatch.setattr(fused_attention, "compile_probe", refuse)
  assert fused_attention.refusal_of(lambda: None) == said


def test_a_problem_is_tried_once(rng, cudnn):
  arrays, weight = inputs(rng)
  for _ in range(3):
    jax.clear_caches()
    both(arrays, weight, fused="auto")
  # The probe's and one call a program: the forward pass of a gradient.
  assert fused_attention._probe.cache_info().misses == 1
  assert len([c for c in cudnn.calls if c == arrays[0].shape]) == 1 + 3


def test_one_key_is_its_value_whatever_is_asked(rng, cudnn):
  cudnn.taken = lambda query, key, masked: False
  arrays, weight = inputs(rng, queries=3, keys=1)
  for x, y in zip(
    both(arrays, weight, fused="cudnn"), both(arrays, weight, fused="xla"), strict=True
  ):
    assert_allclose(x, y)
  want = np.broadcast_to(np.asarray(arrays[2], np.float32), weight.shape)
  assert_allclose(both(arrays, weight, fused="auto")[0], want)
  assert not cudnn.calls


def test_on_a_mesh_each_device_has_what_was_tried(rng, cudnn):
  cudnn.taken = lambda query, key, masked: query % 2 == key % 2 == 0
  arrays, weight = inputs(rng)
  mask = np.tril(np.ones((9, 9), bool))[None, None] & np.ones((8, 1, 1, 1), bool)
  want = both(arrays, weight, fused="xla", mask=mask)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    got = both(arrays, weight, fused="cudnn", mask=mask)
    for x, y in zip(got, want, strict=True):
      assert_allclose(x, y, rtol=3e-2, atol=3e-2)
    assert (2, 10, 1, 8) in cudnn.calls and not [c for c in cudnn.calls if c[0] == 8]
    odd, weight = inputs(rng, batch=3)
    both(odd, weight, fused="auto")
    assert "do not divide" in attention.implementations()["test"]


@pytest.mark.parametrize(
  "platform, version, capability, want",
  [
    ("gpu", "PJRT C API\ncuda 13000", "9.0", ""),
    ("gpu", "rocm 60400", "9.0", "AMD GPUs"),
    ("gpu", "PJRT C API\ncuda 12080", "7.5", "compute capability 7.5, below 8.0"),
    ("cpu", "cpu", None, "CPU devices"),
    ("tpu", "libtpu", None, "TPU devices"),
  ],
)
def test_where_there_is_no_cudnn(monkeypatch, platform, version, capability, want):
  client = type("Client", (), {"platform_version": version})
  fields = {"platform": platform, "client": client, "compute_capability": capability}
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), fields)])
  assert fused_attention.unavailable() == want


def test_planning_for_a_gpu_that_is_not_here_takes_xla(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert fused_attention.unavailable() == "no GPU is here to ask"


def test_the_model_names_its_parts_and_asks_nothing_to_make_parameters(tiny, cudnn):
  tiny.model.dtype, tiny.model.attention = "bfloat16", "cudnn"
  cudnn.taken = lambda query, key, masked: False
  model, mesh = grain.build(tiny), meshes.create(tiny)
  with jax.set_mesh(mesh):
    _, state, shardings, optimizer = steps.create_state(
      model, tiny, mesh, total_steps=10, steps_per_epoch=2
    )
    assert not cudnn.calls
    step = steps.make_train_step(model, tiny, mesh, optimizer, shardings)
    with pytest.raises(ValueError, match="'cudnn' is impossible for the image tower"):
      step.trace(state, initial.dummy_batch(tiny, tiny.batch_size))
    tiny.model.attention = "auto"
    step = steps.make_train_step(grain.build(tiny), tiny, mesh, optimizer, shardings)
    step.trace(state, initial.dummy_batch(tiny, tiny.batch_size))
  assert attention.implementations() == {
    "image tower": "XLA (cuDNN refuses: Unsupported sequence length Q 5)",
    "text tower": "XLA (cuDNN refuses: Unsupported sequence length Q 64)",
    "text tower, last layer": "XLA (few queries: no keys, no values)",
    "query decoder, self-attention": "XLA (dropout)",
    "query decoder, cross-attention": "XLA (few queries: no keys, no values)",
  }


def test_one_line_says_it_where_there_was_a_choice(rng, cudnn, monkeypatch):
  arrays, weight = inputs(rng)
  both(arrays, weight, fused="auto")
  assert attention.summary() == ""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert attention.summary() == "attention: test: cuDNN, 9 tokens"


@pytest.mark.parametrize("tensor", [2, 3])
def test_a_pinned_array_has_its_own_gradient(rng, monkeypatch, tensor):
  """On a mesh along whose last axis all devices hold the same: nothing is added up, and exactly."""
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  devices = np.array(jax.devices()[: 2 * tensor]).reshape(2, 1, tensor)
  mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  weights = jnp.asarray(rng.normal(size=(8, 16, 32)), jnp.bfloat16)
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    x = jax.device_put(jnp.ones((8, 16, 32), jnp.bfloat16), rows)
    gradient = jax.jit(
      jax.grad(lambda x: jnp.sum((fused_attention.pin_layout(x) * weights).astype(jnp.float32)))
    )
    compiled = gradient.lower(x).compile()
    assert " all-reduce(" not in compiled.as_text()
    assert (np.asarray(compiled(x)) == np.asarray(weights)).all()
