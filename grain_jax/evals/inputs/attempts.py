"""One evaluation that fails costs its own results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from grain_jax import failures
from grain_jax.runtime import devices

# attempt(name, call) -> what `call()` gives, or None where it failed and that is noted.
Attempt = Callable[[str, Callable[[], Any]], Any]


def once(name: str, call: Callable[[], Any]) -> Any:
  """Without a net: what `call` raises is raised."""
  del name
  return call()


class Attempts:
  """Calls evaluations, and keeps what they raise by name; an `Attempt`.

  All processes must fail alike: one that fails while another waits for it in a collective ends the
  run, as it could not go on.
  """

  def __init__(
    self,
    warn: Callable[[str], None],
    agree: Callable[[str, str], list[str]] = lambda name, line: [line],
  ):
    """`warn` gets a line of each failure; `agree` gathers a text of each process ("": success)."""
    self._warn, self._agree = warn, agree
    self.errors: dict[str, Exception] = {}

  def __call__(self, name: str, call: Callable[[], Any]) -> Any:
    value, error = None, None
    try:
      value = call()
    except Exception as caught:  # whatever it is, the others' results are worth having
      error = devices.explained(caught, devices.ENCODING)
    mine = {}
    if error is not None:
      mine["line"] = f"{type(error).__name__}: {failures.one_line(error)}"
      mine["again"] = failures.restart_helps(error)
    try:
      told = [json.loads(t) for t in self._agree(name, json.dumps(mine) if mine else "") if t]
    except failures.TransientError:
      if error is not None:  # the others wait in a collective for this process
        raise error from None
      raise
    if not told:
      return value
    line = told[0]["line"]
    if error is None or not mine["again"]:  # one code for all processes
      again = next((one["line"] for one in told if one["again"]), "")
      error = failures.TransientError(again) if again else error or RuntimeError(line)
    self.errors[name] = error
    self._warn(f"evaluation {name} failed: {line}")
    return None


def error_of(errors: Mapping[str, Exception], *, kept: str) -> Exception | None:
  """One error for the code of a command some of whose evaluations failed; None if none did.

  Args:
    errors: what was raised, by evaluation.
    kept: where the results of the others are.
  """
  if not errors:
    return None
  first = next(iter(errors))
  line = (
    f"{len(errors)} evaluation{'s'[: len(errors) > 1]} failed ({', '.join(errors)}): {first}: "
    f"{failures.one_line(errors[first])} The results of the others are in {kept}."
  )
  again = any(failures.restart_helps(error) for error in errors.values())
  return failures.TransientError(line) if again else ValueError(line)
