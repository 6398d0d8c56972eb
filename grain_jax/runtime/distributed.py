"""Several processes as one run: joining, agreeing, being preempted, and ending together."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import ml_collections
from jax.experimental import multihost_utils

from grain_jax import cli, failures, local_files
from grain_jax.failures import EXIT_RESTART as RESTART
from grain_jax.runtime import addresses, memory, preemption
from grain_jax.runtime.watchdog import Watchdog

# Seconds after which JAX itself gives up on a process; `watchdog` is quicker and says more.
_HEARTBEAT = 100

# Seconds that a process which is done waits for the others, who may still write results.
_END = 3600.0

# Words of errors that come about when another process is lost in the middle of a collective.
_LOST = re.compile(
  r"gloo|nccl|unavailable|deadline|cancelled|aborted|coordination|heartbeat|socket|connection"
)

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

_watchdog: Watchdog | None = None
_rounds: collections.Counter[str] = collections.Counter()


def _state() -> Any:
  """JAX's record of the processes, read without starting a backend as `jax.process_count` would."""
  from jax._src import distributed as private  # no public way to the key-value store

  return private.global_state


def process_index() -> int:
  """Index of this process, as `jax.process_index`, without starting a backend."""
  return _state().process_id if jax.distributed.is_initialized() else 0


def process_count() -> int:
  """Number of processes, as `jax.process_count`, without starting a backend."""
  return _state().num_processes if jax.distributed.is_initialized() else 1


def report_progress(phase: str, step: int) -> None:
  """Tells the watchdog, if there is one, that this process begins `phase` of `step`."""
  if _watchdog is not None:
    _watchdog.set_phase(phase, step)


def keep_cpu_backend() -> None:
  """Adds the CPU to JAX_PLATFORMS=cuda or tpu, last: callbacks to the host hand their arrays to it.

  To be called before JAX's first use of a device.
  """
  platforms = jax.config.jax_platforms
  if platforms and "cpu" not in platforms.split(","):
    jax.config.update("jax_platforms", f"{platforms},cpu")


def prepare(config: ml_collections.ConfigDict) -> None:
  """Settings that JAX reads with its first program: to be called before processes join."""
  keep_cpu_backend()
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory.GPU_FRACTION))
  flags_of_xla = os.environ.get("XLA_FLAGS", "")
  if config.deterministic and _DETERMINISTIC not in flags_of_xla:
    os.environ["XLA_FLAGS"] = f"{flags_of_xla} {_DETERMINISTIC}".strip()


@contextlib.contextmanager
def session(address: addresses.Address | None, *, limit: float = 0.0) -> Iterator[None]:
  """Around all of a program: joins the others, watches, and ends with them.

  With several processes an error on one ends all of them with its line. A run stopped by SIGTERM
  ends with the exit code `RESTART`, as does one whose storage or machine failed; after Ctrl-C it is
  130.

  Args:
    address: how to join; None: one process.
    limit: longest time without progress, in seconds; 0: any.
  """
  global _watchdog
  if address is not None:
    try:
      _join(address)
    except Exception as error:
      if not is_runtime_failure(error):
        raise
      traceback.print_exc()
      print(_line(error), file=sys.stderr, flush=True)
      _leave(RESTART)
  store = _state().client if process_count() > 1 else None
  _watchdog = Watchdog(
    store, index=process_index(), count=process_count(), limit=limit, leave=_leave
  )
  _watchdog.start()
  try:
    with preemption.interruptible(_watchdog.end, several=process_count() > 1):
      yield
    code = 0
  except preemption.Preempted as stop:
    if process_index() == 0:
      print(stop, file=sys.stderr, flush=True)
    code = stop.code
  except (Exception, KeyboardInterrupt) as error:
    if process_count() > 1:
      _fail(error, _watchdog)
    if not is_runtime_failure(error) and not failures.restart_helps(error):
      _watchdog.stop()
      raise
    if is_runtime_failure(error) or cli.wants_traceback():
      traceback.print_exc()
    print(_line(error), file=sys.stderr, flush=True)
    code = RESTART
  _watchdog.done()
  gather("end", "", seconds=_END)  # watched, so that none waits for a process that is lost
  _watchdog.stop()
  if process_count() > 1:
    jax.distributed.shutdown()
  if code:
    # Threads of the input pipeline may still run; a process that unwinds around them can abort.
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code)


def _leave(code: int) -> None:
  """Ends this process at once; its copies of what lies in buckets go, if the disk lets them."""
  removing = threading.Thread(target=local_files.remove_temporary, daemon=True)
  removing.start()
  removing.join(10)
  os._exit(code)


