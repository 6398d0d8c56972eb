"""The launchers, as far as a machine without SLURM, Kubernetes and TPUs can try them."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from grain_jax.runtime import addresses
from grain_jax.runtime.watchdog import RESTART

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm_gpu.sbatch", "tpu_pod.sh", "k8s_wait.sh", "restarts.sh")


def run(script, *arguments, **environment):
  command = ["bash", LAUNCH / script, *arguments]
  environment = {**os.environ, **environment}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def text(script):
  return (LAUNCH / script).read_text()


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
  (slurm,) = run("slurm_gpu.sbatch", *flags, DRY_RUN="1").stdout.splitlines()
  assert shlex.split(slurm)[0] == "srun" and shlex.split(slurm)[-4:] == [
    "-m", "grain_jax.main", *flags,
  ]  # fmt: skip
  # Since Slurm 22.05 srun does not read the SLURM_CPUS_PER_TASK of the batch job.
  (asked,) = re.findall(r"^#SBATCH (--cpus-per-task=\d+)$", text("slurm_gpu.sbatch"), re.MULTILINE)
  assert asked in shlex.split(slurm)
  slurm = run("slurm_gpu.sbatch", *flags, DRY_RUN="1", SLURM_CPUS_PER_TASK="7").stdout
  assert "--cpus-per-task=7" in shlex.split(slurm)
  tpu = run("tpu_pod.sh", *flags, DRY_RUN="1", TPU_NAME="pod", ZONE="z").stdout
  *gcloud, remote = shlex.split(tpu)
  assert gcloud == shlex.split("gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all")
  assert "-m grain_jax.main --config=configs/cc12m.py --workdir=a\\ run || code=$?" in remote


def test_what_is_missing_is_said_in_one_line():
  done = run("tpu_pod.sh", "--config=x")
  assert done.returncode != 0 and "TPU_NAME: is the name" in done.stderr
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


@pytest.mark.parametrize("left", ["0", "12.orbax-checkpoint-tmp", "damaged-7", "-p w/8"])
def test_what_is_no_checkpoint_is_no_progress(house, left):
  script = f"{NUMBER} mkdir -p w/checkpoints/n$n; {SAVE}{left}; exit {RESTART}"
  assert house(script, "--workdir=w", RESTARTS="20")[0] == 1


def test_slurm_job_goes_back_into_the_queue_while_there_is_progress(house, tmp_path):
  for name, body in (("srun", ". ./script"), ("scontrol", 'echo "$*" >> requeued')):
    (tmp_path / "bin" / name).write_text(
      f'#!/usr/bin/env bash\n[ {name} != srun ] || echo "$*" >> calls\n{body}\n'
    )
    (tmp_path / "bin" / name).chmod(0o755)
  (tmp_path / "w").mkdir()

  def start(number, script):
    code, calls, _ = house(
      script, "--workdir=w", launcher="slurm_gpu.sbatch", SLURM_JOB_ID="7",
      SLURM_RESTART_COUNT=str(number), SLURM_SUBMIT_DIR=str(tmp_path), SLURM_CPUS_PER_TASK="9",
    )  # fmt: skip
    assert "--cpus-per-task=9" in calls[0].split()
    requeued = tmp_path / "requeued"
    again = requeued.exists() and requeued.read_text() == "requeue 7\n"
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


def test_every_host_of_a_tpu_slice_waits_and_ends(house, tmp_path):
  gcloud = tmp_path / "bin" / "gcloud"
  gcloud.write_text(
    '#!/usr/bin/env bash\nfor last; do :; done\nexec bash -c "${last#--command=}"\n'
  )
  gcloud.chmod(0o755)
  pod = {"launcher": "tpu_pod.sh", "TPU_NAME": "pod", "ZONE": "z", "REPOSITORY": str(tmp_path)}
  code, calls, _ = house(f"exit {RESTART}", "--workdir=a w", **pod)
  assert (code, len(calls), house.waits) == (1, 4, [10, 60, 300])
  assert calls[0] == "-m grain_jax.main --workdir=a w" and "in a w: this is" in house.said[-1]
  save = f'{NUMBER} mkdir -p "a w/checkpoints/$n"; exit {RESTART}'
  code, calls, _ = house(save, "--workdir=a w", **pod, RESTARTS="4", RESTART_SECONDS="2")
  assert (code, len(calls), house.waits) == (RESTART, 5, [2] * 4)
  assert house("exit 2", "--workdir=a w", **pod)[:2] == (2, ["-m grain_jax.main --workdir=a w"])
  assert house("exit 0", "--workdir=a w", **pod)[0] == 0


def test_pods_wait_before_a_new_start(house, tmp_path):
  def start(attempt, *, save=None):
    code = house("", "--workdir=w", launcher="k8s_wait.sh", RESTART_ATTEMPT=str(attempt))[0]
    if save is not None:
      (tmp_path / "w" / "checkpoints" / str(save)).mkdir(parents=True)
    return code, house.waits

  assert start(0) == (0, [])
  assert start(1) == (0, [10])
  assert start(2, save=4) == (0, [60])
  assert start(3) == (0, [10])
  assert start(4) == (0, [60])
  assert start(5) == (0, [300])
  assert start(6) == (1, [])
  assert "3 restarts in a row made no new checkpoint" in house.said[-1]
  assert start(0) == (0, [])  # applied anew


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


def test_local_ends_with_the_first_failure_of_several(house):
  code, calls, _ = house("[ $me = 1 ] && exit 1; sleep 1; exit 75", "2")
  assert (code, len(calls)) == (1, 2)
  assert sorted(call[-1] for call in calls) == ["0", "1"] and ":40001" in calls[0]
  # A wrong flag: the other would wait for it.
  code, _, seconds = house("[ $me = 1 ] && exit 2; exec sleep 50", "2")
  assert code == 2 and seconds < 20


def test_jobset():
  """Against the fields of JobSet v1alpha2 and of batch/v1 Jobs, by hand."""
  jobset = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  spec = jobset["spec"]
  assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
  assert spec["network"] == {"enableDNSHostnames": True}
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (replicated,) = spec["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert replicated["replicas"] == 1 and job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs that
  assert pod["terminationGracePeriodSeconds"] >= 60
  (container,) = pod["containers"]
  ends, vain = job["podFailurePolicy"]["rules"]
  assert ends["onExitCodes"]["containerName"] == container["name"]
  assert ends["onExitCodes"]["operator"] == "In" and RESTART not in ends["onExitCodes"]["values"]
  assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
  # What comes before a new start: the number of the start is an annotation of JobSet's pods.
  (wait,) = pod["initContainers"]
  assert vain == {
    "action": "FailJob",
    "onExitCodes": {"containerName": wait["name"], "operator": "In", "values": [1]},
  }
  assert wait["command"] == ["bash", "launch/k8s_wait.sh"] and wait["args"][0] in container["args"]
  (number,) = wait["env"]
  annotation = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
  assert number == {
    "name": "RESTART_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": annotation}},
  }  # fmt: skip
  assert (
    wait["image"] == container["image"] and wait["volumeMounts"][0] in container["volumeMounts"]
  )
  assert container["command"] + container["args"][:1] == [
    "python3", "-m", "grain_jax.main", "--config=configs/cc12m.py",
  ]  # fmt: skip

  environ = {e["name"]: e["value"] for e in container["env"]}
  kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
  address = addresses.find({**environ, **kubernetes})
  # Pods are named JOBSET-REPLICATEDJOB-JOB-POD, in the subdomain of the JobSet's name.
  name = jobset["metadata"]["name"]
  assert address.coordinator == f"{name}-{replicated['name']}-0-0.{name}:55527"
  assert address.num_processes == job["completions"]
  assert {"containerPort": 55527} in container["ports"]
