#!/usr/bin/env python3
"""Trains under Kubernetes with JobSet: fills in a manifest, checks it without a cluster, applies.

  IMAGE=REGISTRY/grain NODES=2 CLAIM=shared launch/k8s.py gpu --config=... --workdir=/shared/runs/x
  IMAGE=REGISTRY/grain TOPOLOGY=4x4 launch/k8s.py tpu --config=... --workdir=gs://BUCKET/runs/x

The flags are those of `python -m grain_jax.main`; DRY_RUN=1 prints the manifest instead. Variables
(docs/launching.md): IMAGE, NAME (grain), NAMESPACE, CPUS, MEMORY, CLAIM and MOUNT (/shared),
TOLERATE (keys of taints, by comma), SERVICE_ACCOUNT, QUEUE (of Kueue), RESTARTS (20); NODES (2) and
GPUS a node (8); TPU (tpu-v5-lite-podslice), TOPOLOGY (4x4) and CHIPS a host (4).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

HERE = pathlib.Path(__file__).parent
MANIFESTS = {"gpu": "k8s_jobset.yaml", "tpu": "k8s_jobset_tpu.yaml"}
DEVICES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}

_QUANTITY = r"\d+(\.\d+)?(m|k|[MGTP]|[KMGTP]i)?"
_NAME = r"[a-z]([-a-z0-9]{0,39}[a-z0-9])?"


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
  """The exit code; what is wrong stands in one line each."""
  try:
    if not arguments or arguments[0] not in MANIFESTS:
      raise ValueError(f"say {' or '.join(MANIFESTS)} first, then the run's flags.")
    manifest = fill(arguments[0], arguments[1:], environ)
    problems = list(check(manifest))
  except ValueError as error:
    problems = [str(error)]
  for problem in problems:
    print(f"error: launch/k8s.py: {problem}", file=sys.stderr)
  if problems:
    return 2
  text = yaml.safe_dump(manifest, sort_keys=False, width=1000)
  if environ.get("DRY_RUN", "0") not in ("", "0"):
    print(text, end="")
    return 0
  namespace = ["--namespace", environ["NAMESPACE"]] if environ.get("NAMESPACE") else []
  try:
    return subprocess.run(
      ["kubectl", "apply", *namespace, "-f", "-"], input=text, text=True
    ).returncode
  except FileNotFoundError:
    print(
      "error: launch/k8s.py: kubectl is not here; DRY_RUN=1 prints the manifest.", file=sys.stderr
    )
    return 1


def fill(device: str, flags: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
  """The manifest of a run.

  Args:
    device: 'gpu' or 'tpu'.
    flags: of the run.
    environ: the variables.

  Raises:
    ValueError: a variable is missing or malformed, or the workdir is where no other pod sees it.
  """
  manifest = yaml.safe_load((HERE / MANIFESTS[device]).read_text())
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  (train,), (wait,) = pod["containers"], pod["initContainers"]

  name = _get(environ, "NAME", "grain", _NAME)
  image = _get(environ, "IMAGE", "", r"\S+", "an image of launch/Dockerfile in a registry")
  manifest["metadata"]["name"] = name
  manifest["spec"]["failurePolicy"]["maxRestarts"] = int(_get(environ, "RESTARTS", "20", r"\d+"))
  train["image"] = wait["image"] = image

  if device == "gpu":
    pods = int(_get(environ, "NODES", "2", r"[1-9]\d*"))
    chips = int(_get(environ, "GPUS", "8", r"[1-9]\d*"))
    values = {
      "JAX_NUM_PROCESSES": str(pods),
      "JAX_COORDINATOR_ADDRESS": f"{name}-worker-0-0.{name}:55527",
    }
    train["env"] = [{"name": key, "value": value} for key, value in values.items()]
  else:
    topology = _get(environ, "TOPOLOGY", "4x4", r"[1-9]\d*(x[1-9]\d*){1,2}")
    chips = int(_get(environ, "CHIPS", "4", r"[1-9]\d*"))
    total = math.prod(map(int, topology.split("x")))
    if total % chips:
      raise ValueError(f"TOPOLOGY={topology} has {total} chips, not a multiple of CHIPS={chips}.")
    pods = total // chips
    pod["nodeSelector"] = {
      "cloud.google.com/gke-tpu-accelerator": _get(environ, "TPU", "tpu-v5-lite-podslice", r"\S+"),
      "cloud.google.com/gke-tpu-topology": topology,
    }
  job["parallelism"] = job["completions"] = pods
  default = train["resources"]["limits"]
  amounts = {
    "cpu": _get(environ, "CPUS", default["cpu"], _QUANTITY),
    "memory": _get(environ, "MEMORY", default["memory"], _QUANTITY),
    DEVICES[device]: chips,
  }
  train["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}

  for key in filter(None, environ.get("TOLERATE", "").split(",")):
    pod["tolerations"].append({"key": key, "operator": "Exists"})
  if environ.get("SERVICE_ACCOUNT"):
    pod["serviceAccountName"] = environ["SERVICE_ACCOUNT"]
  if environ.get("QUEUE"):
    manifest["metadata"].setdefault("labels", {})["kueue.x-k8s.io/queue-name"] = environ["QUEUE"]

  workdir = _workdir(flags)
  _mount(pod, workdir, environ)
  train["args"], wait["args"] = list(flags), [f"--workdir={workdir}"]
  return manifest


def _get(environ: Mapping[str, str], key: str, default: str, pattern: str, what: str = "") -> str:
  value = environ.get(key) or default
  if not re.fullmatch(pattern, value):
    raise ValueError(f"{key}={value} is not {what or f'of the form {pattern}'}.")
  return value


def _workdir(flags: Sequence[str]) -> str:
  workdir = ""
  for flag, after in zip(flags, [*flags[1:], ""], strict=True):
    if match := re.fullmatch(r"--?workdir(?:=(.*))?", flag):
      workdir = after if match[1] is None else match[1]  # the last one counts, as in the run
  if workdir:
    return workdir
  raise ValueError("--workdir=... is missing among the run's flags.")


def _mount(pod: dict[str, Any], workdir: str, environ: Mapping[str, str]) -> None:
  """The claim that all pods share, at MOUNT; without one the workdir must be in a bucket."""
  mount, claim = environ.get("MOUNT") or "/shared", environ.get("CLAIM", "")
  for container in (*pod["containers"], *pod["initContainers"]):
    mounts = [m for m in container.get("volumeMounts", []) if m["name"] != "shared"]
    container["volumeMounts"] = [
      *mounts,
      *([{"name": "shared", "mountPath": mount}] if claim else []),
    ]
  others = [volume for volume in pod.get("volumes", []) if volume["name"] != "shared"]
  shared = {"name": "shared", "persistentVolumeClaim": {"claimName": claim}}
  pod["volumes"] = [*([shared] if claim else []), *others]
  if "://" in workdir:
    return
  inside = pathlib.PurePosixPath(workdir).is_relative_to(mount)
  if not claim or not inside:
    where = f"not under MOUNT={mount}" if claim else "in no bucket, and CLAIM is not set"
    raise ValueError(
      f"--workdir={workdir} is {where}: it would be lost with its pod. Take a folder of a "
      "ReadWriteMany claim (CLAIM, MOUNT) or a gs:// path."
    )


def check(manifest: Any) -> Iterator[str]:
  """What the API would refuse, by k8s_fields.json, and what would never start; a line each."""
  types = json.loads((HERE / "k8s_fields.json").read_text())["types"]
  problems = list(_check(manifest, "JobSet", "manifest", types))
  yield from problems
  if problems:
    return
  for jobs in manifest["spec"]["replicatedJobs"]:
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    containers = [*pod["containers"], *pod.get("initContainers", [])]
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in containers:
      for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
          yield f"container {container['name']} mounts {mount['name']}, no volume of the pod"
      resources = container.get("resources", {})
      for key, value in {**resources.get("requests", {}), **resources.get("limits", {})}.items():
        if not re.fullmatch(_QUANTITY, str(value)):
          yield f"container {container['name']}: {key} = {value} is no quantity"
    names = {container["name"] for container in containers}
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
      name = rule.get("onExitCodes", {}).get("containerName", "")
      if name and name not in names:
        yield f"podFailurePolicy names {name}, no container of the pod"


def _check(value: Any, kind: str, where: str, types: dict[str, Any]) -> Iterator[str]:
  """Lines about `value`, which should be of a type of k8s_fields.json."""
  if match := re.fullmatch(r"List\[(.+)\]", kind):
    if not isinstance(value, list):
      yield f"{where} is no list"
      return
    for i, item in enumerate(value):
      yield from _check(item, match[1], f"{where}[{i}]", types)
  elif match := re.fullmatch(r"Dict\[str, (.+)\]", kind):
    if not isinstance(value, dict):
      yield f"{where} is no mapping"
      return
    for key, item in value.items():
      yield from _check(item, "object" if match[1] == "str" else match[1], f"{where}.{key}", types)
  elif kind in types:
    if not isinstance(value, dict):
      yield f"{where} is no mapping"
      return
    fields = types[kind]["fields"]
    for key in types[kind]["required"]:
      if key not in value:
        yield f"{where}.{key} is missing"
    for key, item in value.items():
      if key not in fields:
        yield f"{where}.{key} is no field of {kind}"
      else:
        yield from _check(item, fields[key], f"{where}.{key}", types)
  elif kind == "object":
    if isinstance(value, dict | list):
      yield f"{where} is no single value"
  elif kind == "int" or kind == "bool":
    if type(value) is not (int if kind == "int" else bool):
      yield f"{where} = {value!r} is no {kind}"
  elif not isinstance(value, str):
    yield f"{where} = {value!r} is no text: put it in quotes"
  elif kind.startswith("^"):
    if not re.fullmatch(kind, value):
      yield f"{where} = {value!r} is not of the form {kind}"
  elif "|" in kind and value not in kind.split("|"):
    yield f"{where} = {value!r} is none of {kind.replace('|', ', ')}"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:], os.environ))