def _join(address: addresses.Address) -> None:
  """Starts JAX's runtime over all processes, within `address.start_seconds`."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  options: dict[str, Any] = {}
  if address.coordinator is not None:
    options = {
      "coordinator_address": address.coordinator,
      "num_processes": address.num_processes,
      "process_id": address.process_id,
      "local_device_ids": None if address.local_device is None else [address.local_device],
      "cluster_detection_method": "deactivate",
    }
  where = address.coordinator or "the TPU's coordinator"

  def give_up() -> None:
    sys.stderr.write(
      f"error: not all processes ({address.source}) met at {where} within "
      f"{address.start_seconds:g} s. Is each of them started, with the same number of processes, "
      "and the address reachable? --start_seconds sets the wait.\n"
    )
    sys.stderr.flush()
    os._exit(RESTART)

  # JAX's own end of a wait is an abort with a stack trace.
  timer = threading.Timer(address.start_seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      initialization_timeout=round(address.start_seconds + 60),
      heartbeat_timeout_seconds=_HEARTBEAT,
      **options,
    )
  except RuntimeError as error:  # the port is taken, for example
    text = " ".join(str(error).split())
    again = re.match(r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED", text)
    kind = failures.TransientError if again else ValueError
    raise kind(f"processes ({address.source}) cannot meet at {where}: {text}") from error
  finally:
    timer.cancel()
  gather("start", "", seconds=address.start_seconds)
  if jax.default_backend() == "cpu":  # connects them while all are here; it has 30 s for that
    multihost_utils.sync_global_devices("start")


def is_runtime_failure(error: BaseException) -> bool:
  """Whether the runtime failed (a device lost, a link down), so that a new start may go well.

  A program that asks for too much memory, or for what cannot be done, fails again. So does what a
  callback to the host raises.
  """
  text = str(error)
  again = re.match(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED", text) or re.search(
    r"(?i)callback|out of memory", text
  )
  return isinstance(error, jax.errors.JaxRuntimeError) and not again


def _line(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _fail(error: BaseException, watchdog: Watchdog) -> NoReturn:
  """Ends this process and all others with the line of `error`."""
  text = str(error)
  transient = failures.restart_helps(error)
  # A lost process is behind it, perhaps: then the watchdog knows more in a moment.
  if _LOST.search(text.lower()) and not transient:
    watchdog.shorten_timeout()
    time.sleep(watchdog.heartbeat_timeout + 5)
  if not (transient or isinstance(error, cli.USER_ERRORS)) or cli.wants_traceback():
    traceback.print_exc()
  code = 130 if isinstance(error, KeyboardInterrupt) else 1  # 130: the shell's code of Ctrl-C
  again = transient or is_runtime_failure(error)
  watchdog.end(RESTART if again else code, _line(error))
  raise SystemExit(code)


def gather(name: str, value: str, *, seconds: float = 600.0) -> list[str]:
  """The `value` of every process, in their order; all must call it.

  It goes through the key-value store, not through the devices, with three requests a process: the
  last one to come reads the values of all, and hands them to the others in one key.

  Raises:
    TransientError: a process did not call it within `seconds`.
  """
  count, index = process_count(), process_index()
  if count == 1:
    return [value]
  store = _state().client
  number = _rounds[name]
  _rounds[name] += 1
  folder = f"grain_jax/gather/{name}"
  if index == 0 and number >= 2:  # all have left it: they have come to the one after
    store.key_value_delete(f"{folder}/{number - 2}")
  round_folder = f"{folder}/{number}"
  store.key_value_set(f"{round_folder}/values/{index}", f"={value}")
  if store.key_value_increment(f"{round_folder}/came", 1) >= count:
    found = _read_values(store, round_folder)
    if len(found) == count:
      values = [found[process] for process in range(count)]
      store.key_value_set(f"{round_folder}/all", json.dumps(values), allow_overwrite=True)
      return values
  try:
    return json.loads(store.blocking_key_value_get(f"{round_folder}/all", round(seconds * 1000)))
  except jax.errors.JaxRuntimeError as error:
    found = _read_values(store, round_folder)
    missing = [process for process in range(count) if process not in found]
    if not missing:  # the last one came just now
      return [found[process] for process in range(count)]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise failures.TransientError(
      f"process {missing[0]}{more} did not come to '{name}' within {seconds:g} s; the others wait "
      "there."
    ) from error


def _read_values(store: Any, round_folder: str) -> dict[int, str]:
  """{process: value} of those that have come to a `gather`."""
  entries = store.key_value_dir_get(f"{round_folder}/values/")
  return {int(key.rsplit("/", 1)[-1]): value[1:] for key, value in entries}


def broadcast(name: str, value: str) -> str:
  """The `value` of process 0, on all; all must call it."""
  return gather(name, value if process_index() == 0 else "")[0]


def check_equal(
  name: str, values: Mapping[str, Any], *, hint: str = "Start all with the same command."
) -> None:
  """Checks that all processes have the same `values`, by their hash; all must call it.

  Args:
    name: what they are of, for the message: "configuration".
    values: by name.
    hint: what to do where they differ.

  Raises:
    ValueError: they have not; the same line on every process, with the first key that differs.
  """
  text = json.dumps(dict(values), default=str)
  hashes = gather(f"{name} hash", hashlib.sha256(text.encode()).hexdigest())
  odd = next((i for i, value in enumerate(hashes) if value != hashes[0]), None)
  if odd is None:
    return
  texts = gather(f"{name} values", text if process_index() in (0, odd) else "")
  ours, theirs = json.loads(texts[0]), json.loads(texts[odd])
  key = next(k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k))
  raise ValueError(
    f"the processes have different {name}s: {key} is {ours.get(key)!r} on process 0 and "
    f"{theirs.get(key)!r} on process {odd}. {hint}"
  )
