"""Places that a user names: paths of a file system, and gs:// paths where a bucket serves as well.

Callers open a place once (`open_place`) and go on with what it gives, which has the methods of
`pathlib.Path`; what is done in another way in a bucket stands here. All other addresses on the net
are refused.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import secrets
import shutil
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from grain_jax import failures

# Of two letters at least: C:/ is a path. A pathlib.Path has one slash where an address had two.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)

_HUB = re.compile(r"(hf:/+|https?:/+(www\.)?(huggingface\.co|hf\.co)/)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_BUCKET = re.compile(r"gs:/+([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(/|$)")
THREADS = 16  # requests to a bucket at a time
_UPLOADS = 4  # files at a time; TensorFlow writes each to the temporary folder first


def check(path: str | os.PathLike, name: str, *, bucket: bool = False) -> None:
  """Refuses an address such as s3://bucket/run; nothing is asked of the net.

  Args:
    path: what the user gave.
    name: where: '--workdir', 'config.data.dir'.
    bucket: gs:// is taken.

  Raises:
    ValueError: `path` is an address that is not taken here; one line.
  """
  text = os.fspath(path)
  found = _SCHEME.match(text) if isinstance(text, str) else None
  if found is None:
    return
  scheme = found.group(1).lower()
  sign = "=" if name.startswith("-") else " = "
  what = f"{name}{sign}{text} is an address ({scheme}://), not a path of a file system."
  if scheme == "file":
    raise ValueError(f"{what} Write the path alone: /{text[found.end() :].lstrip('/')}.")
  if bucket and scheme == "gs":
    if not _BUCKET.match(text):
      raise ValueError(
        f"{name}{sign}{text} is no place in a bucket. Write gs://BUCKET/FOLDER, in small letters."
      )
    if not _has_storage_client():
      raise ValueError(
        f"{name}{sign}{text}: gs:// needs google-cloud-storage, which is not installed. Run pip "
        "install google-cloud-storage google-cloud-storage-control (requirements-gcs.txt), or give "
        "a path of a file system."
      )
    return
  also = " Of addresses gs://BUCKET/FOLDER is taken." if bucket else ""
  raise ValueError(f"{what}{also} Copy it to a local disk or mount it, and give that path.")


@functools.cache
def _has_storage_client() -> bool:
  """Whether there is what Orbax needs for gs:// and does not ask for."""
  try:
    return importlib.util.find_spec("google.cloud.storage") is not None
  except ModuleNotFoundError:
    return False


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a place is in a bucket."""
  return re.match("gs:/", os.fspath(path)) is not None


def open_place(path: str | os.PathLike, name: str) -> pathlib.Path:
  """A place to read and write; it need not be there, but its bucket must.

  Args:
    path: what the user gave.
    name: where: '--workdir', 'config.data.dir'.

  Returns:
    A `pathlib.Path`, or a `buckets.BucketPath`, which has its methods.

  Raises:
    ValueError: an address that is not taken, or a bucket that is not there or may not be read; one
      line.
    failures.TransientError: the bucket does not answer.
  """
  check(path, name, bucket=True)
  if not is_bucket(path):
    return at(path)
  from grain_jax import buckets

  bucket = _BUCKET.match(os.fspath(path)).group(1)
  where = f"{name}{'=' if name.startswith('-') else ' = '}{os.fspath(path)}"
  try:
    buckets.check_bucket(bucket)
  except FileNotFoundError:
    raise ValueError(
      f"{where}: there is no bucket {bucket!r}. Correct the name, or make it first: gcloud storage "
      f"buckets create gs://{bucket}."
    ) from None
  except PermissionError as error:
    raise ValueError(
      f"{where}: bucket {bucket!r} may not be read ({error.strerror}). Log in (gcloud auth "
      "application-default login, or a service account), or have the right to read it granted."
    ) from None
  return at(path)


def at(path: str | os.PathLike) -> pathlib.Path:
  """`open_place` of one that was checked: no request is made.

  '~/' is the user's folder, which shells leave as it is behind '--flag='.
  """
  if not is_bucket(path):
    local = pathlib.Path(path)
    return local.expanduser() if local.parts[:1] == ("~",) else local
  from grain_jax import buckets

  text = os.fspath(path)
  return buckets.BucketPath("gs://" + text.split(":", 1)[1].strip("/"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that appears whole or not at all, over one that is there."""
  if is_bucket(path):  # an object does so by itself
    path.write_bytes(data)
    return
  # In containers every program is process 1.
  temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
  try:
    temporary.write_bytes(data)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """`write_bytes` of UTF-8."""
  write_bytes(path, text.encode("utf-8"))


def open_raw(path: pathlib.Path, offset: int = 0) -> io.RawIOBase:
  """The bytes of a file from an offset on, unbuffered."""
  if is_bucket(path):
    from grain_jax import buckets

    return buckets.RawReader(path, offset)
  file = path.open("rb", buffering=0)
  if offset:
    file.seek(offset)
  return file


class Stamp(NamedTuple):
  """What changes with a file."""

  size: int  # bytes
  time: float  # of the last change


def stamps(paths: Sequence[pathlib.Path]) -> list[Stamp | None]:
  """Of each file; None where there is none. Of a bucket many are asked for at a time."""

  def stamp(path: pathlib.Path) -> Stamp | None:
    try:
      found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
      return None
    return Stamp(found.st_size, found.st_mtime)

  if not paths or not is_bucket(paths[0]):
    return [stamp(path) for path in paths]
  with futures.ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(stamp, paths))


