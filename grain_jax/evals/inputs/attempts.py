"""One evaluation that fails costs its own results alone."""

from __future__ import annotations

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
    """`warn` gets a line for each failure; `agree` gathers the lines of all processes."""
    self._warn, self._agree = warn, agree
    self.errors: dict[str, Exception] = {}

  def __call__(self, name: str, call: Callable[[], Any]) -> Any:
    value, error = None, None
    try:
      value = call()
    except Exception as caught:  # whatever it is, the others' results are worth having
      error = devices.explained(caught, devices.ENCODING)
    line = "" if error is None else f"{type(error).__name__}: {failures.one_line(error)}"
    try:
      lines = self._agree(name, line)
    except failures.TransientError:
      if error is not None:  # the others wait in a collective for this process
        raise error from None
      raise
    line = next(filter(None, lines), "")
    if not line:
      return value
    self.errors[name] = error if error is not None else RuntimeError(line)
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
