"""What a compiled program moves: memory traffic with its causes, and collectives.

XLA's own cost analysis counts the body of a loop once. Here each instruction counts as often as it
runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from grain_jax import objectives
from grain_jax.models import vit
from grain_jax.models.attention import SCOPE
from grain_jax.plan import hlo as plan_hlo
from grain_jax.plan.chips import Collective

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# What moves nothing, or is counted where it starts or inside.
_FREE = frozenset(
  [
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-done",
    "async-update", "opt-barrier", "domain", "send", "send-done", "recv", "recv-done", "infeed",
    "outfeed",
  ]
)  # fmt: skip


def first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
  """Devices of the first group of a collective, in any of the forms that HLO writes them."""
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if listed:
    return tuple(int(i) for i in listed.group(1).split(","))
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
  if pairs:
    return tuple(int(i) for i in pairs.groups())
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    shape, dims = ([int(i) for i in iota.group(k).split(",")] for k in (1, 2))
    ids = np.arange(math.prod(dims)).reshape(dims)
    if iota.group(3):
      ids = ids.transpose([int(i) for i in iota.group(3).split(",")])
    return tuple(int(i) for i in ids.reshape(shape)[0].reshape(-1))
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
  if mesh:
    axes = re.findall(r"'([^']*)'=(\d+)", mesh.group(1))
    grouped = re.findall(r"'([^']*)'", mesh.group(2))
    ids = np.arange(math.prod(int(size) for _, size in axes))
    ids = ids.reshape([int(size) for _, size in axes])
    index = tuple(slice(None) if axis in grouped else 0 for axis, _ in axes)
    return tuple(int(i) for i in np.ravel(ids[index]))
  return tuple(range(num_devices))


@dataclasses.dataclass(frozen=True)
class _CollectiveOp:
  """The instruction of a collective, alone or within a fusion."""

  kind: str
  instruction: plan_hlo.Instruction
  computation: plan_hlo.Computation
  fused: bool

  @property
  def channel(self) -> str:
    """Identifies a collective that the compiler spread over several instructions."""
    found = re.search(r"channel_id=(\d+)", self.instruction.attributes)
    return found.group(1) if found else self.instruction.name

  def to_collective(self, num_devices: int, times: int) -> Collective:
    group = first_group(self.instruction.attributes, num_devices)
    operands = (self.computation.instructions[o] for o in self.instruction.operands)
    payload = sum(a.bytes for operand in operands for a in operand.types)
    if self.kind == "all-gather":
      payload *= len(group)
    return Collective(self.kind, payload, group, times, self.instruction.path)


def _collective_ops(
  module: plan_hlo.Module, computation: plan_hlo.Computation, *, kind: str = "", fused: bool = False
) -> Iterator[_CollectiveOp]:
  """The collectives of a computation and of the fusions it calls."""
  for i in computation.instructions.values():
    base = i.op.removesuffix("-start")
    if base in COLLECTIVES:
      yield _CollectiveOp(kind or base, i, computation, fused)
    elif i.op in ("fusion", "async-start") and (name := i.called("calls")):
      # A TPU's reduce-scatter is an all-reduce of which each chip keeps a shard, in one fusion.
      inner = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
      yield from _collective_ops(
        module, module.computations[name], kind=inner, fused=fused or i.op == "fusion"
      )


def collectives(module: plan_hlo.Module) -> list[Collective]:
  """All collectives of a step.

  A TPU's compiler spreads one collective over several fusions, and over the iterations of a loop
  that it overlaps with: these share a channel and count as one, as often as the rarest runs.
  """
  found: dict[tuple[str, str], tuple[_CollectiveOp, int]] = {}
  for computation, times in module.executed():
    for op in _collective_ops(module, computation):
      key = (op.channel, "" if op.fused else f"{computation.name} {op.instruction.name}")
      if key not in found or times < found[key][1]:
        found[key] = op, times
  fused = {channel for channel, where in found if not where}
  return [
    op.to_collective(module.num_devices, times)
    for (channel, where), (op, times) in found.items()
    if not where or channel not in fused
  ]


def is_gradient_reduction(exchange: Collective) -> bool:
  """Whether it adds up gradients of parameters: a reduction within the model's backward pass.

  Features and logits of the losses have no module of the model in their path.
  """
  reduces = exchange.kind in ("all-reduce", "reduce-scatter")
  return reduces and bool(re.search(r"transpose\(jvp\(\w+\)\)", exchange.name))


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that one instruction reads and writes in a step."""

  path: str
  op: str
  bytes: int


