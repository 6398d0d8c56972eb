"""`python -m bench.train_step --device=gpu`: our step on a GPU beside a compiled PyTorch peer.

Each case (side, batch, rematerialisation, matcher) is a process of its own. Several compile at
once; whoever is ready is timed alone, all others stopped meanwhile. A JSON line a case goes out as
soon as it is known, the cases that matter most first, so that a run cut short loses only what it
did not reach. Compiled programs are kept in a folder and found again by the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import train_step_sides as sides
from bench.train_step_gpu_sides import Case
from grain_jax.models import initial

ROOT = pathlib.Path(__file__).parent.parent

# In the order of what matters: both sides at equal batch, then towards each one's best; the other
# matcher; then what explains the rest.
CASES = (
  Case("ours", 256),
  Case("peer", 256),
  Case("ours", 512),
  Case("peer", 512),
  Case("ours", 768),
  Case("peer", 768),
  Case("ours", 1024, remat="elementwise"),
  Case("ours", 256, matcher="host"),
  Case("ours", 128),
  Case("peer", 128),
  Case("ours", 256, norm="xla"),
  Case("ours", 256, attention="xla"),
  Case("ours", 256, remat="elementwise"),
  Case("ours", 256, remat="elementwise", unroll=1),
  Case("ours", 1024, remat="block"),
  Case("ours", 256, remat="block"),
)
_TIMING_SECONDS = 90.0  # a case that takes longer than that to be timed is given up
# Batches of a rehearsal are smaller by so much.
_REHEARSAL = 64
# A model that a CPU compiles in seconds; all parts are there.
SMALL = (
  "model.embed_dim=16,model.image.size=32,model.image.width=32,model.image.depth=2,"
  "model.image.heads=2,model.text.width=32,model.text.depth=2,model.text.heads=2,"
  "model.text.vocab_size=500,model.decoder.width=32,model.decoder.depth=2,model.decoder.heads=2,"
  "model.decoder.mlp_dim=32"
)


def _say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def _of_memory(error: str) -> bool:
  """Whether the GPU's memory was too small."""
  return any(words in error for words in ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory"))


@dataclasses.dataclass
class _Worker:
  """A process with its case."""

  case: Case
  process: subprocess.Popen
  started: float
  paused: float = 0.0  # seconds for which it was stopped
  stage: str = "compiling"  # compiling | ready | timing
  alone: bool = True  # no other was alive while it worked

  def signal(self, number: int) -> None:
    """To it and to what it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
      os.killpg(self.process.pid, number)

  def end(self) -> None:
    self.signal(signal.SIGCONT)
    self.signal(signal.SIGKILL)
    self.process.wait()


class Bench:
  """Runs the cases; `emit` gets a dict for each as soon as it is known."""

  def __init__(
    self,
    task: dict[str, Any],
    cases: Sequence[Case],
    *,
    jobs: int,
    seconds: float,
    folder: pathlib.Path,
    emit: Callable[[dict[str, Any]], None],
    command: Sequence[str] = (sys.executable, "-m", "bench.train_step_gpu_sides"),
  ):
    self._task, self._waiting, self._jobs = task, list(cases), jobs
    self._order = {case: i for i, case in enumerate(cases)}
    self._began = time.monotonic()
    self._deadline = self._began + seconds
    self._folder, self._emit, self._command = folder, emit, tuple(command)
    self._events: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
    self._alive: list[_Worker] = []
    self._tried: set[Case] = set()

  def run(self) -> list[Case]:
    """All cases until the time is up; what was not measured."""
    missing: list[Case] = []
    try:
      while (self._waiting or self._alive) and time.monotonic() < self._deadline:
        self._start_some()
        try:
          worker, event = self._events.get(timeout=min(1.0, self._left()))
        except queue.Empty:
          continue
        missing += self._handle(worker, event)
    finally:
      left = [w.case for w in self._alive] + self._waiting
      for worker in self._alive:
        worker.end()
    return missing + sorted(left, key=self._order.__getitem__)

  def _left(self) -> float:
    return max(self._deadline - time.monotonic(), 0.01)

  def _start_some(self) -> None:
    compiling = [w for w in self._alive if w.stage == "compiling"]
    while self._waiting and len(compiling) < self._jobs:
      case = self._waiting[0]
      if case in self._tried and self._alive:
        break  # it ran out of memory beside others: alone, and last
      worker = self._start(self._waiting.pop(0))
      compiling.append(worker)
      self._alive.append(worker)
      for other in self._alive:
        other.alone = len(self._alive) == 1

  def _start(self, case: Case) -> _Worker:
    environment = {
      **os.environ,
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes on one GPU
      "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
      "JAX_COMPILATION_CACHE_DIR": str(self._folder / "jax"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as a run keeps them
      "TORCHINDUCTOR_CACHE_DIR": str(self._folder / "inductor"),
      "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    if self._task["rehearse"]:
      environment["JAX_PLATFORMS"] = "cpu"
    else:
      environment.pop("JAX_PLATFORMS", None)
    log = (self._folder / f"{case.name}.log").open("w")
    process = subprocess.Popen(
      self._command, cwd=ROOT, env=environment, text=True, start_new_session=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
    )  # fmt: skip
    log.close()
    worker = _Worker(case, process, time.monotonic())
    self._send(worker, json.dumps({**self._task, "case": dataclasses.asdict(case)}))
    threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
    return worker

  def _send(self, worker: _Worker, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # `_listen` tells of its end
      worker.process.stdin.write(f"{line}\n")
      worker.process.stdin.flush()

  def _listen(self, worker: _Worker) -> None:
    for line in worker.process.stdout:
      if line.startswith(('{"ready"', '{"timed"', '{"failed"')):  # a library may print as well
        self._events.put((worker, json.loads(line)))
    code = worker.process.wait()
    self._events.put((worker, {"failed": f"ended with code {code}, see {worker.case.name}.log"}))

  def _handle(self, worker: _Worker, event: dict[str, Any]) -> list[Case]:
    """Acts on what a worker says; the cases that are given up by it."""
    if worker not in self._alive:
      return []  # what it said after its result
    if "ready" in event:
      worker.stage = "ready"
      _say(f"{worker.case.name}: ready after {event['ready']['seconds']:.0f} s")
      return self._time_one()
    self._alive.remove(worker)
    worker.end()
    missing = []
    if "timed" in event:
      self._result(worker, event["timed"])
    elif _of_memory(event["failed"]) and not worker.alone and worker.case not in self._tried:
      _say(f"{worker.case.name}: out of memory beside others, to be tried alone")
      self._tried.add(worker.case)
      self._waiting.append(worker.case)
    else:
      fits = False if _of_memory(event["failed"]) else None
      self._result(worker, {"error": event["failed"], "fits": fits})
      missing = [] if fits is False else [worker.case]  # that it does not fit is a result
    return missing + self._time_one()

  def _time_one(self) -> list[Case]:
    """Times the first that is ready, all others stopped, until it has said its last."""
    ready = [w for w in self._alive if w.stage == "ready"]
    if not ready:
      return []
    worker = min(ready, key=lambda w: self._order[w.case])
    others = [w for w in self._alive if w is not worker]
    began = time.monotonic()
    for other in others:
      other.signal(signal.SIGSTOP)
    worker.stage = "timing"
    self._send(worker, "time")
    held: list[tuple[_Worker, dict[str, Any]]] = []
    event: dict[str, Any] | None = None
    while event is None and time.monotonic() < min(self._deadline, began + _TIMING_SECONDS):
      try:
        who, said = self._events.get(timeout=min(1.0, self._left()))
      except queue.Empty:
        continue
      if who is worker:
        event = said
      else:
        held.append((who, said))
    for other in others:
      other.signal(signal.SIGCONT)
      if other.stage == "compiling":
        other.paused += time.monotonic() - began
    for item in held:
      self._events.put(item)
    event = event or {"failed": f"not timed within {time.monotonic() - began:.0f} s"}
    return self._handle(worker, event)

  def _result(self, worker: _Worker, found: dict[str, Any]) -> None:
    result = {"case": worker.case.name, **dataclasses.asdict(worker.case)}
    if worker.case.side == "peer":
      for key in ("remat", "matcher", "attention", "unroll", "norm"):
        del result[key]
    if "seconds_to_first_step" in found:
      # While it was stopped it could not compile.
      found["seconds_to_first_step"] -= worker.paused
    self._emit({**result, **found, "at_seconds": time.monotonic() - self._began})


def flops_per_sample(recipe: str, *, batch: int, row_length: int) -> dict[str, float]:
  """{'useful': no padding, nothing twice; 'padded': as `utilization` counts}, of a sample."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  from grain_jax import flops
  from grain_jax.models import grain
  from grain_jax.plan import useful
  from grain_jax.runtime import mesh as meshes
  from grain_jax.training import steps, utilization

  config = Case("ours", batch, attention="xla", unroll=1).config(
    recipe, row_length=row_length, seed=0
  )
  mesh = meshes.create(config, jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, state, shardings, optimizer = steps.create_state(
      grain.build(config), config, mesh, total_steps=1000, steps_per_epoch=100
    )
    step = steps.make_train_step(grain.build(config), config, mesh, optimizer, shardings)
    jaxpr = step.trace(state, initial.dummy_batch(config, batch)).jaxpr
  mean = (sum(sides.CAPTION_TOKENS) / 2, sum(sides.DESCRIPTION_TOKENS) / 2)
  found = useful.useful_flops(
    flops.count(jaxpr.jaxpr), config, batch=batch, caption=mean[0], description=mean[1]
  )
  return {"useful": found / batch, "padded": utilization.model_flops(config)}


def with_speed(line: dict[str, Any], flops: dict[str, float]) -> dict[str, Any]:
  """A result with samples a second and the two MFUs."""
  if "seconds_per_step" not in line:
    return line
  from grain_jax.training import utilization

  speed = line["batch"] / line["seconds_per_step"]
  line = {**line, "samples_per_s": speed}
  peak = utilization.peak_flops(line["device"])
  line["mfu_useful"] = speed * flops["useful"] / peak if peak else None
  if line["side"] == "ours":
    line["mfu_padded"] = speed * flops["padded"] / peak if peak else None
  return line


def best(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Ours over the peer: each at its own best, and at equal batch; None where one is missing."""
  timed = [line for line in lines if "samples_per_s" in line]

  def fastest(side: str, batch: int | None = None) -> dict[str, Any] | None:
    found = [x for x in timed if x["side"] == side and batch in (None, x["batch"])]
    return max(found, key=lambda x: x["samples_per_s"], default=None)

  result: dict[str, Any] = {}
  batches = sorted({x["batch"] for x in timed if x["side"] == "peer"})
  for name, batch in (("own_best", None), *((f"batch_{b}", b) for b in batches)):
    ours, peer = fastest("ours", batch), fastest("peer", batch)
    result[name] = {
      "ours": ours and ours["case"],
      "peer": peer and peer["case"],
      "ratio": ours["samples_per_s"] / peer["samples_per_s"] if ours and peer else None,
    }
  return result


def main(
  recipe: str,
  *,
  row_length: int | None,
  seed: int,
  minutes: float,
  jobs: int,
  folder: str,
  only: str,
  rehearse: bool,
) -> int:
  """Runs and prints; the exit code: 0 where every case was measured."""
  cases = [case for case in CASES if only in case.name]
  if not cases:
    raise ValueError(f"--only={only} fits none of {', '.join(case.name for case in CASES)}.")
  if rehearse:
    recipe += ("," if ":" in recipe else ":") + SMALL
    cases = [dataclasses.replace(case, batch=max(case.batch // _REHEARSAL, 2)) for case in cases]
    # cuDNN by name is an error on a CPU.
    cases = [case for case in dict.fromkeys(cases) if case.attention != "cudnn"]
  from grain_jax import config as configs

  row_length = row_length or configs.load(recipe).data.row_length
  place = pathlib.Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  flops: dict[str, float] = {}
  lines: list[dict[str, Any]] = []
  # A caller's SIGTERM ends the workers too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

  def count() -> None:
    flops.update(
      flops_per_sample(recipe, batch=max(c.batch for c in cases[:1]), row_length=row_length)
    )

  counting = threading.Thread(target=count)
  counting.start()  # while the first cases compile

  def emit(line: dict[str, Any]) -> None:
    counting.join()
    if not flops:
      raise RuntimeError("the FLOPs of the step could not be counted; the error stands above.")
    lines.append(with_speed(line, flops))
    print(json.dumps(lines[-1]), flush=True)

  task = {"recipe": recipe, "row_length": row_length, "seed": seed, "rehearse": rehearse}
  missing = Bench(
    task, cases, jobs=jobs or max(2, sides.cores() // 2), seconds=60 * minutes, folder=place,
    emit=emit,
  ).run()  # fmt: skip
  counting.join()
  end = {
    "compared": best(lines),
    "missing": [case.name for case in missing],
    "flops_per_sample": flops,
    "row_length": row_length,
    "seconds": time.monotonic() - began,
    "rehearsal": rehearse,
  }
  print(json.dumps(end), flush=True)
  return 1 if missing else 0
