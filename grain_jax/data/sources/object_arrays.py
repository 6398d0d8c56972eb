"""Object arrays of NumPy files, read without unpickling: nothing in a file can run.

`np.save` of Python objects writes a pickle, a program for a small machine. Here that program is
read by a machine that builds lists, dicts, tuples, texts, numbers, booleans and None, and the one
array of objects around them; whatever else it asks for is refused by name.
"""

from __future__ import annotations

import pathlib
import pickletools
from collections.abc import Iterator
from typing import Any

import numpy as np

from grain_jax import failures

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE = "reconstruct", "ndarray", "dtype", "encode"
_NAMES = {
  **{(module, "_reconstruct"): _RECONSTRUCT for module in _ARRAY_MODULES},
  ("numpy", "ndarray"): _NDARRAY,
  ("numpy", "dtype"): _DTYPE,
  ("_codecs", "encode"): _ENCODE,  # how protocol 2 writes the bytes b"b" of an empty array
}
_CONSTANTS = frozenset(
  (
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
  )
)  # fmt: skip
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class _Name:
  """What a pickle asks for by module and name, of `_NAMES`; never the thing itself."""

  def __init__(self, kind: str):
    self.kind = kind


class _Array:
  """An array of objects that is being built: its shape and list."""

  def __init__(self) -> None:
    self.items: list[Any] | None = None


class _Dtype:
  """The data type of objects."""


class Refused(ValueError):
  """A file that holds more than data, or is damaged; one line without the file's name."""


def read(path: pathlib.Path) -> list[Any]:
  """The objects of a .npy file.

  Raises:
    ValueError: it is no such file, is damaged, or asks for more than data; one line.
  """
  try:
    with path.open("rb") as file:
      shape, _, dtype = _header(file)
      if dtype.hasobject:
        data = failures.retry_read(file.read, path)
        items = _Machine().run(data)
        if len(items) != int(np.prod(shape)):
          raise Refused(f"its header says {shape}, and there are {len(items)} objects")
        return items
      raise Refused(f"an array of {dtype}, not of objects")
  except Refused as error:
    raise ValueError(f"{path} cannot be read: {error}. Get the file once more.") from None


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  try:
    version = np.lib.format.read_magic(file)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    return read(file)
  except (ValueError, KeyError, EOFError, SyntaxError, TypeError):
    raise Refused("it does not begin as a .npy file does") from None


class _Machine:
  """Runs the harmless part of a pickle's program."""

  def __init__(self) -> None:
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self, data: bytes) -> list[Any]:
    """The items of the array that the program builds."""
    try:
      for operation, argument, _ in _operations(data):
        if operation == "STOP":
          break
        self._step(operation, argument)
      (found,) = self._stack
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
      if isinstance(error, Refused):
        raise
      raise Refused("damaged: its operations do not fit together") from None
    if not isinstance(found, _Array) or found.items is None:
      raise Refused("it holds no array of objects")
    return found.items

  def _step(self, operation: str, argument: Any) -> None:
    stack = self._stack
    if operation in _CONSTANTS:
      stack.append(argument)
    elif operation in _VALUES:
      stack.append(_VALUES[operation])
    elif operation in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
      stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[operation]())
    elif operation in ("BINGET", "LONG_BINGET", "GET"):
      stack.append(self._memo[argument])
    elif operation in ("BINPUT", "LONG_BINPUT", "PUT"):
      self._memo[argument] = stack[-1]
    elif operation == "MEMOIZE":
      self._memo[len(self._memo)] = stack[-1]
    elif operation == "MARK":
      stack.append(_MARK)
    elif operation in ("TUPLE1", "TUPLE2", "TUPLE3"):
      count = int(operation[-1])
      stack[-count:] = [tuple(stack[-count:])] if len(stack) >= count else self._fail()
    elif operation in ("TUPLE", "LIST", "DICT"):
      items = self._take_to_mark()
      stack.append(self._made(operation, items))
    elif operation in ("APPEND", "APPENDS"):
      items = [stack.pop()] if operation == "APPEND" else self._take_to_mark()
      self._expect(stack[-1], list).extend(items)
    elif operation in ("SETITEM", "SETITEMS"):
      items = self._pop_two() if operation == "SETITEM" else self._take_to_mark()
      self._expect(stack[-1], dict).update(_pairs(items))
    elif operation in ("GLOBAL", "STACK_GLOBAL"):
      module, name = argument.split(" ") if operation == "GLOBAL" else self._pop_two()
      if (module, name) not in _NAMES:
        raise Refused(f"it asks for {module}.{name}, which is no data; nothing of it was run")
      stack.append(_Name(_NAMES[module, name]))
    elif operation == "REDUCE":
      self._reduce()
    elif operation == "BUILD":
      self._build()
    elif operation not in ("PROTO", "FRAME"):
      raise Refused(f"it has the operation {operation}, which is no data; nothing of it was run")

  def _reduce(self) -> None:
    name, arguments = self._pop_two()
    kind = self._expect(name, _Name).kind
    if kind == _RECONSTRUCT:
      if not isinstance(arguments[0], _Name) or arguments[0].kind != _NDARRAY:
        self._fail()
      self._stack.append(_Array())
    elif kind == _DTYPE and arguments[0] in ("O8", "O4", "O", "|O"):
      self._stack.append(_Dtype())
    elif kind == _ENCODE and all(isinstance(text, str) for text in arguments):
      self._stack.append(arguments[0])
    else:
      raise Refused(f"it makes a {kind} of something else than objects; nothing of it was run")

  def _build(self) -> None:
    target, state = self._pop_two()
    if isinstance(target, _Array):
      _, _, dtype, _, items = state
      self._expect(dtype, _Dtype)
      target.items = self._expect(items, list)
    else:
      self._expect(target, _Dtype)
    self._stack.append(target)

  def _take_to_mark(self) -> list[Any]:
    at = len(self._stack) - 1
    while self._stack[at] is not _MARK:  # `in` would compare what a file made
      at -= 1
      if at < 0:
        self._fail()
    items = self._stack[at + 1 :]
    del self._stack[at:]
    return items

  def _pop_two(self) -> list[Any]:
    second, first = self._stack.pop(), self._stack.pop()
    return [first, second]

  def _made(self, operation: str, items: list[Any]) -> Any:
    if operation == "DICT":
      return _pairs(items)
    return tuple(items) if operation == "TUPLE" else items

  @staticmethod
  def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
      _Machine._fail()
    return value

  @staticmethod
  def _fail() -> Any:
    raise Refused("damaged: its operations do not fit together")


def _operations(data: bytes) -> Iterator[tuple[str, Any, int | None]]:
  try:
    for operation, argument, place in pickletools.genops(data):
      yield operation.name, argument, place
  except (ValueError, UnicodeDecodeError, OverflowError) as error:
    why = " ".join(str(error).split())[:100]
    raise Refused(f"damaged: {why}") from None


def _pairs(items: list[Any]) -> dict[Any, Any]:
  return dict(zip(items[::2], items[1::2], strict=True))
