"""Negatives of captions and regions: a stub's words, a real model's, and the whole way."""

import collections
import json

import chat_server
import pytest
import tiny_language
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grain_jax import failures, schema
from grain_jax.annotate import language_models, masked, negatives, stages

DEFAULTS = {flag.name: flag.default for flag in negatives.FLAGS}
TAGS = {word: tags for word, *tags in tiny_language.words()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  tiny_language.make_tagger(root / "tagger")
  tiny_language.make_masked(root / "masked")
  return {"spacy": str(root / "tagger"), "model": str(root / "masked")}


class Stub:
  """Proposes, for a word, what it was given."""

  def __init__(self, words):
    self.words, self.asked = words, []

  def propose(self, places, *, top):
    self.asked.append(len(places))
    return [
      [masked.Proposal(*entry) for entry in self.words.get(p.text[p.start : p.end], ())][:top]
      for p in places
    ]


def stage_of(folders, *, words=None, monkeypatch=None, **changes):
  if words is not None:
    monkeypatch.setattr(masked, "MaskedModel", lambda folder: Stub(words))
  return negatives.make(negatives.settings({**DEFAULTS, **folders, **changes}))


def item(*captions, key="k", regions=(), descriptions=(), **changes):
  entries = [
    {"description": text, "box": (0.0, 0.1, 0.5, 0.6), "score": 0.5, "negatives": [], "own": 7}
    for text in regions
  ]
  return stages.Item(key, b"", list(captions), list(descriptions), entries, [])._replace(**changes)


def test_one_thing_is_false_in_each(folders, monkeypatch):
  """Among proposals that are none: improbable, too probable, similar, the same word, of another
  class, generic, known of the picture, true beside the other."""
  words = {
    "brown": [("large", 0.2, 0), ("brown", 0.2, 0), ("black", 0.1, 0.1), ("red", 0.0001, 0)],
    "dog": [("animal", 0.3, 0), ("horse", 0.2, 0.9), ("dogs", 0.1, 0), ("owl", 0.1, 0),
            ("tree", 0.1, 0), ("runs", 0.1, 0), ("cat", 0.05, 0.3)],
    "sofa": [("bench", 0.6, 0)],
    "sleeps": [("sleeping", 0.2, 0), ("sits", 0.2, 0), ("is", 0.2, 0)],
  }  # fmt: skip
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch)
  (result,) = stage.annotate([item("A brown dog sleeps on the sofa.", descriptions=["a tree"])])
  assert result.line == {
    "negatives": [
      {"caption": "The sofa sleeps on a brown dog.", "kind": "relation"},
      {"caption": "A black dog sleeps on the sofa.", "kind": "attribute"},
      {"caption": "A brown cat sleeps on the sofa.", "kind": "object"},
      {"caption": "A brown dog sits on the sofa.", "kind": "action"},
    ],
    "regions": [],
  }
  assert result.losses == []
  told = {"negative": "A brown cat sleeps on the sofa.", "kind": "object", "from": "dog"}
  assert {**told, "word": "cat", "probability": 0.05, "similarity": 0.3} in result.raw
  totals = stage.totals()  # one word of each kind is tried, and the second noun if need be
  assert totals["texts"] == 1 and 3 <= totals["masked"] <= 4 and stage.totals() == {}


@pytest.mark.parametrize(
  "word, probability, similarity, kept",
  [("black", 0.1, 0.1, True), ("black", 0.0009, 0.1, False), ("black", 0.51, 0.1, False),
   ("black", 0.1, 0.61, False), ("black", 0.5, 0.6, True), ("big", 0.1, 0.1, False),
   ("Brown", 0.1, 0.1, False), ("dog", 0.1, 0.1, False), ("runs", 0.1, 0.1, False),
   ("unknown", 0.1, 0.1, False)],
)  # fmt: skip
def test_a_proposal_lies_within_the_bounds(
  folders, monkeypatch, word, probability, similarity, kept
):
  words = {"brown": [(word, probability, similarity)]}
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch)
  (result,) = stage.annotate([item("a brown dog")])
  made = [entry["caption"] for entry in result.line["negatives"]]
  assert made == (["a black dog"] if kept else [])
  assert result.losses.count(("negatives", "no_proposal")) == (1 if kept else 2)


