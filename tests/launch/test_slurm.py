"""The SLURM launchers, with stand-ins for sbatch, srun and scontrol that note their arguments."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

from grain_jax.runtime.watchdog import RESTART

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SAVE = "mkdir -p w/checkpoints/"
FLAGS = ("--config=configs/cc12m.py", "--workdir=a run")


def dry_run(script, *arguments, **environment):
  """The commands that a script would run, as lists of words."""
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    env={**os.environ, "DRY_RUN": "1", **environment}, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
  ("cpus", "tasks", "given", "cores"),
  [
    ("96(x2)", "8", {}, "12"),
    ("64(x2)", "8", {}, "8"),  # 12 cores for each of 8 would be refused
    ("112,64(x3),128", "8", {}, "8"),  # the smallest
    ("128(x2)", "4", {}, "32"),
    ("6", "8", {}, "1"),
    ("64(x2)", "8", {"SLURM_CPUS_PER_TASK": "7"}, "7"),  # sbatch --cpus-per-task=7
    ("64(x2)", "8", {"CPUS_PER_TASK": "5", "SLURM_CPUS_PER_TASK": "7"}, "5"),
  ],
)
def test_a_task_has_its_share_of_the_cores_that_a_node_has(cpus, tasks, given, cores):
  """The forms of SLURM_JOB_CPUS_PER_NODE that sbatch(1) names."""
  job = {"SLURM_JOB_CPUS_PER_NODE": cpus, "SLURM_NTASKS_PER_NODE": tasks}
  (srun,) = dry_run("slurm_gpu.sbatch", *FLAGS, **job, **given)
  # Since Slurm 22.05 srun does not read the SLURM_CPUS_PER_TASK of the batch job.
  assert f"--cpus-per-task={cores}" in srun and srun[-4:] == ["-m", "grain_jax.main", *FLAGS]
  assert "cpus-per-task" not in "".join(
    re.findall(r"^#SBATCH.*$", (LAUNCH / "slurm_gpu.sbatch").read_text(), re.MULTILINE)
  )


def test_each_setting_is_a_variable():
  sbatch, srun = dry_run("slurm.sh", *FLAGS)
  assert sbatch == [
    "sbatch", "--job-name=grain", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
    "--time=24:00:00", "launch/slurm_gpu.sbatch", *FLAGS,
  ]  # fmt: skip
  assert srun[0] == "srun" and "--output=logs/%x-%j-%t.log" in srun  # %t: the task
  sbatch, srun = dry_run(
    "slurm.sh", *FLAGS, NODES="16", GPUS="4", PARTITION="h100", ACCOUNT="me", QOS="long",
    TIME="1-0", NAME="cc", CPUS_PER_TASK="14", SBATCH="--constraint=ib --mail-type=END", LOGS="/l",
    PYTHON="/envs/grain/bin/python",
  )  # fmt: skip
  assert sbatch == [
    "sbatch", "--job-name=cc", "--nodes=16", "--ntasks-per-node=4", "--gpus-per-node=4",
    "--time=1-0", "--partition=h100", "--account=me", "--qos=long", "--cpus-per-task=14",
    "--constraint=ib", "--mail-type=END", "launch/slurm_gpu.sbatch", *FLAGS,
  ]  # fmt: skip
  assert {"--cpus-per-task=14", "--output=/l/%x-%j-%t.log", "/envs/grain/bin/python"} < set(srun)


def test_containers_hold_the_repository_and_what_is_mounted():
  here = str(LAUNCH.parent)
  (pyxis,) = dry_run(
    "slurm_gpu.sbatch", *FLAGS, CONTAINER="nvcr.io#nvidia/jax:25.04", MOUNTS="/d:/d"
  )
  assert pyxis[-8:] == [
    "--container-image=nvcr.io#nvidia/jax:25.04", f"--container-mounts={here}:{here},/d:/d",
    f"--container-workdir={here}", "python3", "-m", "grain_jax.main", *FLAGS,
  ]  # fmt: skip
  (apptainer,) = dry_run("slurm_gpu.sbatch", *FLAGS, CONTAINER="/images/grain.sif", MOUNTS="/d")
  assert apptainer[apptainer.index("apptainer") :] == [
    "apptainer", "exec", "--nv", "--bind", f"{here},/d", "--pwd", here, "/images/grain.sif",
    "python3", "-m", "grain_jax.main", *FLAGS,
  ]  # fmt: skip


def slurm(house, tmp_path):
  house.command("srun", f'echo "$*" >> {tmp_path}/calls; . {tmp_path}/script')
  house.command("scontrol", "")
  return {
    "launcher": "slurm_gpu.sbatch", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path),
    "SLURM_CPUS_PER_TASK": "9",
  }  # fmt: skip


def test_an_environment_is_entered_before_the_tasks_start(house, tmp_path):
  job = slurm(house, tmp_path)
  (tmp_path / "env.sh").write_text('export GRAIN_TEST="of env.sh $UNSET"\n')
  code, calls, _ = house('echo "$GRAIN_TEST" > seen', "--workdir=w", ENVIRONMENT="env.sh", **job)
  assert code == 0 and (tmp_path / "seen").read_text() == "of env.sh \n"
  assert "python3 -m grain_jax.main" in calls[0] and (tmp_path / "logs").is_dir()
  code, calls, _ = house("", "--workdir=w", ENVIRONMENT="none.sh", **job)
  assert (code, calls) == (1, []) and "ENVIRONMENT=none.sh cannot be read" in house.said[-1]


@pytest.mark.parametrize(
  ("workdir", "mounts", "warned"),
  [
    ("/data/runs/x", "", True),
    ("/data/runs/x", "/other,/date:/data:ro", False),
    ("/data/runs/x", "/data:/d", True),
    ("/data2/x", "/data", True),
    ("/data", "/data/", False),
    ("runs/x", "", False),
    ("gs://b/x", "", False),
  ],
)
def test_a_workdir_that_would_end_with_its_container_is_warned_about(
  house, tmp_path, workdir, mounts, warned
):
  job = slurm(house, tmp_path)
  code, _, _ = house("", f"--workdir={workdir}", CONTAINER="c", MOUNTS=mounts, **job)
  assert code == 0
  said = [
    line for line in house.said if line.startswith(f"warning: --workdir={workdir} is in none")
  ]
  assert len(said) == warned


def test_a_submitted_job_has_the_variables_of_its_settings(house, tmp_path):
  house.command("sbatch", f'echo "$CONTAINER $SBATCH_EXPORT" > {tmp_path}/seen')
  code, _, _ = house(
    "", "--workdir=a w", launcher="slurm.sh", CONTAINER="c", SBATCH_EXPORT="NONE", ACCOUNT="me"
  )
  assert code == 0 and (tmp_path / "seen").read_text() == "c ALL\n"
  assert (tmp_path / "sbatch.txt").read_text().splitlines()[-4:] == [
    "--account=me", "launch/slurm_gpu.sbatch", "--workdir=a w", "--",
  ]  # fmt: skip


def test_slurm_job_goes_back_into_the_queue_while_there_is_progress(house, tmp_path):
  job = slurm(house, tmp_path)
  requeued = tmp_path / "scontrol.txt"
  (tmp_path / "w").mkdir()

  def start(number, script):
    code, calls, _ = house(script, "--workdir=w", SLURM_RESTART_COUNT=str(number), **job)
    assert "--cpus-per-task=9" in calls[0].split()
    again = requeued.exists() and requeued.read_text() == "requeue\n7\n--\n"
    requeued.unlink(missing_ok=True)
    return code, again, house.waits

  preempted = f"exit {RESTART}"
  assert start(0, preempted) == (0, True, [10])
  assert start(1, preempted) == (0, True, [60])
  assert start(2, f"{SAVE}5; {preempted}") == (0, True, [10])
  assert start(3, preempted) == (0, True, [60])
  assert start(4, preempted) == (0, True, [300])
  assert start(5, preempted) == (1, False, [])
  assert start(0, preempted) == (0, True, [10])  # submitted anew
  assert start(1, "exit 1") == (1, False, [])
  assert start(1, "exit 0") == (0, False, [])
  assert start(20, f"{SAVE}6; {preempted}") == (RESTART, False, [])
  assert not list((tmp_path / "w").glob("restarts*"))


def test_storage_that_fails_under_the_note_does_not_end_the_job(house, tmp_path):
  job = slurm(house, tmp_path)
  (tmp_path / "w").touch()  # takes no file
  code, _, _ = house(f"exit {RESTART}", "--workdir=w", **job)
  assert code == 0 and (tmp_path / "scontrol.txt").read_text() == "requeue\n7\n--\n"


def answer(folder, cases):
  """A stand-in for the Python that looks into a bucket; it notes what it is asked."""
  python = folder / ".venv" / "bin" / "python"
  python.write_text(
    f'#!/usr/bin/env bash\necho "$3 $4" >> {folder}/asked\ncase $3 in {cases} esac\n'
  )


def test_a_listing_that_fails_at_the_start_leaves_the_count(house, tmp_path):
  job = slurm(house, tmp_path)
  answer(
    tmp_path,
    f"read) echo 2 ;; write) cat > {tmp_path}/note ;; "
    f"list) [ $(wc -l < {tmp_path}/asked) -gt 1 ] || exit 1; echo 100 ;;",
  )
  code, _, _ = house(f"exit {RESTART}", "--workdir=gs://b/x", SLURM_RESTART_COUNT="3", **job)
  assert (code, (tmp_path / "note").read_text().strip()) == (0, "2")


def test_a_job_with_its_workdir_in_a_bucket_leaves_its_count_there(house, tmp_path):
  job = slurm(house, tmp_path)
  answer(tmp_path, f"read) cat {tmp_path}/note ;; write) cat > {tmp_path}/note ;;")
  waits = []
  for number in range(4):
    code, _, _ = house(
      f"exit {RESTART}", "--workdir=gs://b/x", SLURM_RESTART_COUNT=str(number), **job
    )
    waits.append((code, house.waits))
  assert waits == [(0, [10]), (0, [60]), (0, [300]), (1, [])]
  asked = set((tmp_path / "asked").read_text().splitlines())
  assert asked == {
    "list gs://b/x/checkpoints", "read gs://b/x/restarts-7", "write gs://b/x/restarts-7",
  }  # fmt: skip
  assert not list(tmp_path.glob("gs*"))
