"""`python -m bench.train_step [--json]`: our train step beside a PyTorch peer of equal mathematics.

The whole GRAIN step - towers, decoder with dropout, matching, losses, gradients, AdamW - in float32
on one CPU device, on one batch of random images, captions of 12-40 tokens and 5 descriptions of
6-14 an image. Ours packs an image's texts into one row that is long enough to drop none. The peer
(`bench.peers.grain_torch`) pads each text to the context of 77, as published, or, 'trimmed', runs
captions and descriptions as two batches, each as long as its own longest text.

* FLOPs: of the matrix products, forward and backward, counted alike (`bench.train_step_costs`).
* Seconds: the median over rounds in which the three sides take a step in turn, each in a process of
  its own that waits while the others work, on all cores.
* Memory: the most that a side's process had resident at any time, less what it had after its
  imports: parameters, moments, gradients, activations, and for ours the compilation.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import ml_collections
from absl import flags

from bench import train_step_sides as sides
from grain_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
SIDES = sides.SIDES
ROW_LENGTH = 112  # of our packed rows on a CPU: as short as holds all texts
_RATIOS = ("ratio", "ratio_trimmed")  # ours / padded, ours / trimmed


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


class Worker:
  """A side in a process of its own (`bench.train_step_sides`)."""

  def __init__(self, side: str, config: ml_collections.ConfigDict):
    self.side = side
    self._process = subprocess.Popen(
      [sys.executable, "-m", "bench.train_step_sides", side],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._send(json.dumps(config.to_dict()))

  def _send(self, line: str) -> None:
    self._process.stdin.write(f"{line}\n")
    self._process.stdin.flush()

  def ask(self, command: str) -> dict[str, float]:
    """The answer to 'step' or 'end'."""
    try:
      self._send(command)
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      code = self._process.wait()
      raise RuntimeError(f"the side {self.side!r} ended with code {code}; its error stands above.")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()


def measure(
  config: ml_collections.ConfigDict, *, rounds: int, warmup: int, say: Callable[[str], None] = say
) -> dict[str, dict[str, Any]]:
  """{'seconds': {side: of each round}, 'peak_memory_bytes': {side: bytes}}.

  Each side first takes `warmup` steps that do not count, the first of which compiles ours.
  """
  seconds: dict[str, list[float]] = {side: [] for side in SIDES}
  workers: list[Worker] = []
  try:
    for side in SIDES:
      workers.append(Worker(side, config))
      losses = [workers[-1].ask("step")["loss"] for _ in range(warmup)]
      say(f"{side}: warm, loss {', '.join(f'{loss:.3f}' for loss in losses)}")
    for number in range(rounds):
      for worker in workers:
        seconds[worker.side].append(worker.ask("step")["seconds"])
      taken = ", ".join(f"{side} {times[-1]:.2f}" for side, times in seconds.items())
      say(f"round {number + 1} of {rounds}: {taken} s")
    peaks = {worker.side: int(worker.ask("end")["peak_bytes"]) for worker in workers}
  finally:
    for worker in workers:
      worker.close()
  return {"seconds": seconds, "peak_memory_bytes": peaks}


def summary(
  flops: Mapping[str, Mapping[str, float]],
  measured: Mapping[str, Mapping[str, Any]] | None,
  settings: Mapping[str, Any],
) -> dict[str, Any]:
  """What --json prints; without a measurement its numbers are None."""
  per_sample = {side: sum(flops[side].values()) for side in SIDES}
  speed = peaks = dict.fromkeys(SIDES)
  if measured:
    peaks = dict(measured["peak_memory_bytes"])
    speed = {
      side: settings["batch_size"] / statistics.median(times)
      for side, times in measured["seconds"].items()
    }

  def with_ratios(values: Mapping[str, float | None]) -> dict[str, float | None]:
    mine = values["ours"]
    ratio = {n: mine and mine / values[s] for n, s in zip(_RATIOS, SIDES[1:], strict=True)}
    return {**values, **ratio}

  return {
    "flops_per_sample": with_ratios(per_sample),
    "samples_per_s": with_ratios(speed),
    "peak_memory_bytes": peaks,
    "settings": dict(settings),
  }


def describe(
  recipe: str, config: ml_collections.ConfigDict, lengths: Any, *, rounds: int, warmup: int
) -> dict[str, Any]:
  """What the numbers were taken on."""
  captions, descriptions = lengths[:, 0], lengths[:, 1:]
  return {
    "recipe": recipe,
    "batch_size": config.batch_size,
    "seed": config.seed,
    "dtype": config.model.dtype,
    "dropout": config.model.decoder.dropout,
    "unroll": config.model.unroll,
    "row_length": config.data.row_length,
    "fullest_row": int(lengths.sum(axis=1).max()),
    "dropped_texts": 0,  # the row holds the longest texts there can be: `sides.setting`
    "regions": config.data.max_regions,
    "caption_tokens": list(sides.CAPTION_TOKENS),
    "description_tokens": list(sides.DESCRIPTION_TOKENS),
    "longest_caption": int(captions.max()),
    "longest_description": int(descriptions.max(initial=0)),
    "mean_tokens_per_sample": float(lengths.sum() / len(lengths)),
    "padded_to": config.model.text.context,
    "steps": rounds,
    "warmup": warmup,
    "cores": sides.cores(),
    "load_before": round(os.getloadavg()[0], 2),
    "platform": platform.platform(),
    **{name: metadata.version(name) for name in ("jax", "torch")},
  }


def table(
  flops: Mapping[str, Mapping[str, float]],
  measured: Mapping[str, Mapping[str, Any]] | None,
  settings: Mapping[str, Any],
) -> str:
  """The results for people, in Markdown."""
  found = summary(flops, measured, settings)
  sides_and_bound = (*SIDES, "unpadded")
  totals = {side: sum(flops[side].values()) for side in sides_and_bound}
  heads = "".join(f" {side} |" for side in sides_and_bound)
  lines = [f"| GFLOP a sample |{heads}", "|---" * 5 + "|"]
  for part in flops["ours"]:
    lines.append(
      f"| {part} |" + "".join(f" {flops[side][part] / 1e9:.2f} |" for side in sides_and_bound)
    )
  lines.append("| total |" + "".join(f" {value / 1e9:.2f} |" for value in totals.values()))
  lines.append("| of padded |" + "".join(f" {v / totals['padded']:.3f} |" for v in totals.values()))
  lines.append(f"\nFLOPs, ours / trimmed: {found['flops_per_sample']['ratio_trimmed']:.4f}")
  if measured:
    lines += ["", "| | s a step (least-most) | samples/s | peak memory, GB |", "|---|---|---|---|"]
    for side in SIDES:
      times, peak = measured["seconds"][side], found["peak_memory_bytes"][side] / 1e9
      spread = f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})"
      lines.append(f"| {side} | {spread} | {found['samples_per_s'][side]:.3f} | {peak:.2f} |")
    ratios = (found["samples_per_s"][name] for name in _RATIOS)
    lines.append("\nsamples/s, ours / padded: {:.3f}, ours / trimmed: {:.3f}".format(*ratios))
  notes = ", ".join(f"{name} {value}" for name, value in settings.items())
  return "\n".join([*lines, "", "'unpadded' is the bound: no padding token anywhere.", notes])


def main() -> None:
  flag = flags.FLAGS
  if flag.device == "gpu":
    from bench import train_step_gpu

    code = train_step_gpu.main(
      flag.config, row_length=flag.row_length, seed=flag.seed, minutes=flag.minutes, jobs=flag.jobs,
      folder=flag.cache, only=flag.only, rehearse=flag.rehearse,
    )  # fmt: skip
    sys.exit(code)
  for name, least in (("batch_size", 2), ("steps", 0), ("warmup", 1)):
    if flag[name].value < least:
      raise ValueError(f"--{name}={flag[name].value}: at least {least} is needed. Raise it.")
  config = sides.setting(
    flag.config,
    batch_size=flag.batch_size,
    row_length=flag.row_length or ROW_LENGTH,
    seed=flag.seed,
  )
  batch = sides.host_batch(config)
  settings = describe(
    flag.config, config, sides.text_lengths(batch), rounds=flag.steps, warmup=flag.warmup
  )
  measured = measure(config, rounds=flag.steps, warmup=flag.warmup) if flag.steps else None
  os.environ["JAX_PLATFORMS"] = "cpu"
  from bench import train_step_costs  # after the timing: it loads JAX and PyTorch

  flops = train_step_costs.report(config, batch)
  if flag.json:
    print(json.dumps(summary(flops, measured, settings)))
  else:
    print(table(flops, measured, settings))


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/cc12m.py", "Recipe, FILE or FILE:argument.")
  flags.DEFINE_integer("batch_size", 8, "Images a step.")
  flags.DEFINE_integer(
    "row_length",
    None,
    f"Tokens in our packed rows; by default {ROW_LENGTH}, on a GPU the recipe's.",
  )
  flags.DEFINE_integer("steps", 5, "Rounds to time; 0: FLOPs alone, nothing is run.")
  flags.DEFINE_integer("warmup", 2, "Steps of each side before the clock counts.")
  flags.DEFINE_integer("seed", 0, "Of parameters, dropout and the batch.")
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  flags.DEFINE_enum("device", "cpu", ("cpu", "gpu"), "gpu: `bench.train_step_gpu`, JSON lines.")
  flags.DEFINE_float("minutes", 8.0, "GPU: longest time in all.", lower_bound=0.05)
  flags.DEFINE_integer("jobs", 0, "GPU: compilations at once; 0: half of the cores.")
  flags.DEFINE_string(
    "cache", ".cache/train_step_gpu", "GPU: folder of compiled programs and logs."
  )
  flags.DEFINE_string("only", "", "GPU: the cases with this in their name alone; by default all.")
  flags.DEFINE_bool("rehearse", False, "GPU: a small model on the CPU, to try everything out.")
  cli.run(main)