def _parameters(fusion: plan_hlo.Computation) -> dict[int, str]:
  """Names of a fusion's parameters by the number of the operand they stand for."""
  return {int(p.argument): p.name for p in fusion.instructions.values() if p.op == "parameter"}


def _slice_reads(
  module: plan_hlo.Module, fusion: plan_hlo.Computation, name: str, depth: int = 0
) -> int | None:
  """Bytes read of a value in a fusion where only slices of it are; None: all of it."""
  total = 0
  for user in fusion.users.get(name, []):
    inner: list[int | None] = []
    if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      inner = [sum(a.bytes for a in user.types)]
    elif user.op == "dynamic-update-slice" and user.operands[0] == name:
      continue  # in place: only the update moves, as part of the result
    elif user.op in ("bitcast", "get-tuple-element") and depth < 8:
      inner = [_slice_reads(module, fusion, user.name, depth + 1)]
    elif user.op == "fusion" and depth < 8:  # within a fusion there may be others
      callee = module.computations[user.called("calls") or ""]
      names = _parameters(callee)
      numbers = [number for number, operand in enumerate(user.operands) if operand == name]
      inner = [_slice_reads(module, callee, names[number], depth + 1) for number in numbers]
    if not inner or None in inner:
      return None
    total += sum(inner)
  return total


def _bytes_written(fusion: plan_hlo.Computation, name: str) -> int | None:
  """Bytes written by a fusion's result where it is an update in place; None: all of it."""
  instruction = fusion.instructions[name]
  while instruction.op == "bitcast" and instruction.operands:
    instruction = fusion.instructions[instruction.operands[0]]
  if instruction.op != "dynamic-update-slice":
    return None
  return sum(a.bytes for a in fusion.instructions[instruction.operands[1]].types)


def _bytes_moved(
  module: plan_hlo.Module,
  computation: plan_hlo.Computation,
  i: plan_hlo.Instruction,
  hbm_only: bool,
) -> int:
  """Bytes that an instruction reads and writes."""

  def size(types: Sequence[plan_hlo.Array]) -> int:
    return sum(a.bytes for a in types if not (hbm_only and a.on_chip))

  def read(name: str) -> int:
    return size(computation.instructions[name].types)

  if i.op in ("copy-start", "slice-start"):  # (to, from, context) or ((from), to, context)
    to = i.types[0] if i.op == "copy-start" else i.types[1]
    source = computation.instructions[i.operands[0]].types[0]
    return size([to]) + (0 if hbm_only and source.on_chip else to.bytes)
  if i.op in ("dynamic-slice", "slice", "gather"):
    return 2 * size(i.types)
  if i.op == "dynamic-update-slice":
    return 2 * read(i.operands[1])
  if i.op == "scatter":
    return 3 * read(i.operands[-1])
  if i.op.removesuffix("-start") in COLLECTIVES:
    return 2 * sum(read(o) for o in i.operands)
  called = i.called("calls") if i.op == "fusion" else None
  fusion = module.computations.get(called or "")
  if fusion is None:
    types = i.types
    if '"__cu' in i.attributes and len(types) > 1 and types[-1].dtype in ("s8", "u8"):
      types = types[:-1]  # workspace of cuBLAS or cuDNN
    return size(types) + sum(read(o) for o in i.operands)
  total = 0
  names = _parameters(fusion)
  for number, operand in enumerate(i.operands):
    sliced = _slice_reads(module, fusion, names[number]) if number in names else None
    total += read(operand) if sliced is None else min(sliced, read(operand))
  results = fusion.root.operands if fusion.root.op == "tuple" else (fusion.root.name,)
  for result, array in zip(results, i.types, strict=False):
    update = _bytes_written(fusion, result)
    total += size([array]) if update is None else min(update, size([array]))
  return total


