"""The launchers, as far as a machine without SLURM, Kubernetes and TPUs can try them."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from grain_jax.runtime.watchdog import RESTART

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def run(script, *arguments, **environment):
  command = ["bash", LAUNCH / script, *arguments]
  environment = {**os.environ, **environment}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
  done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  checker = str(beside) if beside.exists() else shutil.which("shellcheck")
  if checker is None:
    pytest.skip("shellcheck is not installed (requirements-test.txt)")
  done = subprocess.run([checker, "-x", LAUNCH / script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_dry_runs_print_the_command():
  flags = ("--config=configs/cc12m.py", "--workdir=a run")
  (one,) = run("local.sh", *flags, DRY_RUN="1").stdout.splitlines()
  assert shlex.split(one)[1:] == ["-m", "grain_jax.main", *flags]
  two = [
    shlex.split(line) for line in run("local.sh", "2", "--dry-run", *flags).stdout.splitlines()
  ]
  assert [line[:2] for line in two] == [["env", f"CUDA_VISIBLE_DEVICES={i}"] for i in range(2)]
  for i, line in enumerate(two):
    assert line[3:] == [
      "-m", "grain_jax.main", *flags, "--coordinator_address=127.0.0.1:55527",
      "--num_processes=2", f"--process_id={i}",
    ]  # fmt: skip


def test_what_is_missing_is_said_in_one_line():
  done = run("tpu_pod.sh", "--config=x")
  assert done.returncode != 0 and "TPU_NAME: is the name" in done.stderr
  done = run("tpu_pod.sh", "go", TPU_NAME="pod", ZONE="z")
  assert (
    done.returncode == 2 and done.stderr.count("\n") == 1 and "tpu_pod.sh go: say" in done.stderr
  )
  done = run("slurm.sh", "--config=x", NODES="two")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "NODES=two" in done.stderr
  done = run("local.sh", "0", "--config=x")
  assert done.returncode == 2 and done.stderr.count("\n") == 1


NUMBER = "n=$(wc -l < calls); "  # of the start, from 1
SAVE = "mkdir -p w/checkpoints/"


def test_local_waits_longer_each_time_and_ends_after_three_restarts_in_vain(house):
  code, calls, _ = house(f"exit {RESTART}", "--workdir=w", RESTARTS="20")
  assert (code, len(calls), house.waits) == (1, 4, [10, 60, 300])
  assert "3 restarts in a row made no new checkpoint in w" in house.said[-1]
  assert house.said[0] == f"launch/local.sh: ended with code {RESTART}, starting again in 10 s"
  house("kill -KILL $$", "--workdir", "w", RESTARTS="20", RESTART_SECONDS="2")
  assert house.waits == [2, 12, 60]


def test_a_new_checkpoint_makes_the_count_begin_anew(house, tmp_path):
  code, calls, _ = house(f"{NUMBER} {SAVE}${{n}}0; exit {RESTART}", "--workdir=w", RESTARTS="6")
  assert (code, len(calls), house.waits) == (RESTART, 7, [10] * 6)
  # The third and the sixth start save; older checkpoints go.
  shutil.rmtree(tmp_path / "w")
  script = f"{NUMBER} if ((n % 3 == 0)); then rm -rf w; {SAVE}$n; fi; exit {RESTART}"
  code, calls, _ = house(script, "--workdir=w", RESTARTS="7")
  assert (code, len(calls), house.waits) == (RESTART, 8, [10, 60, 10, 60, 300, 10, 60])


def test_checkpoints_behind_a_link_are_progress_too(house, tmp_path):
  (tmp_path / "large").mkdir()
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "checkpoints").symlink_to(tmp_path / "large")
  code, calls, _ = house(f"{NUMBER} {SAVE}${{n}}0; exit {RESTART}", "--workdir=w", RESTARTS="5")
  assert (code, len(calls)) == (RESTART, 6)


def test_a_workdir_in_the_user_s_folder(house, tmp_path):
  save = f'{NUMBER} mkdir -p "$HOME/w/checkpoints/$n"; exit {RESTART}'
  code, calls, _ = house(save, "--workdir=~/w", RESTARTS="5", HOME=str(tmp_path))
  assert (code, len(calls)) == (RESTART, 6)


@pytest.mark.parametrize("left", ["0", "12.orbax-checkpoint-tmp", "damaged-7", "-p w/8"])
def test_what_is_no_checkpoint_is_no_progress(house, left):
  script = f"{NUMBER} mkdir -p w/checkpoints/n$n; {SAVE}{left}; exit {RESTART}"
  assert house(script, "--workdir=w", RESTARTS="20")[0] == 1


def test_local_starts_again_what_was_preempted_or_lost(house):
  first = "[ $(wc -l < calls) -gt 1 ] && exit 0; "
  assert house(f"{first} exit {RESTART}", "--workdir=x")[:2] == (
    0,
    ["-m grain_jax.main --workdir=x"] * 2,
  )
  assert house(f"{first} kill -KILL $$")[0] == 0
  assert house(f"{first} kill -TERM $$")[0] == 0  # before there was anything to save
  code, calls, _ = house(f"exit {RESTART}", RESTARTS="2")
  assert (code, len(calls)) == (RESTART, 3)
  assert house.waits == [10, 60]
  code, calls, _ = house("exit 1")
  assert (code, len(calls), house.waits) == (1, 1, [])


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_is_killed_before_it_is_waited_for_is_no_success(house, tmp_path, processes):
  slow = tmp_path / "slow.sh"  # bash forgets, for `wait -n`, whose end it has told of
  slow.write_text("set -T; trap '[[ $BASH_COMMAND != \"wait -n\"* ]] || /bin/sleep 0.5' DEBUG\n")
  script = "[ $me = 0 ] || exit 0; kill -KILL $$"
  code, calls, _ = house(script, processes, RESTARTS="1", BASH_ENV=str(slow))
  assert (code, len(calls), house.waits) == (137, 2 * int(processes), [10])


def test_a_program_that_is_not_there_is_no_success(house):
  assert house("exec no-such-program")[0] == 127
  code, _, seconds = house("[ $me = 0 ] || exec sleep 1; exec no-such-program", "2")
  assert code == 127 and seconds >= 1


def test_local_ends_with_the_first_failure_of_several(house):
  code, calls, _ = house("[ $me = 1 ] && exit 1; sleep 1; exit 75", "2")
  assert (code, len(calls)) == (1, 2)
  assert sorted(call[-1] for call in calls) == ["0", "1"] and ":40001" in calls[0]
  # A wrong flag: the other would wait for it.
  code, _, seconds = house("[ $me = 1 ] && exit 2; exec sleep 50", "2")
  assert code == 2 and seconds < 20


def test_checkpoints_in_a_bucket_are_progress_too(house, tmp_path):
  """A stand-in of Python lists the bucket; what it is told to do is the next test's."""
  python = tmp_path / ".venv" / "bin" / "python"
  python.write_text(
    f'#!/usr/bin/env bash\n[ "$1" != -c ] || {{ echo "$3 $4" >> {tmp_path}/asked; '
    f"cat {tmp_path}/steps 2>/dev/null; exit 0; }}\n"
    f'echo "$*" >> {tmp_path}/calls\n. {tmp_path}/script\n'
  )
  code, calls, _ = house(f"exit {RESTART}", "--workdir=gs://b/x", RESTARTS="20")
  assert (code, len(calls), house.waits) == (1, 4, [10, 60, 300])
  assert (tmp_path / "asked").read_text() == "list gs://b/x/checkpoints\n" * 5
  save = f'{NUMBER} echo "${{n}}0" >> {tmp_path}/steps; exit {RESTART}'
  code, calls, _ = house(save, "--workdir=gs://b/x", RESTARTS="5")
  assert (code, len(calls), house.waits) == (RESTART, 6, [10] * 5)
  assert not list(tmp_path.glob("gs*"))


