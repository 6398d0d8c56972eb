"""The shell around every command: flags, and errors that end in one line."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import re
import shlex
import sys
import traceback
import types
from collections.abc import Callable, Sequence

import ml_collections
from absl import app, flags, logging

from grain_jax import config as configs
from grain_jax import failures, helptext, places, recipes, synonyms

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error arose, not its line alone.")

# Flags of commands that name a place which may be in a bucket (gs://).
_IN_BUCKETS = (
  "--workdir",
  "--checkpoint",
  "--input",
  "--out",
  "--data_dir",
  *(f"--config.{key}" for key in configs.IN_BUCKETS),
)

# What a user's input can cause; anything else is a defect and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def wants_traceback() -> bool:
  """Whether the command was given --traceback; not in a process that has parsed no flags."""
  return flags.FLAGS.is_parsed() and _TRACEBACK.value


def fail(error: BaseException | str, code: int = 1) -> None:
  """Prints one line on stderr and ends the process."""
  text = " ".join(str(error).split())
  name = f"{type(error).__name__}: " if isinstance(error, BaseException) else "error: "
  print(f"{name}{text}", file=sys.stderr, flush=True)
  sys.exit(code)


def _joined(argv: Sequence[str]) -> list[str]:
  """'--config', 'RECIPE' as '--config=FILE', the form that `_check_overrides` and ml_collections
  read; a recipe's name becomes the path of its file."""
  args, rest = [], iter(argv)
  for arg in rest:
    if arg in ("--config", "-config"):
      value = next(rest, None)
      arg = arg if value is None else f"{arg}={value}"
    if arg.startswith(("--config=", "-config=")):
      name, _, path = arg.partition("=")
      places.check(path, "--config")
      arg = f"{name}={recipes.find(path)}"
    if arg.startswith(("--config.", "-config.")):
      arg = _listed(arg)
    args.append(arg)
  return args


def _listed(arg: str) -> str:
  """'--config.evals=a,b' as "--config.evals=('a', 'b')", which ml_collections reads.

  Of a key whose value is a list of words: `config.LISTS`.
  """
  name, equals, value = arg.partition("=")
  if name.lstrip("-").removeprefix("config.") not in configs.LISTS or not equals:
    return arg
  if value.startswith(("(", "[", "'", '"')):
    return arg
  return f"{name}={tuple(part.strip() for part in value.split(',') if part.strip())!r}"


def _check_overrides(argv: Sequence[str]) -> None:
  """Raises the line for a missing config file or an unknown --config.key before absl sees it."""
  path = next((a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))), None)
  if path is None:
    return
  config = configs.load(path)
  keys = {key for key, _ in configs.flatten(config)}
  for arg in argv:
    if arg.startswith(("--config.", "-config.", "--noconfig.", "-noconfig.")):
      key = arg.lstrip("-").removeprefix("no").split("=", 1)[0].removeprefix("config.")
      if key not in keys:
        raise ValueError(configs.unknown_key(config, key))


def _check_places() -> None:
  """Raises the line for a flag of the command line, or a key of a config, that is an address."""
  for name, flag in flags.FLAGS.flag_values_dict().items():
    if isinstance(flag, ml_collections.ConfigDict):
      configs.check_places(flag)
    elif flags.FLAGS[name].present:
      places.check_all({f"--{name}": flag}, buckets=_IN_BUCKETS)


def _parse(argv: Sequence[str], about: Callable[..., str] | None = None) -> list[str]:
  if asked := helptext.asked(argv):
    full = asked == "--helpfull"
    text = about(full=full) if about else sys.modules["__main__"].__doc__ or ""
    print(helptext.page(text, full=full), end="")
    sys.exit(0)
  try:
    argv = _joined(argv)
    _check_overrides(argv)
    rest = flags.FLAGS(argv)
    _check_places()
    if len(rest) > 1:
      raise ValueError(f"unexpected argument {rest[1]!r}: flags are written --name=value.")
    return rest
  except flags.IllegalFlagValueError as error:
    missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
    fail(f"{' and '.join(missing)} must be given. See --help." if missing else error, code=2)
    raise
  except flags.UnrecognizedFlagError as error:
    fail(_unknown_flag(error.flagname), code=2)
  except (flags.Error, ValueError, TypeError) as error:
    fail(error, code=2)
    raise


def _unknown_flag(name: str) -> str:
  """The error line for a flag that does not exist, with the nearest flags and keys that do."""
  known = [f"--{flag}" for flag in helptext.own_flags() or flags.FLAGS]
  if "config" in flags.FLAGS and flags.FLAGS["config"].flag_type() == "config object":
    known += recipes.keys()
  near = synonyms.nearest(f"--{name}", known)
  hint = synonyms.did_you_mean(
    [flag if flag.startswith("--") else f"--config.{flag}" for flag in near],
    "--help lists all.",
  )
  return f"--{name} is not a flag of this command. {hint}"


def _without_keras() -> None:
  """TensorFlow starts without Keras, which takes 2 to 3 of its 6 seconds, in a command's process.

  With TF_USE_LEGACY_KERAS TensorFlow looks for the package of an older Keras, and goes without if
  there is none. TensorBoard's hparams plugin, which clu imports, would ask for Keras after all, for
  the base of a callback that nothing here uses. What the user has set stays.
  """
  if os.environ.setdefault("TF_USE_LEGACY_KERAS", "1") == "1":
    unused = types.ModuleType("tensorboard.plugins.hparams._keras")
    unused.Callback = None  # all that the plugin takes from it
    sys.modules.setdefault(unused.__name__, unused)


def raise_open_files_limit() -> None:
  """Raises the soft limit of open files to the hard one: the usual 1,024 are fewer than shards."""
  try:
    import resource
  except ImportError:  # Windows
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit without end
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prepare() -> None:
  """What a command's process sets before it imports the rest; not for a process with other work."""
  _without_keras()
  raise_open_files_limit()
  # Imports and traces make half a million objects that stay. By Python's default ten full
  # collections walk over them before the first step, for 2 s of CPU. No arrays wait for the rarer
  # ones: train steps were seen to leave no cycles.
  gc.set_threshold(50_000, 10, 10)
  atexit.register(gc.freeze)  # or Python walks over them twice more at the end, for 1.3 s


def command_line() -> str | None:
  """The command that this process is, as it was typed; None where Python has other work."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  name = spec.name.removesuffix(".__main__") if spec else ""
  if not name.startswith(("grain_jax.", "bench.")):
    return None
  return shlex.join(["python", "-m", name, *sys.argv[1:]])


def run(main: Callable[[], None], about: Callable[..., str] | None = None) -> None:
  """Parses flags, runs `main`, and turns what a user can cause into one line.

  Args:
    main: the command.
    about: gives what `--help` says above the flags, `full` for `--helpfull`; by default the
      docstring of the program's module.
  """
  prepare()

  def guarded(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
      main()
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr, flush=True)
      sys.exit(failures.EXIT_INTERRUPTED)
    except Exception as error:
      transient = failures.restart_helps(error)
      if not (transient or isinstance(error, USER_ERRORS)):
        raise
      if wants_traceback():
        traceback.print_exc()
      fail(error, failures.EXIT_RESTART if transient else 1)

  app.run(guarded, flags_parser=functools.partial(_parse, about=about))