def traffic(
  module: plan_hlo.Module, *, hbm_only: bool = True, trip_counts: bool = True
) -> list[Traffic]:
  """Bytes moved by each instruction of a step, times of execution included.

  Args:
    module: the program.
    hbm_only: leave out arrays that the compiler placed in on-chip memory.
    trip_counts: count the body of a loop as often as it runs; else once, as XLA does.
  """
  found = []
  for computation, times in module.executed():
    for i in computation.instructions.values():
      if i.op in _FREE or (i.op.endswith("-done") and i.op != "fusion"):
        continue
      size = _bytes_moved(module, computation, i, hbm_only) * (times if trip_counts else 1)
      if size:
        found.append(Traffic(i.path, i.op, size))
  return found


def modelled(found: Sequence[Traffic], attention: float) -> float:
  """Bytes of a step in which attention reads its operands and writes its results once.

  Args:
    found: of `traffic`.
    attention: bytes of those operands and results (`attention_bytes`).
  """
  inside = re.compile(rf"\b{SCOPE}\b")
  return sum(t.bytes for t in found if not inside.search(t.path)) + attention


def attention_bytes(config: ml_collections.ConfigDict, *, images: float, align: int) -> float:
  """Bytes of operands and results of the towers' attention, forward and backward, for `images`.

  Forward it reads queries, keys and values and writes a result; backward it reads these and the
  result's gradient and writes three gradients. With `remat=block` forward comes once more, with
  microbatches too, and a teacher has one of its own. The last layer of a text tower, whose few
  queries need no keys, is counted as compiled; a T5's last layer is like the others.

  Args:
    config: a resolved configuration.
    images: of a device.
    align: to which multiple the image tower pads its tokens.
  """
  m = config.model
  size = 4 if m.dtype == "float32" else 2
  patches = (m.image.size // m.image.patch) ** 2
  text_layers = m.text.depth - (m.text.kind != "t5")
  texts = text_layers * config.data.row_length * m.text.width

  def arrays(patches: int) -> int:
    tokens = -(-(patches + int(m.image.class_token)) // align) * align
    return m.image.depth * tokens * m.image.width + texts

  units = 8 + 4 * (1 + (m.remat == "block") + (config.accumulate > 1))
  total = units * arrays(vit.kept_patches(patches, m.image.patch_dropout))
  if objectives.needs_teacher(config):  # which sees all patches
    total += 4 * arrays(patches)
  return float(images * size * total)


def module_and_op(path: str) -> str:
  """The module of the model and the operation of a path of names, for people.

  'jit(train_step)/transpose(jvp(Grain))/Grain.encode_text/text_tower/norm1/mul' becomes
  'text_tower/norm1/mul (backward)'.
  """
  names = [n for n in path.split("/") if n]
  backward = any(n.startswith("transpose(") for n in names)
  plain = [
    n
    for n in names
    if not re.match(r"(jit|jvp|transpose|vmap|remat|checkpoint|shard_map|while|body|cond)\b", n)
    and not re.match(r"(closed_call|Grain\.|rematted_computation|_?blocks?$|.*\._blocks)", n)
  ]
  return ("/".join(plain) or "optimizer and rest") + (" (backward)" if backward else "")


def causes(found: Sequence[Traffic], largest: int = 3) -> list[tuple[str, int]]:
  """The modules that move most, and their bytes; unnamed instructions are compiler copies."""
  total: dict[str, int] = {}
  for item in found:
    name = module_and_op(item.path) if item.path else f"compiler's {item.op.removesuffix('-start')}"
    total[name] = total.get(name, 0) + item.bytes
  return sorted(total.items(), key=lambda kv: -kv[1])[:largest]
