"""One block of a source: its records read, checked and written, with all that is said of them.

A finished block is a folder with FACTS in it; it is written aside and renamed, so that it is whole
or not there.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from grain_jax import schema
from grain_jax.data import records, token_ids
from grain_jax.data.building import hints as hints_lib
from grain_jax.data.building import preview
from grain_jax.data.sources import annotated, base

FACTS = "facts.json"
_WRITER = "group_size:1,uncompressed"  # read once, when the shards are written
COUNTED = ("captions", "regions", "negatives", "region_negatives", "bytes")  # of a kept record


def folder_of(blocks: pathlib.Path, number: int) -> pathlib.Path:
  return blocks / f"{number:06d}"


def records_file(block: pathlib.Path, split: str) -> pathlib.Path:
  """The records of a split in a block's folder."""
  return block / f"{split}.array_record"


def aside(path: pathlib.Path) -> pathlib.Path:
  """Where something is written before it is renamed to `path`."""
  return path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def write(
  source: base.Source,
  block: base.Block | None,
  path: pathlib.Path,
  *,
  scratch: pathlib.Path,
  share: float = 1.0,
  threads: int = 1,
  tokens: token_ids.Writer | None = None,
  tick: Callable[[str], None] = lambda split: None,
) -> None:
  """Reads a block and writes its folder, unless it is there.

  Args:
    source: of the block.
    block: one of `source.blocks`; None: all of a source without blocks.
    path: the folder to be.
    scratch: of the build.
    share: of the records, those among which images of the preview are chosen.
    threads: that decode and check images.
    tokens: gives the ids of texts that are written with them.
    tick: gets the split of each record.

  Raises:
    ValueError: the source cannot be read; one line.
    failures.TransientError: storage failed; one line.
  """
  if (path / FACTS).is_file():
    return
  temporary = aside(path)
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    facts = _write(source, block, temporary, scratch, share, threads, tokens, tick)
    (temporary / FACTS).write_text(json.dumps(facts))
    try:
      temporary.rename(path)
    except OSError:  # another process was sooner
      if not (path / FACTS).is_file():
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


class RecordWriter:
  """Writes an ArrayRecord file. What fails on the disk is an OSError with its number."""

  def __init__(self, path: pathlib.Path, options: str):
    """`options` are array_record's."""
    from array_record.python import array_record_module

    self._path = path
    with self._of_the_disk():
      self._writer = array_record_module.ArrayRecordWriter(str(path), options)

  def write(self, data: bytes) -> None:
    with self._of_the_disk():
      self._writer.write(data)

  def close(self) -> None:
    with self._of_the_disk():
      self._writer.close()

  def abandon(self) -> None:
    """Closes a file that nobody will read."""
    with contextlib.suppress(RuntimeError):  # a second time, of a full disk
      self._writer.close()

  @contextlib.contextmanager
  def _of_the_disk(self) -> Iterator[None]:
    try:
      yield
    except RuntimeError as error:  # 'write() failed: No space left on device; writing FILE; ...'
      told = re.search(r"failed: ([^;]+);", str(error))
      for number in errno.errorcode if told else ():
        if os.strerror(number) == told[1]:
          raise OSError(number, told[1], str(self._path)) from error
      raise


def _write(source, block, folder, scratch, share, threads, tokens, tick) -> dict[str, Any]:
  hints, page = hints_lib.Hints(source), preview.Preview(share)
  writers: dict[str, RecordWriter] = {}
  items: list[list[Any]] = []
  with_ = {"with_mask": source.with_mask, "with_label": source.with_label}
  with_ |= {"token_ids": tokens.encode if tokens else None}
  try:
    for split, key, given, checked in checked_records(source, block, scratch, threads):
      losses = list(checked.dropped)
      hints.add(split, given, checked)
      page.add(split, given, checked, losses)
      counts, record = None, checked.record
      if record is not None:
        if not split.isidentifier():
          raise ValueError(f"split {split!r} of record {key!r} is not a name. Use letters and _.")
        if split not in writers:
          writers[split] = RecordWriter(records_file(folder, split), _WRITER)
        data = records.encode(record, **with_)
        writers[split].write(data)
        false = sum(len(r.get("negatives") or ()) for r in record[schema.RECORD_REGIONS])
        names = (schema.RECORD_CAPTIONS, schema.RECORD_REGIONS, schema.RECORD_NEGATIVES)
        counts = [*(len(record[name]) for name in names), false, len(data)]
      items.append([split, key, counts, losses])
      tick(split)
    for writer in writers.values():
      writer.close()
  except BaseException:
    for writer in writers.values():
      writer.abandon()
    raise
  return {"items": items, "hints": hints.take(), "preview": page.take()}


def checked_records(
  source: base.Source,
  block: base.Block | None,
  scratch: pathlib.Path,
  threads: int,
  *,
  need_caption: bool = True,
) -> Iterator[tuple[str, str, Any, records.Checked]]:
  """(split, key, record as given, as checked) in the source's order.

  `need_caption`: an image that has none, nor was given one by annotation, is dropped.
  """

  added = None if source.annotated is None else source.annotated.open(scratch)
  excluded = None if source.exclusion is None else source.exclusion.open(scratch)

  def check(record) -> records.Checked:
    if isinstance(record, records.Refused):
      return records.Checked(None, [(record.what, record.why)])
    name, ids = record[schema.RECORD_KEY], record.get(schema.RECORD_IDS, ())
    if excluded is not None and (why := excluded.is_excluded(None, name, ids)):
      return records.Checked(None, [("records", why)])
    checked = records.check(
      record,
      tolerance=source.tolerance,
      check_image=source.check_image,
      max_pixels=source.max_pixels,
      max_side=source.max_side,
      box_format=source.box_format,
      box_units=source.box_units,
      need_caption=need_caption and added is None,
    )
    if added is not None:
      checked = annotated.merge(checked, added.find(name), need_caption=need_caption)
    kept, dropped = checked.record, list(checked.dropped)
    if kept is not None and excluded is not None:
      why = excluded.is_excluded(kept[schema.RECORD_IMAGE], name)
      kept, dropped = (None, [*dropped, ("records", why)]) if why else (kept, dropped)
    if kept is not None and source.rules is not None:
      kept, lost = source.rules.apply(kept)
      dropped += lost
    return checked._replace(record=kept, dropped=dropped)

  def key(record) -> str:
    return record.key if isinstance(record, records.Refused) else record[schema.RECORD_KEY]

  read = source.read() if block is None else source.read(block, scratch)
  if not source.check_image or threads <= 1:
    for split, record in read:
      yield split, key(record), record, check(record)
    return
  ahead: collections.deque[tuple[str, str, Any, futures.Future]] = collections.deque()
  with futures.ThreadPoolExecutor(threads) as pool:
    try:
      for split, record in read:
        ahead.append((split, key(record), record, pool.submit(check, record)))
        if len(ahead) > 4 * threads:
          split, name, given, future = ahead.popleft()
          yield split, name, given, future.result()
      while ahead:
        split, name, given, future = ahead.popleft()
        yield split, name, given, future.result()
    finally:
      for *_, future in ahead:
        future.cancel()
