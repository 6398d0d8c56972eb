"""The launchers, as far as a machine without SLURM, Kubernetes and TPUs can try them."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from grain_jax.runtime import addresses
from grain_jax.runtime.watchdog import RESTART

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm_gpu.sbatch", "tpu_pod.sh")


def run(script, *arguments, **environment):
  command = ["bash", LAUNCH / script, *arguments]
  environment = {**os.environ, **environment}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


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
  tpu = run("tpu_pod.sh", *flags, DRY_RUN="1", TPU_NAME="pod", ZONE="z").stdout
  *gcloud, remote = shlex.split(tpu)
  assert gcloud == shlex.split("gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all")
  assert "-m grain_jax.main --config=configs/cc12m.py --workdir=a\\ run || code=$?" in remote


def test_what_is_missing_is_said_in_one_line():
  done = run("tpu_pod.sh", "--config=x")
  assert done.returncode != 0 and "TPU_NAME: is the name" in done.stderr
  done = run("local.sh", "0", "--config=x")
  assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.fixture
def house(tmp_path):
  """A copy of launch/ beside a `python` that ends as the file `script` says; it notes each call."""
  shutil.copytree(LAUNCH, tmp_path / "launch")
  python = tmp_path / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(
    '#!/usr/bin/env bash\nif [ "$1" = -c ]; then echo 40001; exit; fi\n'
    f'echo "$*" >> {tmp_path}/calls\ncase "$*" in *process_id=1*) me=1 ;; *) me=0 ;; esac\n'
    f". {tmp_path}/script\n"
  )
  python.chmod(0o755)

  def launch(script, *arguments, **environment):
    (tmp_path / "script").write_text(script)
    (tmp_path / "calls").write_text("")
    began = time.monotonic()
    done = subprocess.run(
      ["bash", tmp_path / "launch" / "local.sh", *arguments],
      env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    return done.returncode, calls, time.monotonic() - began

  return launch


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
  code, calls, _ = house("exit 1")
  assert (code, len(calls)) == (1, 1)


def test_local_ends_with_the_first_failure_of_several(house):
  code, calls, _ = house("[ $me = 1 ] && exit 1; sleep 1; exit 75", "2")
  assert (code, len(calls)) == (1, 2)
  assert sorted(call[-1] for call in calls) == ["0", "1"] and ":40001" in calls[0]
  # A wrong flag: the other would wait for it.
  code, _, seconds = house("[ $me = 1 ] && exit 2; exec sleep 50", "2")
  assert code == 2 and seconds < 20


def test_local_hands_sigterm_on_and_does_not_start_again(house, tmp_path):
  (tmp_path / "script").write_text(
    f"trap 'exit {RESTART}' TERM; touch {tmp_path}/up-$me; for i in {{1..300}}; do sleep 0.1; done"
  )
  launcher = subprocess.Popen(["bash", tmp_path / "launch" / "local.sh", "2"])
  while not all((tmp_path / f"up-{i}").exists() for i in range(2)):
    assert launcher.poll() is None
    time.sleep(0.05)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(20) == RESTART
  assert len((tmp_path / "calls").read_text().splitlines()) == 2


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
  (ends,) = job["podFailurePolicy"]["rules"]
  assert ends["onExitCodes"]["containerName"] == container["name"]
  assert ends["onExitCodes"]["operator"] == "In" and RESTART not in ends["onExitCodes"]["values"]
  assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
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
