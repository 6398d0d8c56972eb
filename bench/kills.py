"""Runs killed at random steps and started again, against one never stopped, bit for bit.

`python -m bench.kills --json [--kills=N]` trains a tiny model on a few scenes once undisturbed and
N times with a SIGKILL after a random line of metrics, each in processes of its own, and compares
every array of the final states: parameters, moments of the optimiser, step.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from grain_jax import helptext

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24  # three passes over the scenes

# A few thousand parameters beside the token embedding; a checkpoint every third step.
TINY = (
  f"steps={STEPS},batch_size=8,eval_batch_size=32,log_every=1,save_every=3,keep_checkpoints=2,"
  "eval_every=0,loss.matcher=host,loss.aux_box_loss=True,data.caption=half,"
  "optimizer.warmup_steps=2,data.max_regions=3,data.row_length=48,data.threads=1,"
  "model.embed_dim=16,model.num_queries=3,model.image.size=32,model.image.width=32,"
  "model.image.depth=1,model.image.heads=2,model.text.width=32,model.text.depth=1,"
  "model.text.heads=2,model.text.context=32,model.decoder.width=32,model.decoder.depth=2,"
  "model.decoder.heads=2,model.decoder.mlp_dim=32"
)

# Compiles in a quarter of the time; one device, as a user's CPU is.
XLA_FLAGS = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1"
)


def build_scenes(out: pathlib.Path) -> None:
  """64 scenes to train on, 24 to evaluate, 64 single objects, of 32 pixels."""
  command = [
    sys.executable, "-m", "grain_jax.data.build", "--source=scenes", f"--out={out}",
    "--train=64", "--val=24", "--objects_per_class=1", "--concepts=8", "--image_size=32",
    "--workers=1",
  ]  # fmt: skip
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def start(
  data: pathlib.Path,
  workdir: pathlib.Path,
  *flags: str,
  name: str = "std",
  devices: int = 1,
  program: Sequence[str] = ("-m", "grain_jax.main"),
) -> subprocess.Popen:
  """`grain_jax.main` on the tiny model and virtual devices, in a process group of its own.

  What it says is appended to NAMEout.txt and NAMEerr.txt in `workdir`. Python may run another
  `program` in its place.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  command = [
    sys.executable, *program, f"--config=configs/quickstart.py:{TINY}",
    f"--config.data.dir={data}", f"--workdir={workdir}", *flags,
  ]  # fmt: skip
  xla = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
  environment = {**os.environ, "XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}
  out_path, err_path = workdir / f"{name}out.txt", workdir / f"{name}err.txt"
  with out_path.open("a") as out, err_path.open("a") as err:
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
    )


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
  """Waits; a run that fails ends the comparison with what it said."""
  if process.wait():
    said = (workdir / "stderr.txt").read_text()
    raise RuntimeError(f"the run in {workdir} ended with code {process.returncode}: {said[-2000:]}")


def kill_after(process: subprocess.Popen, workdir: pathlib.Path, *, step: int) -> None:
  """SIGKILL as soon as the metrics of `step` are written."""
  path = workdir / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and path.read_text().count("\n") >= step:
      break
    time.sleep(0.002)
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)
  if process.wait() != -signal.SIGKILL:
    said = (workdir / "stderr.txt").read_text()
    raise RuntimeError(f"the run in {workdir} ended by itself before step {step}: {said[-2000:]}")


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Steps of the finished checkpoints, ascending."""
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint by its name."""
  import jax
  import orbax.checkpoint as ocp

  from grain_jax import trees

  folder = workdir.resolve() / "checkpoints" / str(saved_steps(workdir)[-1]) / "state"
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder).item_metadata.tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = reader.restore(folder, restore_args=plain)
  return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(restored)}


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
  """Names whose arrays are not the same bits, or that only one of the two has."""
  return [
    name
    for name in sorted({*a, *b})
    if name not in a or name not in b or a[name].tobytes() != b[name].tobytes()
  ]


def measure(folder: pathlib.Path, *, kills: int, seed: int, say: Any = print) -> dict[str, Any]:
  """The comparison: {'kills', 'steps', 'killed_after', 'resumed_from', 'equal', 'different'}."""
  rng = np.random.default_rng(seed)
  data = folder / "scenes"
  build_scenes(data)
  flags = "--config.evals=()"
  whole = folder / "undisturbed"
  began = time.monotonic()
  finish(start(data, whole, flags), whole)
  say(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.0f} s with start and compilation")
  state = final_state(whole)
  result: dict[str, Any] = {"kills": kills, "steps": STEPS, "arrays": len(state)}
  killed, resumed, different = [], [], []
  for run in range(kills):
    workdir, step = folder / f"killed-{run}", int(rng.integers(1, STEPS))
    kill_after(start(data, workdir, flags), workdir, step=step)
    steps = saved_steps(workdir)
    finish(start(data, workdir, flags), workdir)
    different += [f"run {run}: {name}" for name in differences(state, final_state(workdir))]
    killed.append(step)
    resumed.append(steps[-1] if steps else 0)
    say(f"run {run}: killed after step {step}, went on from {resumed[-1]}")
  result |= {"killed_after": killed, "resumed_from": resumed}
  return result | {"equal": not different, "different": different}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
  parser.formatter_class = helptext.ArgparseFormatter
  parser.add_argument("--kills", type=int, default=3, help="runs that are killed")
  parser.add_argument("--seed", type=int, help="of the steps; by default the time")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  flags = parser.parse_args(arguments)
  flags.seed = int(time.time()) if flags.seed is None else flags.seed
  logging.set_verbosity(logging.ERROR)  # Orbax misses files that nothing here needs
  with tempfile.TemporaryDirectory() as folder:
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    result = measure(pathlib.Path(folder), kills=flags.kills, seed=flags.seed, say=say)
  result["seed"] = flags.seed
  if flags.json:
    print(json.dumps(result))
  else:
    verdict = "equal, bit for bit" if result["equal"] else f"DIFFERENT: {result['different']}"
    print(f"{result['kills']} killed runs of {STEPS} steps: {result['arrays']} arrays {verdict}.")
  sys.exit(not result["equal"])


if __name__ == "__main__":
  main()
