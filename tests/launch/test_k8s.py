"""The launcher of Kubernetes: its manifests, what it fills in, and what it refuses."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from grain_jax.runtime import addresses
from grain_jax.runtime.watchdog import RESTART

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FLAGS = ("--config=configs/cc12m.py", "--config.data.dir=gs://b/data", "--workdir=gs://b/runs/x")

_spec = importlib.util.spec_from_file_location("k8s", LAUNCH / "k8s.py")
k8s = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(k8s)


def manifest(device):
  return yaml.safe_load((LAUNCH / k8s.MANIFESTS[device]).read_text())


def launch(*arguments, path=None, **environment):
  environment = {**os.environ, **environment, **({} if path is None else {"PATH": str(path)})}
  command = [sys.executable, LAUNCH / "k8s.py", *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def parts(jobset):
  """(Job's spec, pod's spec, container, container of before)."""
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  return job, pod, pod["containers"][0], pod["initContainers"][0]


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


def test_jobset():
  """Against the fields of JobSet v1alpha2 and of batch/v1 Jobs, by hand."""
  jobset = manifest("gpu")
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


@pytest.mark.parametrize("device", k8s.MANIFESTS)
def test_manifests_have_the_fields_of_their_api(device):
  assert list(k8s.check(manifest(device))) == []
  job, pod, container, wait = parts(manifest(device))
  for each in (container, wait):
    amounts = each["resources"]
    assert amounts["requests"] == amounts["limits"] and {"cpu", "memory"} < {*amounts["limits"], ""}
  assert {"key": k8s.DEVICES[device], "operator": "Exists", "effect": "NoSchedule"} in pod[
    "tolerations"
  ]
  assert wait["args"][0] in container["args"]
  (ends, _) = job["podFailurePolicy"]["rules"]
  assert RESTART not in ends["onExitCodes"]["values"]


def test_the_name_of_a_rule_is_one_that_jobset_takes():
  """`+kubebuilder` of FailurePolicyRule.name: no hyphen."""
  for device in k8s.MANIFESTS:
    (rule,) = manifest(device)["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_pods_of_a_tpu_slice_find_each_other(monkeypatch):
  job, pod, container, _ = parts(manifest("tpu"))
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 4 * 4
  monkeypatch.setattr(addresses.glob, "glob", lambda pattern: ["/dev/vfio/0"])
  monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: name == "libtpu")
  gke = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "grain-worker-0-0.grain,grain-worker-0-1.grain",
  }  # fmt: skip
  environ = {e["name"]: e["value"] for e in container.get("env", [])}
  assert addresses.find({**environ, **gke}) == addresses.Address("TPU")


def test_variables_are_filled_in():
  variables = {
    "IMAGE": "r/grain:1", "NAME": "cc", "NODES": "3", "GPUS": "4", "CPUS": "30", "MEMORY": "200Gi",
    "CLAIM": "disk", "MOUNT": "/mnt/disk", "TOLERATE": "team,spot", "SERVICE_ACCOUNT": "me",
    "QUEUE": "q", "RESTARTS": "7",
  }  # fmt: skip
  jobset = k8s.fill("gpu", ["--config=c", "--workdir", "/mnt/disk/x"], variables)
  assert list(k8s.check(jobset)) == []
  job, pod, container, wait = parts(jobset)
  assert jobset["metadata"] == {"name": "cc", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
  assert (job["parallelism"], job["completions"]) == (3, 3)
  environ = {e["name"]: e["value"] for e in container["env"]}
  kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
  assert addresses.find({**environ, **kubernetes})[1:4] == ("cc-worker-0-0.cc:55527", 3, 2)
  amounts = {"cpu": "30", "memory": "200Gi", "nvidia.com/gpu": 4}
  assert container["resources"] == {"requests": amounts, "limits": amounts}
  assert [t["key"] for t in pod["tolerations"]] == ["nvidia.com/gpu", "team", "spot"]
  assert pod["serviceAccountName"] == "me"
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
  for each in (container, wait):
    assert each["image"] == "r/grain:1"
    assert {"name": "shared", "mountPath": "/mnt/disk"} in each["volumeMounts"]
  assert wait["args"] == ["--workdir=/mnt/disk/x"]

  variables = {"IMAGE": "r/g", "TOPOLOGY": "4x4x8", "CHIPS": "4", "TPU": "tpu-v5p-slice"}
  job, pod, container, wait = parts(k8s.fill("tpu", FLAGS, variables))
  assert job["parallelism"] == job["completions"] == 32
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
  assert pod["volumes"] == [] and wait["volumeMounts"] == []
  assert container["args"] == [*FLAGS] and wait["args"] == ["--workdir=gs://b/runs/x"]
  twice = (*FLAGS, "--workdir", "gs://b/runs/y")  # the last one counts in the run too
  *_, wait = parts(k8s.fill("tpu", twice, variables))
  assert wait["args"] == ["--workdir=gs://b/runs/y"]


@pytest.mark.parametrize(
  ("device", "flags", "variables", "words"),
  [
    ("gpu", FLAGS, {"IMAGE": ""}, "IMAGE= is not an image"),
    ("gpu", FLAGS, {"NODES": "two"}, "NODES=two"),
    ("gpu", FLAGS, {"MEMORY": "200 GB"}, "MEMORY=200 GB"),
    ("gpu", FLAGS, {"NAME": "Grain_1"}, "NAME=Grain_1"),
    ("gpu", ("--config=c",), {}, "--workdir=... is missing"),
    ("gpu", ("--workdir=/data/x",), {}, "--workdir=/data/x is in no bucket, and CLAIM is not set"),
    (
      "gpu",
      ("--workdir=/sharedx",),
      {"CLAIM": "c"},
      "--workdir=/sharedx is not under MOUNT=/shared",
    ),
    ("gpu", ("--workdir=runs/x",), {"CLAIM": "c"}, "--workdir=runs/x is not under MOUNT=/shared"),
    ("tpu", FLAGS, {"TOPOLOGY": "3x3"}, "TOPOLOGY=3x3 has 9 chips, not a multiple of CHIPS=4"),
    ("cpu", FLAGS, {}, "say gpu or tpu first"),
  ],
)
def test_what_could_not_run_is_refused_in_one_line(device, flags, variables, words):
  done = launch(device, *flags, **{"IMAGE": "r/g", "DRY_RUN": "1", **variables})
  assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
  assert words in done.stderr, done.stderr


def test_a_dry_run_needs_no_cluster_and_else_kubectl_gets_the_same(tmp_path):
  dry = launch("tpu", *FLAGS, path=tmp_path, IMAGE="r/g", DRY_RUN="1")
  assert dry.returncode == 0 and list(k8s.check(yaml.safe_load(dry.stdout))) == []
  done = launch("tpu", *FLAGS, path=tmp_path, IMAGE="r/g")
  assert done.returncode == 1 and "kubectl is not here" in done.stderr
  kubectl = tmp_path / "kubectl"
  kubectl.write_text(
    f'#!/bin/bash\necho "$*" > {tmp_path}/asked\n/bin/cat > {tmp_path}/given\nexit 3\n'
  )
  kubectl.chmod(0o755)
  done = launch("tpu", *FLAGS, path=tmp_path, IMAGE="r/g", NAMESPACE="ml")
  assert done.returncode == 3 and (tmp_path / "given").read_text() == dry.stdout
  assert (tmp_path / "asked").read_text() == "apply --namespace ml -f -\n"


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda s, j, p, c, w: c.update(resorces={}), "containers[0].resorces is no field of V1Cont"),
    (lambda s, j, p, c, w: c.pop("name"), "containers[0].name is missing"),
    (lambda s, j, p, c, w: j.update(parallelism="2"), "parallelism = '2' is no int"),
    (lambda s, j, p, c, w: c["env"][0].update(value=2), "env[0].value = 2 is no text"),
    (lambda s, j, p, c, w: c.update(args="--x"), "containers[0].args is no list"),
    (lambda s, j, p, c, w: p["volumes"].pop(0), "container train mounts shared, no volume of"),
    (lambda s, j, p, c, w: c.update(name="x"), "podFailurePolicy names train, no container"),
    (
      lambda s, j, p, c, w: c["resources"]["limits"].update(memory="1 TB"),
      "memory = 1 TB is no quantity",
    ),
    (
      lambda s, j, p, c, w: s["spec"]["failurePolicy"]["rules"][0].update(name="wrong-input"),
      "rules[0].name = 'wrong-input' is not of the form",
    ),
    (
      lambda s, j, p, c, w: s["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
      "action = 'Fail' is none of FailJobSet, RestartJobSet",
    ),
    (lambda s, j, p, c, w: s["spec"].pop("replicatedJobs"), "spec.replicatedJobs is missing"),
  ],
)
def test_what_the_api_would_refuse_is_found_without_it(change, line):
  jobset = manifest("gpu")
  change(jobset, *parts(jobset))
  problems = list(k8s.check(jobset))
  assert problems and line in problems[0], problems


def test_the_image_has_what_its_build_asks_for():
  """By hand: docker is not here."""
  text = (LAUNCH / "Dockerfile").read_text()
  assert "FROM python:${PYTHON}-slim" in text and "WORKDIR /grain_jax" in text
  for extra in ("gpu", "tpu"):
    assert (ROOT / f"requirements-{extra}.txt").is_file()
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
  assert {".git", ".venv", "data", "runs"} <= set(ignored) and "!grain_jax/data" in ignored
  job, _, container, wait = parts(manifest("gpu"))
  assert container["workingDir"] == wait["workingDir"] == "/grain_jax"
