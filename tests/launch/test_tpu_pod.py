"""The launcher of TPU slices, with a `gcloud` that runs what it is told in a folder of a host."""

import os
import shlex
import signal
import subprocess
import time

import pytest

from grain_jax.runtime.watchdog import RESTART

# ssh and scp as far as the launcher uses them; the home folder of the host is HOST.
GCLOUD = """
for last; do :; done
case " $* " in
  *" ssh "*) cd "$HOST" && exec bash -c "${last#--command=}" ;;
  *" scp "*) exec cp "$5" "$HOST" ;;
esac
"""
POD = {"TPU_NAME": "pod", "ZONE": "z", "WATCH_SECONDS": "0.5", "STOP_SECONDS": "20"}


@pytest.fixture
def pod(house, tmp_path, monkeypatch):
  """(code, what was said) of launch/tpu_pod.sh; the host's repository is `house`'s folder.

  The connection ends with the command: what is left of its process group is hung up, terminated.
  """
  house.command("gcloud", GCLOUD)
  for key, value in POD.items():
    monkeypatch.setenv(key, value)
  monkeypatch.setenv("HOST", str(tmp_path.parent))
  monkeypatch.setenv("REPOSITORY", tmp_path.name)
  (tmp_path / "calls").write_text("")

  def launch(*arguments, **environment):
    laptop = subprocess.Popen(
      ["bash", tmp_path / "launch" / "tpu_pod.sh", *arguments],
      env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True, start_new_session=True,
    )  # fmt: skip
    said = laptop.communicate(timeout=60)[0]
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGKILL):
      try:
        os.killpg(laptop.pid, number)
      except ProcessLookupError:
        break
    return laptop.returncode, said

  yield launch
  launch("stop")


def calls(tmp_path):
  return (tmp_path / "calls").read_text().splitlines()


def wait_for(condition):
  until = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.05)


RUNS = "echo step 1; trap 'echo saved; exit 75' TERM; while :; do sleep 0.1; done"


def test_a_run_goes_on_without_the_machine_that_started_it(pod, tmp_path):
  (tmp_path / "script").write_text(RUNS)
  flags = ("--config=configs/cc12m.py", "--workdir=a w")
  code, said = pod(*flags)
  assert code == 0 and "runs as process" in said
  time.sleep(0.5)
  code, said = pod("status")
  assert code == 0 and "runs as process" in said and "step 1" in said
  assert calls(tmp_path) == [f"-m grain_jax.main {' '.join(flags)}"]
  log = tmp_path / "logs" / "grain.log"
  assert (
    log.read_text().endswith("step 1\n") and "start --config=configs/cc12m.py" in log.read_text()
  )

  code, said = pod(*flags)  # the chips are taken
  assert code == 1 and "a run is there, process" in said and "stop it" in said
  code, said = pod("stop")
  assert code == 0 and "ended: saved" in said and "saved" in log.read_text()
  assert len(calls(tmp_path)) == 1  # not started again
  assert "does not run" in pod("status")[1] and pod("stop")[0] == 0


def test_the_hosts_start_it_again(pod, tmp_path):
  (tmp_path / "script").write_text(f"echo step; sleep 0.3; exit {RESTART}")
  code, _ = pod("--workdir=w", RESTART_SECONDS="2")
  assert code == 0
  wait_for(lambda: "this is the end" in (tmp_path / "logs" / "grain.log").read_text())
  assert len(calls(tmp_path)) == 4
  waits = [int(line) for line in (tmp_path / "waits").read_text().split()]
  assert waits == [2, 12, 60]
  assert "does not run; last line: error: 3 restarts in a row" in pod("status")[1]


def test_what_ends_at_once_is_said_with_its_last_lines(pod, tmp_path):
  (tmp_path / "script").write_text("echo 'error: no such config' >&2; exit 1")
  code, said = pod("--config=x", "--workdir=w", RUN="second")
  assert code == 1 and "ended at once, with code 1" in said and "error: no such config" in said
  assert (tmp_path / "logs" / "second.log").exists()
  (tmp_path / "script").write_text("exit 0")
  assert pod("--workdir=w")[0] == 0
  (tmp_path / ".venv" / "bin" / "python").unlink()
  code, said = pod("--workdir=w")
  assert code == 1 and "setup comes first" in said


PYTHON = """#!/usr/bin/env bash
echo "$*" >> {folder}/python.txt
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  -c*) exit {old} ;;
esac
"""


def test_the_repository_gets_to_the_hosts(pod, house, tmp_path, monkeypatch):
  """The files of the checkout, changed and new ones too, without what git ignores."""
  host = tmp_path / "host"
  host.mkdir()
  monkeypatch.setenv("HOST", str(host))
  monkeypatch.setenv("REPOSITORY", "code of mine")
  python = tmp_path / "bin" / "python3"
  python.write_text(PYTHON.format(folder=tmp_path, old=0))
  python.chmod(0o755)
  (tmp_path / ".gitignore").write_text("data/\nhost/\nbin/\n*.txt\n")
  (tmp_path / "requirements-tpu.txt").write_text("jax[tpu]")
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "shard").write_text("x")
  git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y"]
  for words in (["init", "-q"], ["add", "-f", "launch", "requirements-tpu.txt"]):
    subprocess.run([*git, *words], check=True)
  subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
  (tmp_path / "new.py").write_text("new")
  (tmp_path / "launch" / "gpu_check.sh").unlink()
  code, said = pod("setup")
  there = host / "code of mine"
  assert code == 0 and "is ready" in said, said
  assert (there / "new.py").read_text() == "new" and (there / "launch" / "tpu_host.sh").exists()
  assert not (there / "data").exists()
  asked = (tmp_path / "python.txt").read_text().splitlines()
  assert asked[-2:] == [
    "-m venv .venv", "-m pip install --quiet --disable-pip-version-check -r requirements-tpu.txt",
  ]  # fmt: skip

  # From a URL, at a revision.
  monkeypatch.setenv("REPOSITORY", "cloned")
  code, said = pod("setup", SOURCE=str(tmp_path), REVISION="HEAD", PREPARE="touch prepared")
  assert code == 0 and (host / "prepared").exists(), said
  assert (host / "cloned" / "launch" / "tpu_host.sh").exists()
  assert not (host / "cloned" / "new.py").exists()
  code, said = pod("setup", SOURCE=str(tmp_path), REVISION="nowhere")
  assert code != 0 and "nowhere" in said and "is ready" not in said

  python.write_text(PYTHON.format(folder=tmp_path, old=1))
  code, said = pod("setup", PYTHON="python3")
  assert code == 1 and "python3 is not Python 3.11 or newer with venv" in said


def test_dry_runs_print_the_commands(pod, monkeypatch):
  monkeypatch.setenv("DRY_RUN", "1")
  monkeypatch.setenv("REPOSITORY", "grain_jax")
  flags = ("--config=configs/cc12m.py", "--workdir=gs://b/a run")
  words = shlex.split(pod(*flags, PROJECT="p")[1])
  place = ["--zone=z", "--project=p", "--worker=all"]
  assert words[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", *place]
  remote = words[-1].removeprefix("--command=")
  assert shlex.split(remote)[-4:] == ["launch/tpu_host.sh", "start", *flags]
  assert "--worker=3" in shlex.split(pod("log", "3")[1])
  monkeypatch.delenv("DRY_RUN")
