"""What a run says of the texts that it loses."""

from grain_jax.training import notices


def test_each_kind_of_loss_is_said_once_and_only_where_it_is_more_than_a_little(tiny):
  tiny.data.row_length, tiny.model.text.context = 60, 77
  notes = notices.Notices(tiny)
  little = {
    "train/dropped_negatives": 0.01,
    "train/dropped_texts": 8.0,
    "train/truncated_texts": 8.0,
  }
  assert list(notes.lines(little, 800)) == [] == list(notes.lines({}, 8))
  assert list(notes.lines({"train/truncated_texts": 9.0}, 800)) == [
    "9 texts of 800 images fill the context of 77 tokens: what is longer is cut there "
    "(config.model.text.context)."
  ]
  much = {"train/dropped_negatives": 0.125, "train/dropped_texts": 900.0}
  much["train/truncated_texts"] = 400.0
  rows = "do not fit rows of 60 tokens and are left out: raise config.data.row_length."
  assert list(notes.lines(much, 800)) == [
    f"12.5% of the false captions and descriptions {rows}",
    f"900 descriptions of 800 images {rows}",
  ]  # fmt: skip
  assert list(notes.lines(much, 800)) == []