def test_reasons_are_counted(folders, monkeypatch):
  stage = stage_of(folders, words={}, monkeypatch=monkeypatch)
  found = stage.annotate(
    [
      item("there is", regions=["on", "a red dog", "x" * 2001]),
      item("a red dog and a cat"),
      item("a dog sleeps", "y" * 2001, negatives=[{"caption": "q", "kind": "object"}]),
    ]
  )
  assert [result.losses for result in found] == [
    [
      ("region_negatives", "too_long"),
      ("negatives", "no_two_nouns"), ("negatives", "no_adjective"), ("negatives", "no_noun"),
      ("negatives", "no_verb"),
      ("region_negatives", "no_adjective_or_noun"), ("region_negatives", "no_proposal"),
    ],
    [
      ("negatives", "no_relation_between_nouns"), ("negatives", "no_proposal"),
      ("negatives", "no_proposal"), ("negatives", "no_verb"),
    ],
    [
      ("negatives", "too_long"),
      ("negatives", "no_two_nouns"), ("negatives", "no_adjective"), ("negatives", "no_proposal"),
      ("negatives", "no_proposal"), ("negatives", "replaced"),
    ],
  ]  # fmt: skip
  assert [len(result.line["negatives"]) for result in found] == [0, 0, 0]


def test_what_another_caption_says_is_no_negative(folders, monkeypatch):
  words = {"red": [("blue", 0.2, 0)], "blue": [("red", 0.2, 0)]}
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch)
  (result,) = stage.annotate([item("a red dog", "A  blue dog", "a dog above a cat")])
  made = [entry["caption"] for entry in result.line["negatives"]]
  assert made == ["a cat above a dog"]
  assert result.losses.count(("negatives", "same_as_a_true_text")) == 2
  (result,) = stage.annotate([item("a dog above a cat", "a cat above a dog")])
  assert result.line["negatives"] == []


def test_regions_keep_what_they_have_and_get_false_descriptions(folders, monkeypatch):
  words = {
    "brown": [(w, 0.1, 0) for w in ("black", "gray", "pink", "red", "big")],
    "dog": [(w, 0.1, 0) for w in ("cat", "horse", "dogs", "cow")],
  }
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch, per_region=4)
  (result,) = stage.annotate([item("on", regions=["a brown dog", "the dog"])])
  first, second = result.line["regions"]
  assert first == {
    "description": "a brown dog", "box": (0.0, 0.1, 0.5, 0.6), "score": 0.5, "own": 7,
    "negatives": ["a black dog", "a brown cat", "a gray dog", "a brown horse"],
  }  # fmt: skip
  assert second["negatives"] == ["the cat", "the horse", "the cow"]
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch, per_region=0)
  (result,) = stage.annotate([item("on", regions=["a brown dog"])])
  assert result.line == {"negatives": []}


def test_a_server_may_name_the_words(folders, monkeypatch, capsys):
  """Under the same rules; what is no list, and no answer at all, is counted."""
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(language_models, "_BASE", 0.001)
  answers = {
    "brown": ["- big\n- brown\n- **Black**"], "dog": ["1. an animal\n2. dogs\n3. horse."],
    "sofa": ['["bench"]'], "sleeps": ["It sits"], "red": [500, "- blue"], "cat": [b"garbage"],
    "young": ["- fluffy\n- happy"],
  }  # fmt: skip
  with chat_server.serve(chat_server.Told(answers)) as server:
    changes = {"backend": "server", "server": server.url, "model": "tiny"}
    values = negatives.settings({**DEFAULTS, **folders, **changes})
    negatives.check(values, None, say=print)
    stage = negatives.make(values)
    first, second = stage.annotate(
      [item("A brown dog sleeps", "on the sofa"), item("a red cat", key="b")]
    )
    assert [entry["caption"] for entry in first.line["negatives"]] == [
      "A black dog sleeps", "A brown horse sleeps", "on the bench",
    ]  # fmt: skip
    assert first.losses.count(("negatives", "no_proposal")) == 1
    assert [entry["caption"] for entry in second.line["negatives"]] == ["a blue cat"]
    assert second.losses.count(("negatives", "no_proposal")) == 1
    totals = stage.totals()
    assert totals["requests"] == 4 + 2 + 5 and totals["completion_tokens"] == 3 * 5
    assert "requests" not in stage.totals() or stage.totals()["requests"] == 0
    (third,) = stage.annotate([item("the young", "dog, dog")])
    made = [entry["caption"] for entry in third.line["negatives"]]
    assert made in (["horse, dog"], ["dog, horse"])  # fluffy is true of the young
    asked = [b["messages"][0]["content"].splitlines()[0] for b in server.bodies]
    assert {text.count("[") for text in asked} == {1}
    assert any("A brown [dog] sleeps" in b["messages"][0]["content"] for b in server.bodies)
  with chat_server.serve(chat_server.Told({"dog": [503]})) as server:
    values = negatives.settings({**DEFAULTS, **folders, **changes, "server": server.url})
    with pytest.raises(failures.TransientError, match="The same command goes on"):
      negatives.make(values).annotate([item("dog")])


def test_another_word_is_tried_where_one_gives_none(folders, monkeypatch):
  words = {"elephant": [("owl", 0.1, 0)]}
  stage = stage_of(folders, words=words, monkeypatch=monkeypatch)
  for key in "abcdef":  # whatever is drawn first
    (result,) = stage.annotate([item("a dog, a cat, an elephant", key=key)])
    assert [n["caption"] for n in result.line["negatives"]] == ["a dog, a cat, an owl"]