def test_a_bucket_that_does_not_answer_is_no_lack_of_progress(house, tmp_path):
  """Three times it does not, then nothing new is there as often."""
  python = tmp_path / ".venv" / "bin" / "python"
  python.write_text(
    f'#!/usr/bin/env bash\n[ "$1" != -c ] || {{ [ $(wc -l < {tmp_path}/calls) -gt 5 ]; exit; }}\n'
    f'echo "$*" >> {tmp_path}/calls\n. {tmp_path}/script\n'
  )
  code, calls, _ = house(f"exit {RESTART}", "--workdir=gs://b/x", RESTARTS="20")
  assert (code, len(calls), house.waits) == (1, 9, [10] * 6 + [60, 300])
  assert sum("cannot be reached" in line for line in house.said) == 6


def test_what_the_launchers_ask_of_a_bucket(tmp_path):
  """The program that they run, on a folder."""

  def ask(verb, place, text=""):
    command = f'. launch/restarts.sh; python={sys.executable} in_bucket {verb} "{place}"'
    done = subprocess.run(
      ["bash", "-c", command], input=text, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "warning" not in done.stderr, done.stderr
    return done.stdout

  note = tmp_path / "a" / "note"
  assert ask("list", tmp_path / "a").split() == [] and ask("read", note) == ""
  ask("write", note, "1\n20\n")
  assert note.read_text() == "1\n20\n" == ask("read", note)
  (tmp_path / "a" / "30").mkdir()
  assert sorted(ask("list", tmp_path / "a").split()) == ["30", "note"]
  ask("write", note)
  assert not note.exists()
