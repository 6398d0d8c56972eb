"""XLA's text of a compiled program (HLO), read: instructions, computations, trip counts.

The trip count of a loop stands in the text, as `known_trip_count` or as the bound that its
condition compares a counter with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_VMEM = "S(1)"  # a TPU's on-chip memory, in a layout


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of one array in HLO."""

  dtype: str
  shape: tuple[int, ...]
  layout: str = ""

  @property
  def bytes(self) -> int:
    """Without padding to tiles."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      digits = re.search(r"\d+", self.dtype)
      bits = int(digits.group()) if digits else 8
    return math.prod(self.shape) * bits // 8

  @property
  def on_chip(self) -> bool:
    """In a TPU's on-chip memory, not in HBM."""
    return _VMEM in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str
  op: str
  types: tuple[Array, ...]  # of the result; a tuple's are flat
  operands: tuple[str, ...]
  argument: str  # text between the parentheses
  attributes: str  # text after them
  root: bool

  def called(self, key: str) -> str | None:
    """Computation that an attribute such as 'body' or 'calls' names."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found.group(1) if found else None

  @functools.cached_property
  def path(self) -> str:
    """Names of the modules and functions it comes from ('jit(f)/jvp(Grain)/.../dot_general')."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """A list of instructions, by name."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """{name: instructions that read it}."""
    found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        found.setdefault(operand, []).append(instruction)
    return found


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"HLO line without a closing parenthesis: {text[:80]}")


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def _instruction(line: str) -> Instruction | None:
  head, equals, rest = line.strip().partition(" = ")
  if not equals or not re.fullmatch(r"(ROOT )?%?[\w.\-]+", head):
    return None
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  call = re.match(r"\s*([a-z][\w\-]*)\(", rest[end:])
  if call is None:
    return None
  opening = end + call.end() - 1
  closing = _closing(rest, opening)
  argument = rest[opening + 1 : closing]
  return Instruction(
    name=head.removeprefix("ROOT ").lstrip("%"),
    op=call.group(1),
    types=_arrays(rest[:end]),
    operands=tuple(_NAME.findall(argument)),
    argument=argument,
    attributes=rest[closing + 1 :],
    root=head.startswith("ROOT "),
  )


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations and the one that starts."""

  computations: dict[str, Computation]
  entry: str
  num_devices: int

  def executed(self) -> Iterator[tuple[Computation, int]]:
    """Computations whose instructions run one by one, and how often: entry, loops, branches.

    Of the branches of a condition all count once, as if each were taken.
    """
    yield from self._executed(self.entry, 1)

  def _executed(self, name: str, times: int) -> Iterator[tuple[Computation, int]]:
    computation = self.computations[name]
    yield computation, times
    for i in computation.instructions.values():
      if i.op == "while":
        iterations = times * self.trip_count(computation, i)
        yield from self._executed(i.called("body") or "", iterations)
      elif i.op == "call":
        yield from self._executed(i.called("to_apply") or i.called("calls") or "", times)
      elif i.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = _NAME.findall(branches.group(1)) if branches else []
        names += filter(None, (i.called("true_computation"), i.called("false_computation")))
        for branch in names:
          yield from self._executed(branch, times)

  def trip_count(self, computation: Computation, loop: Instruction) -> int:
    """Trip count of a while loop; 1 where the text does not say (`unknown_loops`)."""
    known = re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes)
    return int(known.group(1)) if known else self._bound(computation, loop) or 1

  def unknown_loops(self) -> list[str]:
    """Paths of loops whose trip count is not in the text."""
    return [
      i.path or i.name
      for computation, _ in self.executed()
      for i in computation.instructions.values()
      if i.op == "while"
      and "known_trip_count" not in i.attributes
      and self._bound(computation, i) is None
    ]

  def _bound(self, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of `for (i = start; i < bound; i += step)`, from condition, body and operands."""
    condition = self.computations[loop.called("condition") or ""]
    body = self.computations[loop.called("body") or ""]
    test = condition.root
    if test.op == "fusion":  # the comparison in a computation of its own, its operands outside
      inner = self.computations[test.called("calls") or ""]
      inner_test = inner.root
      outside = [
        condition.instructions[test.operands[int(inner.instructions[o].argument)]]
        if inner.instructions[o].op == "parameter"
        else inner.instructions[o]
        for o in inner_test.operands
      ]
      test = inner_test
    else:
      outside = [condition.instructions[o] for o in test.operands]
    if test.op != "compare" or "direction=LT" not in test.attributes or len(outside) != 2:
      return None
    counter, bound = outside
    if counter.op != "get-tuple-element" or bound.op != "constant":
      return None
    index = int(re.search(r"index=(\d+)", counter.attributes).group(1))
    start = _constant(computation, computation.instructions[loop.operands[0]].operands[index])
    step = _increment(body, index)
    if start is None or not step:
      return None
    return -(-(int(bound.argument) - start) // step)


def _constant(computation: Computation, name: str) -> int | None:
  """Value of an integer that is a constant or a copy of one."""
  instruction = computation.instructions[name]
  while instruction.op in ("copy", "bitcast", "convert") and instruction.operands:
    instruction = computation.instructions[instruction.operands[0]]
  is_number = re.fullmatch(r"-?\d+", instruction.argument)
  return int(instruction.argument) if instruction.op == "constant" and is_number else None


def _increment(body: Computation, index: int) -> int | None:
  """The constant that the body adds to the counter, if it does so in the open."""
  if body.root.op != "tuple":
    return None
  update = body.instructions[body.root.operands[index]]
  if update.op != "add":
    return None
  values = [_constant(body, name) for name in update.operands]
  return next((v for v in values if v is not None), None)


def parse(text: str) -> Module:
  """The module of `Compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  entry, name, instructions = "", "", {}
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
    if header and not line.startswith(" "):
      name, instructions = header.group(2), {}
      entry = name if header.group(1) else entry
    elif line.startswith("}") and name:
      computations[name] = Computation(name, instructions)
      name = ""
    elif name and (instruction := _instruction(line)):
      instructions[instruction.name] = instruction
  devices = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
  return Module(computations, entry, int(devices.group(1)) if devices else 1)