def remove_tree(folder: pathlib.Path) -> None:
  """Removes a folder and all in it; nothing where it is not there."""
  if not is_bucket(folder):
    shutil.rmtree(folder, ignore_errors=True)
  elif folder.is_dir():
    folder.rmtree()


def move_aside(folder: pathlib.Path, target: pathlib.Path, *, first: str) -> None:
  """Renames a folder; in a bucket object by object, beginning with `first`, if it is there."""
  if not is_bucket(folder):
    folder.rename(target)
    return
  from grain_jax import buckets

  objects = buckets.walk(folder)
  for path in sorted(objects, key=lambda path: path.name != first):
    path.replace(target / path.relative_to(folder))


def files_below(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """All files of a folder and of those in it, each once, folder by folder in a fixed order.

  Links to folders are followed, as data that is spread over disks has them, after all that lies in
  the folder itself; one that leads to what was met before is not, so that circles end.

  Raises:
    OSError: a folder cannot be read; lost+found, which is the system's own, is passed over.
  """

  def fail(error: OSError) -> None:
    if pathlib.Path(error.filename).name != "lost+found":
      raise error

  met: set[str] = set()
  waiting = [str(root)]
  while waiting:
    links: list[str] = []
    for folder, folders, names in os.walk(waiting.pop(0), onerror=fail):
      real = os.path.realpath(folder)
      if real in met:
        folders.clear()
        continue
      met.add(real)
      folders.sort()
      links += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
      yield from (pathlib.Path(folder, name) for name in sorted(names))
    waiting += links


def upload(source: pathlib.Path, target: pathlib.Path, *, last: Collection[str] = ()) -> None:
  """Copies a local file or folder to a place in a bucket; the files named `last` come last.

  What is there already, by its MD5, is not copied again.

  Raises:
    failures.TransientError: the bucket does not answer, or an object is not like its file.
  """
  files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
  ends = [path for path in files if path.name in last and path.parent == source]

  def send(path: pathlib.Path) -> None:
    upload_file(path, target if path == source else target / path.relative_to(source).as_posix())

  with futures.ThreadPoolExecutor(_UPLOADS) as pool:
    list(pool.map(send, [path for path in files if path not in ends]))
  for path in ends:
    send(path)


def upload_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """See `upload`."""
  from grain_jax import buckets

  with source.open("rb") as reader:
    digest = base64.b64encode(hashlib.file_digest(reader, "md5").digest()).decode()
  if target.is_file() and buckets.md5(target) == digest:
    return  # of an upload that was cut off
  with source.open("rb") as reader, target.open("wb") as writer:
    while data := reader.read(1 << 23):
      writer.write(data)
  if (found := buckets.md5(target)) not in (digest, None):
    raise failures.TransientError(
      f"{target} has MD5 {found} after {source} of MD5 {digest} was copied to it. Start again."
    )


def user_cache() -> pathlib.Path:
  """`grain_jax` in $XDG_CACHE_HOME, or in ~/.cache where that is no absolute path."""
  root = os.environ.get("XDG_CACHE_HOME", "")
  home = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache"
  return home / "grain_jax"


def hub_name(path: str | os.PathLike) -> str | None:
  """'org/name' where a path that leads nowhere may be a model's name on the Hugging Face hub.

  Args:
    path: 'org/name', 'hf://org/name' or 'https://huggingface.co/org/name'.

  Returns:
    None where there is such a file, or a folder `org` in which it may have been meant.
  """
  text = os.fspath(path)
  address = _HUB.match(text)
  name = text[address.end() :] if address else text
  if not (found := _HUB_NAME.match(name)) or (not address and found.group() != name):
    return None
  org, _, model = found.group().partition("/")
  file = re.search(r"\.(pth?|ckpt|bin|tar|safetensors|json|index)$", model)
  if not address and (file or org in (".", "..") or _exists(pathlib.Path(org))):
    return None
  return found.group()


def check_all(values: Mapping[str, Any], *, buckets: Collection[str] = ()) -> None:
  """`check` of every text or path, and of every list of them, among named values.

  Args:
    values: by name.
    buckets: names of those that may be in a bucket.
  """
  for name, value in values.items():
    for item in value if isinstance(value, list | tuple) else (value,):
      if isinstance(item, str | os.PathLike):
        check(item, name, bucket=name in buckets)


def find_file(path: str | os.PathLike) -> pathlib.Path:
  """The path as its file is spelled on the disk; as it is where there is none, or no accent in it.

  macOS and what it writes spell an accent as a character of its own (NFD), other systems within its
  letter (NFC): what stands in a file of annotations may name a file of the other spelling. A path
  with ".." stays: a link that is found so would lead elsewhere than the one that was judged.
  """
  path = at(path)
  if is_bucket(path) or str(path).isascii() or ".." in path.parts or _exists(path):
    return path
  found = pathlib.Path(path.anchor)
  for part in path.relative_to(path.anchor).parts:
    forms = dict.fromkeys([part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))])
    spelled = next((found / form for form in forms if _exists(found / form)), None)
    if spelled is None:
      return path
    found = spelled
  return found


def _exists(path: pathlib.Path) -> bool:
  try:
    return os.path.lexists(path)
  except ValueError:  # a NUL, half a character: no path
    return False
