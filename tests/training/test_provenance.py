"""That a checkpoint is of the run that goes on with it."""

import pytest

from grain_jax.training import provenance


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_local_negatives_hold_the_devices_that_share_a_batch(tiny, tmp_path, negatives):
  tiny.loss.region_negatives = negatives
  now = {"tokenizer": "a" * 20, "data": "b" * 20, "batch_shards": 8}
  meta = {"config": tiny.to_dict(), **now}
  provenance.check_checkpoint(tmp_path, meta, tiny, now)
  provenance.check_checkpoint(tmp_path, {"config": tiny.to_dict()}, tiny, now)  # an older one
  if negatives == "global":
    provenance.check_checkpoint(tmp_path, meta, tiny, now | {"batch_shards": 4})
    return
  with pytest.raises(ValueError, match="on 8 devices along data and fsdp, and there are 4 now"):
    provenance.check_checkpoint(tmp_path, meta, tiny, now | {"batch_shards": 4})


def test_shapes_that_came_with_weights_name_the_weights(tiny, tmp_path):
  began = tiny.copy_and_resolve_references()
  began.init.image, began.model.embed_dim = "weights/vit", 12
  provenance.write_config(tmp_path, began)
  words = "embed_dim was 12 .* It began with --config.init.image=weights/vit: give that again"
  with pytest.raises(ValueError, match=words):
    provenance.check_workdir(tmp_path, tiny)


def test_other_data_are_named(tiny, tmp_path):
  now = {"tokenizer": "a" * 20, "data": "b" * 20, "batch_shards": 8}
  meta = {"config": tiny.to_dict(), **now, "data": "c" * 20}
  with pytest.raises(ValueError, match="not trained with this data .cccccccccccc, not bbbbbbbb"):
    provenance.check_checkpoint(tmp_path, meta, tiny, now)


@pytest.mark.parametrize("key", ["data.dir", "data.sources", "data.split"])
def test_other_data_on_purpose(tiny, tmp_path, key):
  now = {"tokenizer": "a" * 20, "data": "b" * 20, "batch_shards": 8}
  meta = {"config": tiny.to_dict(), **now, "data": "c" * 20, "step": 4}
  tiny.optimizer.start_step = 4
  provenance.check_checkpoint(tmp_path, meta, tiny, now, changing=[key])
  with pytest.raises(ValueError, match="not trained with this data"):
    provenance.check_checkpoint(tmp_path, meta, tiny, now, changing=["optimizer.lr"])
