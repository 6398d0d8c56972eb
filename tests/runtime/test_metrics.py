"""Means by weight, the metrics file across stops, and the progress line."""

import json

import jax.numpy as jnp
import pytest

from grain_jax import failures, places
from grain_jax.runtime import metrics, writers


def pair(value, weight):
  return jnp.float32(value), jnp.float32(weight)


def test_means_are_weighted_and_counts_are_totals():
  """(6 + 0 + 2) / (3 + 0 + 1) = 2, where the mean of the steps' means would be 2 of (2, -, 2)."""
  steps = [
    {"loss_box": pair(6, 3), "bad_examples": pair(2, 1), "iou": pair(0, 0)},
    {"loss_box": pair(10, 1), "bad_examples": pair(1, 1), "iou": pair(0, 0)},
  ]
  assert metrics.summarize(steps) == {"train/loss_box": 4.0, "train/bad_examples": 3.0}


def test_lines_past_the_checkpoint_and_a_line_cut_short_are_taken_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a"')
  writer = writers.JsonlWriter(path, start_step=1)
  writer.write_scalars(2, {"a": 5.0, "b": float("nan")})
  writer.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0, "b": None}]


def test_an_evaluation_done_again_takes_the_place_of_the_first(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 4, "loss": 1.0}\n{"step": 4, "top1": 0.5}\n')
  writer = writers.JsonlWriter(path, start_step=4)
  writer.write_scalars(4, {"top1": 0.75})
  writer.close()
  assert metrics.read_jsonl(path) == [{"step": 4, "loss": 1.0}, {"step": 4, "top1": 0.75}]


def test_lines_that_are_no_metrics_are_passed_over_and_counted(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "tr{"step": 2}\n[3]\n{"loss": 2}\n{"step": 3}\n{"st')
  assert metrics.read_jsonl(path) == [{"step": 1}, {"step": 3}]
  assert "4 broken lines passed over, first 2" in caplog.text
  assert metrics.read_jsonl(tmp_path / "none.jsonl") == []


def test_files_of_a_bucket_are_uploaded_again_after_one_that_failed(tmp_path, monkeypatch, caplog):
  local, bucket, writes = tmp_path / "local", tmp_path / "bucket", []
  local.mkdir()
  bucket.mkdir()
  monkeypatch.setattr(writers, "UPLOAD_SECONDS", 30.0)
  write_bytes = places.write_bytes

  def write(path, data):
    writes.append(path.name)
    if len(writes) == 5:
      raise failures.TransientError("the bucket is away")
    write_bytes(path, data)

  mirrored = writers._Mirrored(local, bucket, start_step=0)
  monkeypatch.setattr(places, "write_bytes", write)
  for step in (1, 2, 3):
    mirrored.write_scalars(step, {"a": step})
  mirrored.flush()  # does not wait for the pause
  assert [line["step"] for line in metrics.read_jsonl(bucket / "metrics.jsonl")] == [1, 2, 3]
  count = len(writes)
  assert count <= 4  # one upload of both files while they grew, one of all
  del writes[:]
  writes += [""] * 4
  mirrored.write_scalars(4, {"a": 4})
  mirrored.close()
  assert "metrics are not uploaded yet: the bucket is away" in caplog.text
  assert [line["step"] for line in metrics.read_jsonl(bucket / "metrics.jsonl")] == [1, 2, 3, 4]
  assert list(bucket.glob("events.*")) and not local.exists()


def test_writer_makes_a_jsonl_and_an_events_file(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  writer = writers.create_writer(tmp_path, start_step=0)
  writer.write_scalars(3, {"loss": 1.5})
  writer.close()
  assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 1.5}]
  events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
  (event,) = events.Tensors("loss")
  assert event.step == 3 and tensor_util.make_ndarray(event.tensor_proto) == 1.5


@pytest.mark.parametrize(
  ("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
  assert metrics.format_duration(seconds) == text


def test_speed_leaves_pauses_out(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  progress = metrics.Progress(total_steps=40, batch_size=8)
  progress.start(1)
  now[0] += 15.0
  progress.pause(5.0)
  progress.waited(2.0)
  # 10 steps of 8 images in 10 s; 29 steps left; 2 s of the 10 without data.
  assert progress.speed(11) == metrics.Speed(8.0, 29.0, 2.0, 0.2)
  now[0] += 1.0
  assert progress.speed(12).waited == 0
  line = progress.line(11, {"train/loss": 2.0, "train/samples_per_second": 8.0}, 29.0)
  assert line.startswith("step 11/40  loss 2.000") and line.endswith("8 samples/s  0:29 left")
  skipped = progress.line(11, {"train/samples_per_second": 8.0}, 29.0)  # no image was usable
  assert skipped.startswith("step 11/40  no loss ()")


@pytest.mark.parametrize(
  "bad, end", [(0.0, "left"), (1.0, "1 bad record"), (1234.0, "1,234 bad records")]
)
def test_the_progress_line_tells_the_number_of_bad_records(bad, end):
  values = {"train/loss": 2.0, "train/samples_per_second": 8.0, "train/bad_examples": bad}
  line = metrics.Progress(total_steps=40, batch_size=8).line(11, values, 29.0)
  assert line.endswith(f"  {end}") or (not bad and line.endswith("0:29 left"))
