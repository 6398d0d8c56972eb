"""Memory of batches that processes share: nameless, so that nothing is left whoever is killed.

It is a file without a name, whose descriptor the workers inherit: the system frees it with the last
process that holds it. It does not lie in /dev/shm, whose size containers limit to 64 MB.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence

import numpy as np

_ALIGN = 128  # bytes; JAX takes over arrays as they lie where they begin at 64 or more

Shapes = Sequence[tuple[Sequence[int], np.dtype]]


def create(size: int) -> int:
  """The descriptor of so many bytes of fresh memory."""
  if hasattr(os, "memfd_create"):
    descriptor = os.memfd_create("grain_jax", os.MFD_CLOEXEC)
  else:  # macOS
    with tempfile.TemporaryFile() as file:
      descriptor = os.dup(file.fileno())
  os.ftruncate(descriptor, size)
  return descriptor


class Slots:
  """Places for batches, each an array a field, in shared memory.

  Attributes:
    size: bytes of all of it.
  """

  def __init__(self, shapes: Shapes, count: int):
    """`shapes`: of the arrays of a batch and their dtypes; `count`: batches."""
    self._shapes = [(tuple(shape), np.dtype(dtype)) for shape, dtype in shapes]
    self._offsets, end = [], 0
    for shape, dtype in self._shapes:
      self._offsets.append(end)
      end += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
    self._stride, self.size = end, end * count

  def attach(self, descriptor: int) -> None:
    """Maps the memory, whose descriptor may then be closed."""
    self._bytes = np.frombuffer(mmap.mmap(descriptor, self.size), np.uint8)

  def arrays(self, slot: int) -> list[np.ndarray]:
    """The arrays of a slot, to be written to."""
    return self._views(self._bytes[slot * self._stride : (slot + 1) * self._stride])

  def lend(self, slot: int, on_return: Callable[[int], None]) -> list[np.ndarray]:
    """The arrays of a slot; `on_return(slot)` is called when nothing refers to any of them.

    Views of them, and what JAX makes of them without a copy, refer to them.
    """
    lease = _Lease(self._bytes[slot * self._stride : (slot + 1) * self._stride])
    weakref.finalize(lease, on_return, slot).atexit = False
    return self._views(np.asarray(lease))

  def _views(self, flat: np.ndarray) -> list[np.ndarray]:
    found = []
    for (shape, dtype), offset in zip(self._shapes, self._offsets, strict=True):
      size = math.prod(shape) * dtype.itemsize
      found.append(flat[offset : offset + size].view(dtype).reshape(shape))
    return found


class _Lease:
  """What arrays that are lent refer to (NumPy's array interface)."""

  def __init__(self, part: np.ndarray):
    self._part = part  # and with it the mapping
    self.__array_interface__ = part.__array_interface__