def test_draws_depend_on_key_and_seed_alone(folders):
  """With the real model; pictures alone, in other batches, in other company."""
  texts = ["a red dog sleeps on the old sofa", "a striped cat sits under the table"]
  items = [item(*texts, key=f"{n}.jpg", regions=["a tiny pig"]) for n in range(12)]
  loose = {"min_probability": 0.0, "max_similarity": 1.0}

  def lines(size, stage):
    cut = [items[n : n + size] for n in range(0, len(items), size)]
    return [result.line for part in cut for result in stage.annotate(part)]

  stage = stage_of(folders, **loose)
  whole = lines(12, stage)
  assert lines(1, stage) == whole == lines(5, stage_of(folders, **loose))
  made = {json.dumps(line["negatives"]) for line in whole}
  assert len(made) > 3  # not the same for each
  assert lines(12, stage_of(folders, **loose, negatives_seed=1)) != whole


def words_of(text):
  return "".join(c if c.isalnum() else " " for c in text).split()


SENTENCES = st.lists(st.sampled_from(sorted(TAGS)), min_size=1, max_size=14).map(" ".join)
TEXTS = st.one_of(SENTENCES, st.text(max_size=40), st.tuples(SENTENCES, st.text()).map("".join))


@pytest.fixture(scope="module")
def loose_stage(folders):
  return stage_of(folders, min_probability=0.0, max_probability=1.0, max_similarity=1.0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(captions=st.lists(TEXTS, min_size=1, max_size=3), region=TEXTS)
def test_any_text_gives_a_negative_or_a_reason(loose_stage, captions, region):
  given = item(*captions, regions=[region])
  (result,) = loose_stage.annotate([given])
  made = result.line["negatives"]
  lost = [why for what, why in result.losses if what == "negatives"]
  assert len(made) + len(lost) >= 4 * len(captions) - 3 * (lost.count("not_text"))
  true = {" ".join(c.casefold().split()) for c in captions}
  for entry in made:
    plain = " ".join(entry["caption"].casefold().split())
    assert plain and plain not in true and entry["kind"] in schema.NEGATIVE_KINDS
  false = result.line["regions"][0]["negatives"]
  reasons = [why for what, why in result.losses if what == "region_negatives"]
  assert bool(false) != bool(reasons) and len(set(false)) == len(false) <= 10
  pos = {"attribute": "ADJ", "object": "NOUN", "action": "VERB"}
  for entry in result.raw:
    new = entry["negative"]
    sources = captions if new in {n["caption"] for n in made} else [region]
    sources = [*sources, region]
    if entry["kind"] == "relation":  # the same words in another order
      assert any(
        collections.Counter(words_of(new.casefold())) == collections.Counter(words_of(t.casefold()))
        for t in sources
      )
      continue
    differing = [
      [(a, b) for a, b in zip(words_of(t), words_of(new), strict=True) if a != b]
      for t in sources
      if len(words_of(t)) == len(words_of(new))
    ]
    assert any(
      len(pairs) == 1
      and all(TAGS[word.casefold()][0] == pos[entry["kind"]] for word in pairs[0])
      and TAGS[pairs[0][0].casefold()][1:] != TAGS[pairs[0][1].casefold()][1:]
      for pairs in differing
    ), (entry, sources)


def test_wrong_settings_are_told_in_one_line(folders, tmp_path):
  def told(match, **changes):
    with pytest.raises(ValueError, match=match) as error:
      values = negatives.settings({**DEFAULTS, **folders, **changes})
      negatives.check(values, None, say=print)
    assert "\n" not in str(error.value)

  told("--model is not given", model=None)
  told("--model = /nowhere: there is no such file", model="/nowhere")
  told("has no config.json", model=str(tmp_path))
  told("python -m spacy download en_core_none", spacy="en_core_none")
  told("must be 0 <= min < max <= 1", min_probability=0.6)
  told("a cosine is in", max_similarity=2.0)
  told("--per_region = -1", per_region=-1)
  told("--batch_size = 0", batch_size=0)
  told("belong together", backend="server")
  told("belong together", server="http://x")
  of_server = {"backend": "server", "model": "m", "server": "http://127.0.0.1:9"}
  told("does not answer", **of_server)
  told("not an address of the form http://HOST", **{**of_server, "server": "file:///etc"})
  (tmp_path / "prompt").write_text("name words")
  told("lacks {text}", **of_server, prompt=str(tmp_path / "prompt"))
  import spacy

  spacy.blank("en").to_disk(tmp_path / "blank")
  told("it has no tagger of English", spacy=str(tmp_path / "blank"))
  said = []
  negatives.check(negatives.settings({**DEFAULTS, **folders}), None, say=said.append)
  assert len(said) == 1
