"""LayerNorm's kernels, interpreted, beside torch's and the form that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax.models import elementwise, fused_attention, norm_kernels


@pytest.fixture
def kernels(monkeypatch):
  """Interpreted on the CPU; counts the calls."""
  calls = []
  real = norm_kernels.forward
  monkeypatch.setattr(norm_kernels, "interpret", lambda: True)
  monkeypatch.setattr(
    norm_kernels, "forward", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
  )
  yield calls
  norm_kernels._refusals.clear()


def draw(shape, seed=0, *, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("width", (16, 64, 96, 512, 768, 1280))
@pytest.mark.parametrize("mean", (0.0, 300.0))
def test_both_kernels_are_torchs(width, mean):
  """In float32; rows of several programs, the last of which has fewer."""
  rows = norm_kernels._rows_of(width)
  n = rows * 7
  monkey = pytest.MonkeyPatch()
  monkey.setattr(norm_kernels, "interpret", lambda: True)
  monkey.setattr(norm_kernels, "_PROGRAMS", 3)  # 3 blocks a program: 3, 3 and 1
  x, branch, gradient, through = (draw((n, width), i, mean=mean * (i == 0)) for i in range(4))
  branch_bias, scale, bias = (draw((width,), i) for i in (5, 6, 7))
  names = [x, branch, branch_bias, scale, bias]
  theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in names]
  total = theirs[0] + theirs[1] + theirs[2]
  want = torch.nn.functional.layer_norm(total, (width,), *theirs[3:], eps=1e-5)
  (want * torch.tensor(gradient) + total * torch.tensor(through)).sum().backward()
  y, mean_, inverse, normalised = norm_kernels.forward(
    jnp.asarray(x), (jnp.asarray(branch), jnp.asarray(branch_bias)), scale, bias, epsilon=1e-5
  )
  out, *sums = norm_kernels.backward(
    normalised, mean_, inverse, scale, gradient, through, added=True
  )
  monkey.undo()
  assert [s.shape for s in sums] == [(3, width)] * 3
  rounding = 2e-5 if not mean else 2e-3  # of the deviations from a mean of 300
  np.testing.assert_allclose(y, want.detach(), atol=rounding, rtol=1e-5)
  np.testing.assert_allclose(out, theirs[0].grad, atol=3 * rounding, rtol=1e-4)
  for ours, i in ((sums[2], 2), (sums[0], 3), (sums[1], 4)):
    error = np.abs(np.sum(ours, 0) - theirs[i].grad.numpy())
    assert error.max() < 3 * rounding * np.sqrt(n) * 3, i


@pytest.mark.parametrize("shape", ((4, 48, 64), (2, 8, 4, 64), (8, 32, 512)))
@pytest.mark.parametrize("mode", ("alone", "keep", "add"))
def test_the_module_is_the_same_by_either_form(kernels, shape, mode):
  """bfloat16: result and gradients, to a rounding."""
  norm = elementwise.LayerNorm(1e-6, jnp.bfloat16)
  x, branch, gradient, through = (jnp.asarray(draw(shape, i), jnp.bfloat16) for i in range(4))
  branch_bias = jnp.asarray(draw(shape[-1:], 9))
  params = {"scale": jnp.asarray(draw(shape[-1:], 7)), "bias": jnp.asarray(draw(shape[-1:], 8))}

  def run(chosen):
    def function(params, x, branch, branch_bias):
      with norm_kernels.chosen(chosen):
        if mode == "alone":
          return x, norm.apply({"params": params}, x)
        pair = (branch, branch_bias) if mode == "add" else None
        return norm.apply({"params": params}, x, pair, method="keep")

    out, pull = jax.vjp(function, params, x, branch, branch_bias)
    return out, pull((through, gradient))

  stock = run("xla")
  assert not kernels
  ours = run("auto")
  assert kernels == [(np.prod(shape[:-1]), shape[-1])]
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(stock), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b) + 1e-6


def run_norm(x, scale, bias, gradient):
  norm = elementwise.LayerNorm(1e-6, jnp.bfloat16)

  def apply(x, scale, bias):
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

  out, pull = jax.vjp(apply, x, scale, bias)
  return out, pull(gradient)


@pytest.mark.parametrize("shape", ((8, 48, 64), (8, 24, 4, 64)))
def test_eight_devices_are_one(kernels, shape):
  """Rows on a mesh, and heads where there are some; sums of all shards."""
  devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
  x, gradient = (jnp.asarray(draw(shape, i), jnp.bfloat16) for i in range(2))
  scale, bias = (jnp.asarray(draw(shape[-1:], i)) for i in (2, 3))
  alone = jax.jit(run_norm)(x, scale, bias, gradient)
  with jax.set_mesh(mesh):
    spread = jax.jit(run_norm)(x, scale, bias, gradient)
  for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2, atol=1e-2)
  rows = int(np.prod(shape[:-1]))
  assert kernels == [(rows, 64), (rows // (4 if len(shape) == 3 else 8), 64)]


UNFIT = (
  ((2, 3, 100), "bfloat16"), ((2, 7, 64), "bfloat16"), ((4, 48, 64), "float32"),
  ((64, 64), "bfloat16"), ((2, 4, 6144), "bfloat16"),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), UNFIT)
def test_shapes_that_are_not_for_the_kernels_go_by_xla(kernels, shape, dtype):
  x = jnp.ones(shape, dtype)
  assert not norm_kernels.usable(x, jnp.dtype(dtype)), shape
  norm = elementwise.LayerNorm(1e-6, jnp.dtype(dtype))
  norm.apply(norm.init(jax.random.key(0), x), x)
  assert not kernels


def test_what_the_compiler_refuses_goes_by_xla_and_is_said_once(monkeypatch, caplog):
  monkeypatch.setattr(fused_attention, "unavailable", lambda: "")

  def refuse(traced):
    raise jax.errors.JaxRuntimeError("INTERNAL: no Triton for this card\nmore")

  monkeypatch.setattr(fused_attention, "compile_probe", refuse)
  x = jnp.ones((4, 48, 64), jnp.bfloat16)
  try:
    assert not norm_kernels.usable(x, x.dtype) and not norm_kernels.usable(x, x.dtype)
    said = [r.getMessage() for r in caplog.records]
    assert said == [
      "LayerNorm of 64 bfloat16 goes by XLA: its kernels are refused: INTERNAL: no Triton for this"
      " card"
    ]
  finally:
    norm_kernels._refusals.clear()


@pytest.mark.parametrize("width", (64, 512, 768))
def test_they_lower_for_cuda(width):
  """Triton's form of both is made without a GPU; compiling it needs one, or `grain_jax.plan`."""
  text = norm_kernels._trace(width, "bfloat16").lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
