"""What is worth another start: storage and time, in whatever words a library says it."""

import errno

import pytest
import tensorflow as tf

from grain_jax import buckets, cli, failures


def raised(error, *, cause=None, context=None, hidden=False):
  """An error as it arrives, raised from another or while another was handled."""
  try:
    try:
      if context is not None:
        raise context
    finally:
      raise error from cause if cause is not None or hidden else error
  except BaseException as caught:
    return caught


@pytest.mark.parametrize(
  ("error", "number"),
  [
    (OSError(errno.EIO, "Input/output error"), errno.EIO),
    (ValueError("DATA_LOSS: reading /x [OS error 116: Stale file handle]"), errno.ESTALE),
    (ValueError('Error writing "x" [OS error 28: ENOSPC No space left on device]'), errno.ENOSPC),
    (RuntimeError("UNKNOWN: x; Input/output error: EIO"), errno.EIO),
    (RuntimeError("EVERYTHING went wrong"), None),
    (ValueError("a caption is empty"), None),
  ],
)
def test_the_operating_systems_number_is_found(error, number):
  assert failures.os_errno(error) == number
  wrapped = RuntimeError("checkpoint failed")
  wrapped.__cause__ = error
  assert failures.os_errno(wrapped) == number


@pytest.mark.parametrize(
  ("number", "transient"),
  [
    (errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, True), (errno.EDQUOT, True),
    (errno.ETIMEDOUT, True), (errno.ENOTCONN, True), (errno.EFBIG, True), (errno.EMFILE, True),
    (errno.ENOENT, False), (errno.EACCES, False), (errno.EROFS, False), (errno.ENOTDIR, False),
  ],
)  # fmt: skip
def test_which_numbers_may_go_away(number, transient):
  assert failures.is_transient(OSError(number, "x")) == transient
  assert failures.restart_helps(OSError(number, "x")) == transient
  assert failures.is_transient(ValueError(f"tensorstore [OS error {number}: x]")) == transient


def test_a_value_error_is_the_users_whatever_it_came_from():
  error = ValueError("name another folder")
  error.__cause__ = OSError(errno.EIO, "x")
  assert failures.is_transient(error) and not failures.restart_helps(error)
  assert failures.restart_helps(failures.TransientError("x"))
  assert failures.restart_helps(TimeoutError("x"))
  assert failures.restart_helps(ConnectionError("without a number"))
  assert not failures.restart_helps(KeyError("x"))


def test_what_was_handled_and_hidden_does_not_count():
  def attempt(hide):
    try:
      try:
        raise TimeoutError
      except TimeoutError as error:
        raise RuntimeError("x") from (None if hide else error)
    except RuntimeError as error:
      return error

  assert failures.is_transient(attempt(False)) and not failures.is_transient(attempt(True))


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (OSError(errno.ESTALE, "Stale file handle", "/d/x"), 75, "Stale file handle: '/d/x'"),
    (failures.TransientError("lost\nit"), 75, "TransientError: lost it"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory"), 1, "Not a directory"),
    (ValueError("no"), 1, "ValueError: no"),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_a_command_ends_with_a_line_and_a_code(monkeypatch, capsys, error, code, line):
  def main():
    raise error

  def run(function, flags_parser):
    cli.flags.FLAGS.mark_as_parsed()
    function([])

  monkeypatch.setattr(cli.app, "run", run)
  with pytest.raises(SystemExit) as end:
    cli.run(main)
  said = capsys.readouterr().err
  assert end.value.code == code and line in said and said.count("\n") == 1


@pytest.mark.parametrize(
  ("error", "kind", "transient"),
  [
    (tf.errors.NotFoundError(None, None, "HTTP 404"), FileNotFoundError, False),
    (tf.errors.PermissionDeniedError(None, None, "HTTP 403"), PermissionError, False),
    (tf.errors.UnauthenticatedError(None, None, "HTTP 401"), PermissionError, False),
    (tf.errors.InvalidArgumentError(None, None, "HTTP 400"), OSError, False),
    (tf.errors.FailedPreconditionError(None, None, "HTTP 412"), OSError, False),
    (
      tf.errors.FailedPreconditionError(None, None, "libcurl code 6"),
      failures.TransientError,
      True,
    ),
    (tf.errors.UnavailableError(None, None, "HTTP 503"), failures.TransientError, True),
    (tf.errors.AbortedError(None, None, "All 10 retry\n"), failures.TransientError, True),
    (tf.errors.ResourceExhaustedError(None, None, "HTTP 429"), failures.TransientError, True),
  ],
)
def test_errors_of_a_bucket_are_those_of_a_disk(error, kind, transient):
  with pytest.raises(kind) as caught:
    buckets.raise_as_of_files(error, "gs://b/x")
  assert type(caught.value) is kind and "gs://b/x" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert failures.restart_helps(caught.value) == transient


def test_tensorstore_says_in_words_that_a_bucket_is_away():
  error = ValueError('UNAVAILABLE: Error reading "gs://b/x": All 33 retry attempts failed')
  assert failures.is_transient(error) and not failures.restart_helps(error)  # see `checkpoint`
  assert not failures.is_transient(ValueError("NOT_FOUND: Error opening: gs://b/x"))
