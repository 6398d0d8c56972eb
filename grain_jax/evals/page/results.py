"""results.json, figures/ and report.html of an evaluation.

Results of one step of one model on the same data add up over commands: results.data, beside
results.json, says of which they are. What they may not stand beside is kept in results.before.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from grain_jax import failures, places, textfiles
from grain_jax.evals import built
from grain_jax.evals.page import page, report
from grain_jax.evals.sets import classification, suite
from grain_jax.runtime import metrics

NAME, ABOUT, BEFORE = "results.json", "results.data", "results.before.json"
DIGITS = 6  # of results, after the point
CONFIGURATION = "configuration"  # of the facts of a report, the one that is a file
# "zero_shot:pets: 3 of 9 pictures ...", "zero_shot:pets by ...", "evaluation grounding failed: ..."
_SUBJECT = re.compile(r"(?:evaluation )?(\w+(?::.+?)?)(?:: | by | failed)")


def prepare(folder: pathlib.Path, *, name: str) -> None:
  """Makes the folder for `write` and reads what it has: before anything is evaluated.

  Args:
    folder: of the results.
    name: the flag that names it, for messages: '--out'.

  Raises:
    ValueError: it cannot be made or written to, or what it has is damaged; one line.
  """
  probe = folder / f".{NAME}.probe"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    places.write_bytes(probe, b"")
    probe.unlink(missing_ok=True)
  except OSError as error:
    if failures.is_transient(error):
      raise
    raise ValueError(
      f"{name}={folder} cannot take the results: {error.strerror or error}. Name a folder that can "
      "be written with --out."
    ) from None
  read(folder)


def write(
  folder: pathlib.Path,
  outcome: built.Outcome,
  *,
  step: int | None,
  facts: dict[str, str] | None = None,
) -> None:
  """The table on the terminal, then results.json, figures/ and report.html into a folder.

  Results, figures and lines on what was left out that the folder has of other evaluations of the
  same step, model and data stay; other results are kept once, in results.before.json (`merge`).
  """
  print(report.format_table(outcome.results), flush=True)  # whatever becomes of the files
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / NAME
  newer = Written(step, outcome.results, outcome.data, outcome.model, tuple(outcome.left_out))
  merged = merge(read(folder), newer)
  if merged.lost:
    print(f"the {path} that was there is {merged.lost}: kept as {BEFORE}", flush=True)
  results = rounded(merged.written.results)
  if facts and "command" in facts and merged.added:
    facts = {"last command" if key == "command" else key: facts[key] for key in facts}
  drawn = report.write(
    folder / "figures",
    metrics.read_jsonl(folder / "metrics.jsonl"),
    examples=outcome.examples,
    segmented=outcome.segmented,
    results=results,
  )
  # Others that lie there are of other results.
  figures = tuple(sorted({*merged.written.figures, *(figure.name for figure in drawn)}))
  written = dataclasses.replace(merged.written, results=results, figures=figures)
  save(folder, written, before=bool(merged.lost))
  facts = facts or {"step": str(step)}
  config = places.at(facts.get(CONFIGURATION, ""))
  page.write(
    folder / "report.html",
    results,
    title=f"{folder.resolve().name}: evaluation",
    facts=facts,
    figures=[p for p in (folder / "figures" / name for name in figures) if p.is_file()],
    warnings=written.left_out,
    links={CONFIGURATION: _relative(config, folder)} if config.is_file() else None,
    sets=outcome.sets,
  )
  print("wrote " + ", ".join(map(str, [path, *drawn, folder / "report.html"])), flush=True)


def rounded(results: Mapping[str, Any]) -> dict[str, Any]:
  """Results with `DIGITS` digits after the point."""
  return {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in results.items()}


@dataclasses.dataclass(frozen=True)
class Written:
  """What the two files hold."""

  step: int | None  # of the checkpoint; None: it has none
  results: Mapping[str, Any]  # by flat name
  data: str = ""  # fingerprint of the built data; '': none was read, or it is not known
  model: str = ""  # fingerprint of the model; '': not known
  left_out: tuple[str, ...] = ()  # lines on what the results lack
  figures: tuple[str, ...] = ()  # files of figures/ that are of these results


class Merged(NamedTuple):
  """Results after one more evaluation."""

  written: Written
  added: bool  # whether some of the older ones stay
  lost: str  # why older ones do not; '': all do


def read(folder: pathlib.Path) -> Written | None:
  """What a folder has; None: nothing. A one-line ValueError where it is damaged."""
  path = folder / NAME
  if not path.is_file():
    return None
  results = textfiles.read_json(path)
  if not isinstance(results, dict):
    raise ValueError(
      f"{path} holds a {type(results).__name__}, not an object of results. Restore or remove it."
    )
  step = results.pop("step", None)
  for name, value in results.items():
    if not isinstance(value, (int, float)):
      raise ValueError(f"{path}: {name} is {value!r}, not a number. Restore or remove the file.")
  return Written(step, results, **_read_about(folder / ABOUT))


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """What results.data says, as fields of `Written`."""
  text = textfiles.read_text(path) if path.is_file() else ""
  if not text.startswith("{"):
    return {"data": text}  # once a fingerprint alone
  hint = f"Restore it, or move it and {NAME} elsewhere."
  try:
    held = textfiles.parse_json(text)
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}. {hint}") from None
  found = {key: held.get(key, "") for key in ("data", "model")}
  for key, value in found.items():
    if not isinstance(value, str):
      raise ValueError(f"{path}: {key} is {value!r}, not a text. {hint}")
  for key in ("left_out", "figures"):
    lines = held.get(key, [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
      raise ValueError(f"{path}: {key} is {lines!r}, not a list of texts. {hint}")
    found[key] = tuple(lines)
  return found


def merge(older: Written | None, newer: Written) -> Merged:
  """`newer` with what of `older` may stand beside it (`suite.merge`)."""
  if older is None:
    return Merged(newer, added=False, lost="")
  if other := _difference(older, newer):
    return Merged(newer, added=False, lost=other)
  results = suite.merge(older.results, newer.results)
  sets = [name.replace("/", ":") for name in suite.of_other_images(older.results, newer.results)]
  written = Written(
    newer.step,
    results,
    newer.data or older.data,
    newer.model or older.model,
    _merge_lines(older.left_out, newer.left_out, newer.results),
    tuple(dict.fromkeys([*older.figures, *newer.figures])),
  )
  lost = f"of other pictures of {', '.join(sets)} (--limit, or what can be read)" if sets else ""
  return Merged(written, added=bool(results.keys() - newer.results.keys()), lost=lost)


def save(folder: pathlib.Path, written: Written, *, before: bool) -> None:
  """Writes both files; with `before` what was there is kept once, as `BEFORE`."""
  path = folder / NAME
  if before:
    places.write_bytes(folder / BEFORE, path.read_bytes())
  # In this order: killed between the two, these results are taken for another's, not into them.
  text = json.dumps({"step": written.step, **written.results}, indent=2) + "\n"
  places.write_text(path, text)
  about = dataclasses.asdict(written)
  del about["step"], about["results"]
  places.write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def _difference(older: Written, newer: Written) -> str:
  """What keeps results apart: "of step 4"; '' if nothing does."""
  models = older.model and newer.model
  if older.step != newer.step or (newer.step is None and not models):
    return f"of step {older.step}"
  if models and older.model != newer.model:
    return "of another model"
  if older.data and newer.data and older.data != newer.data:
    return "of other data"
  return ""


def _merge_lines(
  older: Iterable[str], newer: Iterable[str], evaluated: Iterable[str]
) -> tuple[str, ...]:
  """Lines that still hold: the older ones but for what was evaluated, or spoken of, anew."""
  newer = list(newer)
  anew = {subject for line in newer if (subject := _subject(line))}
  for name in evaluated:
    if name.endswith("/rows") or name.startswith(classification.AVERAGE):
      anew.add(":".join(name.split("/")[:-1]))
  kept = [line for line in older if _subject(line) not in anew]
  return tuple(dict.fromkeys([*kept, *newer]))


def _subject(line: str) -> str:
  match = _SUBJECT.match(line)
  return match[1] if match else ""


def _relative(path: pathlib.Path, folder: pathlib.Path) -> str:
  """The address of a file as seen from a page in `folder`."""
  if places.is_bucket(path) != places.is_bucket(folder):
    return str(path)
  return urllib.parse.quote(pathlib.Path(os.path.relpath(path, folder)).as_posix())
