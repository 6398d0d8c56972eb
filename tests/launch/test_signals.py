"""Signals to the launchers: Ctrl-C, SIGTERM, Ctrl-Z, each handed on once."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from grain_jax.failures import EXIT_RESTART as RESTART


def started(tmp_path, script, *arguments, processes=2):
  """The launcher, when all its processes are up; each notes the signals that `script` traps."""
  (tmp_path / "script").write_text(
    f"note() {{ echo x >> {tmp_path}/$1-$me; }}\n{script}\ntouch {tmp_path}/up-$me\n"
    "for i in {1..300}; do sleep 0.1; done"
  )
  command = ["bash", tmp_path / "launch" / "local.sh", str(processes), *arguments]
  launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  wait_until_up(tmp_path, launcher, processes)
  return launcher


def wait_until_up(tmp_path, launcher, processes=2):
  until = time.monotonic() + 30
  while not all((tmp_path / f"up-{i}").exists() for i in range(processes)):
    assert (launcher is None or launcher.poll() is None) and time.monotonic() < until
    time.sleep(0.05)


def signals(tmp_path, name):
  return [(tmp_path / f"{name}-{i}").read_text().count("x") for i in range(2)]


def test_local_hands_ctrl_c_on_once_and_ends_with_130(house, tmp_path):
  launcher = started(tmp_path, "trap 'note int; exit 130' INT")
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(10) == 130 and signals(tmp_path, "int") == [1, 1]
  assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_ctrl_c_of_a_terminal_comes_once_too(house, tmp_path):
  """A terminal sends it to the whole group in front, and the launcher would add a second one."""
  (tmp_path / "script").write_text(
    f"trap 'echo x >> {tmp_path}/int-$me; exit 130' INT; touch {tmp_path}/up-$me\n"
    "for i in {1..300}; do sleep 0.1; done"
  )
  launcher, terminal = pty.fork()
  if launcher == 0:
    os.execvp("bash", ["bash", str(tmp_path / "launch" / "local.sh"), "2"])
  try:
    wait_until_up(tmp_path, None)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(launcher, 0)
  finally:
    os.close(terminal)
  assert os.waitstatus_to_exitcode(status) == 130 and signals(tmp_path, "int") == [1, 1]


@pytest.mark.parametrize(
  "script", ["trap 'c=$((c + 1)); ((c < 2)) || exit 130' INT", "trap '' INT"]
)
def test_a_second_ctrl_c_ends_at_once(house, tmp_path, script):
  launcher = started(tmp_path, script)
  launcher.send_signal(signal.SIGINT)
  time.sleep(0.5)
  assert launcher.poll() is None
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(8) == 130


def test_ctrl_z_stops_all_and_fg_goes_on(house, tmp_path):
  launcher = started(tmp_path, f"echo $$ > {tmp_path}/pid-$me; trap 'exit 0' USR1")
  children = [int((tmp_path / f"pid-{i}").read_text()) for i in range(2)]

  def wait_for(stopped):
    until = time.monotonic() + 10
    while [
      pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"
      for pid in [launcher.pid, *children]
    ] != [stopped] * 3:
      assert time.monotonic() < until
      time.sleep(0.05)

  launcher.send_signal(signal.SIGTSTP)
  wait_for(True)
  launcher.send_signal(signal.SIGCONT)
  wait_for(False)
  for pid in children:
    os.kill(pid, signal.SIGUSR1)
  assert launcher.wait(10) == 0


def test_python_does_not_start_with_ctrl_c_ignored(house, tmp_path):
  """It would leave the signal ignored: no KeyboardInterrupt."""
  program = "import signal; print(signal.getsignal(signal.SIGINT))"
  house(f"{sys.executable} -c '{program}' > {tmp_path}/handler")
  assert "default_int_handler" in (tmp_path / "handler").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, RESTART)])
def test_local_can_be_ended_while_it_waits(house, tmp_path, monkeypatch, number, code):
  monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])  # the true `sleep`
  (tmp_path / "script").write_text(f"exit {RESTART}")
  command = ["bash", tmp_path / "launch" / "local.sh", "--workdir=w"]
  launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  assert "starting again in 10 s" in launcher.stderr.readline()
  time.sleep(0.2)
  launcher.send_signal(number)
  assert launcher.wait(5) == code
  launcher.stderr.close()


def test_local_hands_sigterm_on_and_does_not_start_again(house, tmp_path):
  (tmp_path / "script").write_text(
    f"trap 'exit {RESTART}' TERM; touch {tmp_path}/up-$me; for i in {{1..300}}; do sleep 0.1; done"
  )
  launcher = subprocess.Popen(["bash", tmp_path / "launch" / "local.sh", "2"])
  wait_until_up(tmp_path, launcher)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(20) == RESTART
  assert len((tmp_path / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("arguments", [["--workdir=gs://b/x"], ["2", "--workdir=w"]])
def test_a_signal_before_the_processes_are_there(house, tmp_path, number, code, arguments):
  """While a bucket is listed, or a port sought: nothing is started."""
  python = tmp_path / ".venv" / "bin" / "python"
  slow = f'if [ "$1" = -c ]; then touch {tmp_path}/asked; /bin/sleep 1; fi\n'
  python.write_text(python.read_text().replace("\n", f"\n{slow}", 1))
  (tmp_path / "script").write_text("exit 0")
  launcher = subprocess.Popen(["bash", tmp_path / "launch" / "local.sh", *arguments])
  until = time.monotonic() + 30
  while not (tmp_path / "asked").exists():
    assert time.monotonic() < until
    time.sleep(0.02)
  launcher.send_signal(number)
  assert launcher.wait(20) == code and (tmp_path / "calls").read_text() == ""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "int"), (signal.SIGTERM, "term")])
def test_a_signal_between_two_processes_comes_to_both(house, tmp_path, number, name):
  slow = tmp_path / "slow.sh"  # before the second is started, and before the first is known
  slow.write_text("set -T; trap '[[ $BASH_COMMAND != pids+=* ]] || /bin/sleep 1' DEBUG\n")
  (tmp_path / "script").write_text(
    f"trap 'echo x >> {tmp_path}/int-$me; exit 130' INT\n"
    f"trap 'echo x >> {tmp_path}/term-$me; exit 75' TERM\n"
    f"touch {tmp_path}/up-$me\nfor i in {{1..300}}; do sleep 0.1; done"
  )
  command = ["bash", tmp_path / "launch" / "local.sh", "2"]
  launcher = subprocess.Popen(command, env={**os.environ, "BASH_ENV": str(slow)})
  wait_until_up(tmp_path, launcher, processes=1)
  launcher.send_signal(number)
  assert launcher.wait(20) == (130 if number == signal.SIGINT else RESTART)
  assert (tmp_path / f"{name}-0").read_text() == "x\n"
  assert len((tmp_path / "calls").read_text().splitlines()) == 1
