"""A copy of launch/ whose program and whose waits are stand-ins."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def house(tmp_path, monkeypatch):
  """A copy of launch/ beside a `python` that ends as the file `script` says; it notes each call.

  A `sleep` of its own notes how long the launcher wants to wait, and does not.
  """
  shutil.copytree(LAUNCH, tmp_path / "launch")
  python = tmp_path / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(
    '#!/usr/bin/env bash\nif [ "$1" = -c ]; then echo 40001; exit; fi\n'
    f'echo "$*" >> {tmp_path}/calls\ncase "$*" in *process_id=1*) me=1 ;; *) me=0 ;; esac\n'
    f". {tmp_path}/script\n"
  )
  python.chmod(0o755)
  (tmp_path / "calls").write_text("")
  sleep = tmp_path / "bin" / "sleep"
  sleep.parent.mkdir()
  # The 3 and 90 seconds are those of a killer; 1, 50 and tenths those of the scripts here.
  sleep.write_text(
    f'#!/bin/sh\ncase $1 in 1 | 3 | 50 | 90 | *.*) exec /bin/sleep "$1" ;; esac\n'
    f'echo "$1" >> {tmp_path}/waits\n'
  )
  sleep.chmod(0o755)
  monkeypatch.setenv("PATH", f"{sleep.parent}:{os.environ['PATH']}")
  monkeypatch.delenv("RESTARTS", raising=False)

  def command(name, body):
    """A stand-in for a program on PATH, which notes its arguments in the file NAME.txt."""
    file = sleep.parent / name
    record = f"printf '%s\\n' \"$@\" -- >> {tmp_path}/{name}.txt\n"
    file.write_text(f"#!/usr/bin/env bash\n{record}{body}\n")
    file.chmod(0o755)

  def launch(script, *arguments, launcher="local.sh", **environment):
    (tmp_path / "script").write_text(script)
    (tmp_path / "calls").write_text("")
    (tmp_path / "waits").write_text("")
    began = time.monotonic()
    done = subprocess.run(
      ["bash", tmp_path / "launch" / launcher, *arguments],
      env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    launch.said = done.stderr.splitlines()
    launch.waits = [int(line) for line in (tmp_path / "waits").read_text().split()]
    calls = (tmp_path / "calls").read_text().splitlines()
    return done.returncode, calls, time.monotonic() - began

  launch.command = command
  return launch
