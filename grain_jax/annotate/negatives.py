"""negatives: false captions, and false descriptions of regions, each wrong in one thing.

Of each caption one negative a kind: relation, two neighbouring noun phrases (by their tags) are
exchanged whole, with different nouns and a relation of a direction between them; attribute, object
and action, one adjective, noun or verb gives way to another that a masked language model proposes.
Of each region description up to --per_region with another adjective or noun. They take the place of
negatives that were there.

A proposal is kept if its probability lies within bounds (an improbable word makes no sense, an all
too probable one may well be true), if it is no form of a word that is there, is not too similar to
the one that goes, and is tagged as that was in the new text. Where nothing is left there is no
negative, and the reason is counted. The draws depend on --negatives_seed, the text and the
picture's key alone.

Needs a spaCy pipeline with a tagger (--spacy) and the folder of a masked language model (--model);
or, with --backend=server, a language model behind OpenAI's protocol that names such words: without
the bounds, under the same rules and tags.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import schema
from grain_jax.annotate import asked_words, chat, false_words, language_models, masked, stages
from grain_jax.data.sources import base

ADDRESSES = ("server",)  # flags that are no paths
NEUTRAL = ("server", "api_key_env", "batch_size")
FLAGS = (
  base.Flag("spacy", "name or folder of a spaCy pipeline with a tagger", "en_core_web_sm"),
  base.Flag("backend", "who proposes words", "masked", str, ("masked", "server")),
  base.Flag("model", "folder of a masked language model; the name that a server knows"),
  base.Flag("server", "address of an OpenAI-compatible server: http://HOST:PORT/v1", ""),
  base.Flag("api_key_env", "NAME of the environment variable with the key; none: no key", ""),
  base.Flag("prompt", "file with the prompt for a server", str(asked_words.PROMPT)),
  base.Flag("per_region", "false descriptions of a region, at most", 10, int),
  base.Flag("min_probability", "of a proposed word, by the model", 0.001, float),
  base.Flag("max_probability", "of a proposed word: beyond it, it may well be true", 0.5, float),
  base.Flag(
    "max_similarity", "of a proposed word to the other: cosine of input embeddings", 0.6, float
  ),
  base.Flag("negatives_seed", "of the draws", 0, int),
  base.Flag("batch_size", "pictures at a time", 16, int),
)  # fmt: skip
_INSTALL = "pip install -r requirements-annotate.txt"
_PROBE = "a brown dog sleeps on the sofa"
_LONGEST = 2_000  # characters of a text that is tagged
_ROUNDS = 3  # words of a text that are tried, one after the other
_TOP = 200  # proposals that are asked for
_DRAWN = 8  # of those that pass, among which one is drawn
NOT_TEXT, TOO_LONG, NO_PROPOSAL = "not_text", "too_long", "no_proposal"
SAME_AS_TRUE, REPLACED = "same_as_a_true_text", "replaced"


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
  """The flags' values, checked.

  Raises:
    ValueError: a bound that is none, a folder that is not there, no address, no key; one line.
  """
  found = dict(values)
  if not found["model"]:
    raise ValueError(
      "--model is not given: the folder of a masked language model of transformers, such as "
      "distilroberta-base, is needed. Download one and name its folder."
    )
  of_server = found["backend"] == "server"
  if of_server != bool(found["server"]):
    raise ValueError("--server and --backend=server belong together. Give both, or neither.")
  if of_server:
    chat.check_url(found["server"])
    chat.key_of(found["api_key_env"])
    chat.import_httpx()
  prompt = pathlib.Path(found.pop("prompt")).expanduser()
  found["prompt"] = asked_words.read_prompt(prompt) if of_server else ""
  if not of_server:
    found["model"] = str(base.existing(found["model"], "--model"))
  if pathlib.Path(found["spacy"]).expanduser().exists():
    found["spacy"] = str(base.existing(found["spacy"], "--spacy"))
  for name, low in (("per_region", 0), ("batch_size", 1), ("negatives_seed", 0)):
    if found[name] < low:
      raise ValueError(f"--{name} = {found[name]}: must be at least {low}.")
  if not 0 <= found["min_probability"] < found["max_probability"] <= 1:
    raise ValueError(
      f"--min_probability = {found['min_probability']}, --max_probability = "
      f"{found['max_probability']}: must be 0 <= min < max <= 1."
    )
  if not -1 <= found["max_similarity"] <= 1:
    raise ValueError(f"--max_similarity = {found['max_similarity']}: a cosine is in [-1, 1].")
  return found


def check(values: Mapping[str, Any], source: base.Source, *, say: Callable[[str], None]) -> None:
  """Loads both models once; raises a one-line ValueError where one is none."""
  del source
  load_tagger(values["spacy"])
  model = load_model(values)
  if values["backend"] == "server":
    model.chat.check()
  say(f"negatives: words by {values['model']}, tags by {values['spacy']}")


def make(values: Mapping[str, Any]) -> Negatives:
  return Negatives(values)


def load_tagger(name: str) -> Any:
  """A spaCy pipeline without what is not needed.

  Raises:
    ValueError: spaCy or the pipeline is missing, or has no tagger; one line.
  """
  try:
    import spacy
  except ImportError as error:
    raise ValueError(f"negatives need spaCy: {_INSTALL}.") from error
  try:
    tagger = spacy.load(name, exclude=["ner", "parser", "senter"])
  except (OSError, ValueError, ImportError) as error:
    reason = " ".join(str(error).split())[:120]
    raise ValueError(
      f"--spacy={name}: no pipeline of spaCy ({reason}). Install it, python -m spacy download "
      f"{name if name.isidentifier() else 'en_core_web_sm'}, or give its folder."
    ) from error
  if not any(token.pos_ in false_words.POS.values() for token in tagger(_PROBE)):
    raise ValueError(
      f"--spacy={name} finds no adjective, noun or verb in {_PROBE!r}: it has no tagger of "
      "English. Use one that has, such as en_core_web_sm."
    )
  return tagger


def load_model(values: Mapping[str, Any]) -> Any:
  """What proposes words: a `masked.MaskedModel`, or an `asked_words.AskedModel`."""
  if values["backend"] == "masked":
    return masked.MaskedModel(values["model"])
  server = language_models.ServerChat(
    values["server"], values["model"], api_key_env=values["api_key_env"], max_tokens=200
  )
  return asked_words.AskedModel(server, values["prompt"])


class _Text(NamedTuple):
  """A true text of a picture."""

  item: int
  region: int  # index of the region; -1: a caption
  text: str


class _Job:
  """A text, a kind and the negatives found for it so far."""

  def __init__(self, doc: Any, kind: str, *, wanted: int, known: Collection[str], rng: Any):
    self.doc, self.kind, self.wanted, self.known, self.rng = doc, kind, wanted, known, rng
    self.targets, self.there = false_words.targets(doc, kind), false_words.words_of(doc)
    self.reason = "" if self.targets else false_words.NO_WORD[kind]
    rng.shuffle(self.targets)
    self.found: list[dict[str, Any]] = []

  def next_target(self) -> false_words.Target | None:
    return self.targets.pop() if self.targets and len(self.found) < self.wanted else None


class Negatives:
  """The stage (`stages.Stage`)."""

  def __init__(self, values: Mapping[str, Any]):
    self._values = values
    self.batch_size = values["batch_size"]
    self.num_gpus = 1.0 if values["backend"] == "masked" else 0.0
    self._tagger: Any = None
    self._model: Any = None
    self._spent = collections.Counter[str]()

  def totals(self) -> Mapping[str, float]:
    spent, self._spent = self._spent, collections.Counter()
    of_server = getattr(self._model, "chat", None)
    if of_server is not None:
      spent.update(of_server.take_totals())
    return spent

  def annotate(self, items: Sequence[stages.Item]) -> list[stages.Result]:
    if self._model is None:
      self._tagger = load_tagger(self._values["spacy"])
      self._model = load_model(self._values)
    losses: list[list[tuple[str, str]]] = [[] for _ in items]
    texts = [t for n, item in enumerate(items) for t in self._texts(n, item, losses[n])]
    self._spent["texts"] += len(texts)
    docs = list(self._tagger.pipe(t.text for t in texts))
    jobs = [self._jobs(text, doc, items[text.item]) for text, doc in zip(texts, docs, strict=True)]
    self._fill([job for own in jobs for job in own])
    return self._results(items, texts, docs, jobs, losses)

  def _texts(self, number: int, item: stages.Item, losses: list[Any]) -> Iterator[_Text]:
    """The captions and descriptions that can be tagged; those that cannot are counted."""
    told = [("negatives", -1, caption) for caption in item.captions]
    if self._values["per_region"]:
      told += [
        ("region_negatives", i, region["description"]) for i, region in enumerate(item.regions)
      ]
    for what, region, text in told:
      try:
        text.encode()
      except UnicodeEncodeError:
        losses.append((what, NOT_TEXT))
        continue
      if len(text) > _LONGEST:
        losses.append((what, TOO_LONG))
        continue
      yield _Text(number, region, text)

  def _rng(self, text: _Text, item: stages.Item, kind: str) -> random.Random:
    seed = self._values["negatives_seed"]
    return random.Random(base.chance(f"{seed}:{kind}:{text.text}:{item.key}"))

  def _jobs(self, text: _Text, doc: Any, item: stages.Item) -> list[_Job]:
    kinds = ("attribute", "object") if text.region >= 0 else tuple(false_words.POS)
    wanted = self._values["per_region"] if text.region >= 0 else 1
    # Objects and actions that another text names may be true where this caption does not name them.
    known = frozenset() if text.region >= 0 else _words(item)
    known_of = {"object": known, "action": known}
    return [
      _Job(doc, kind, wanted=wanted, known=known_of.get(kind, ()), rng=self._rng(text, item, kind))
      for kind in kinds
    ]

  def _fill(self, jobs: Sequence[_Job]) -> None:
    """Finds each job's negatives: a word of each text at a time, all texts at once."""
    for _ in range(_ROUNDS):
      asked = [(job, target) for job in jobs if (target := job.next_target()) is not None]
      if not asked:
        return
      places = [masked.Place(job.doc.text, target.start, target.end) for job, target in asked]
      self._spent["masked"] += len(places)
      proposed = self._model.propose(places, top=_TOP)
      tries: list[tuple[_Job, false_words.Target, masked.Proposal, str]] = []
      for (job, target), proposals in zip(asked, proposed, strict=True):
        passed = (p for p in proposals if self._passes(job, target, p))
        for proposal in itertools.islice(passed, max(_DRAWN, 2 * job.wanted)):
          tries.append(
            (job, target, proposal, false_words.fill(job.doc.text, target, proposal.word))
          )
      self._spent["proposals"] += len(tries)
      good: dict[int, list[dict[str, Any]]] = {}
      tagged = self._tagger.pipe(text for *_, text in tries)
      for (job, target, proposal, text), doc in zip(tries, tagged, strict=True):
        if false_words.is_as_meant(job.doc, target, doc):
          good.setdefault(id(job), []).append(
            {"negative": text, "kind": job.kind, "from": target.word, **proposal._asdict()}
          )
      for job, _ in asked:
        own = good.get(id(job), [])
        if job.wanted == 1 and own:
          own = [job.rng.choice(own)]
        job.found += own[: job.wanted - len(job.found)]

  def _passes(self, job: _Job, target: false_words.Target, proposal: masked.Proposal) -> bool:
    values, p = self._values, proposal.probability
    return (
      (p is None or values["min_probability"] <= p <= values["max_probability"])
      and (proposal.similarity is None or proposal.similarity <= values["max_similarity"])
      and false_words.may_replace(
        job.doc, target, proposal.word, kind=job.kind, there=job.there, known=job.known
      )
    )  # fmt: skip

  def _results(self, items, texts, docs, jobs, losses) -> list[stages.Result]:
    """What was found, in the items' order; each text that is true of the picture is left out."""
    negatives: list[list[dict[str, str]]] = [[] for _ in items]
    false: list[dict[int, list[str]]] = [{} for _ in items]
    raws: list[list[Any]] = [[] for _ in items]
    for text, doc, own in zip(texts, docs, jobs, strict=True):
      n, item = text.item, items[text.item]
      if text.region >= 0:
        found = _interleaved([job.found for job in own])
        true = {_plain(item.regions[text.region]["description"])}
        kept = _distinct(found, true)[: self._values["per_region"]]
        false[n][text.region] = [entry["negative"] for entry in kept]
        raws[n] += kept
        if not kept:
          reasons = {job.reason for job in own}
          why = NO_PROPOSAL if "" in reasons else "no_adjective_or_noun"
          losses[n].append(("region_negatives", why))
        continue
      true = {_plain(caption) for caption in item.captions}
      there = {_plain(entry["caption"]) for entry in negatives[n]}
      by_kind = {job.kind: (job.found, job.reason or NO_PROPOSAL) for job in own}
      exchanged, why = false_words.exchanges(doc)
      self._rng(text, item, "relation").shuffle(exchanged)
      by_kind["relation"] = ([{"negative": t, "kind": "relation"} for t in exchanged], why)
      for kind in schema.NEGATIVE_KINDS:
        found, why = by_kind[kind]
        kept = _distinct(found, true | there)[:1]
        if not kept:
          losses[n].append(("negatives", SAME_AS_TRUE if found else why))
          continue
        negatives[n].append({"caption": kept[0]["negative"], "kind": kind})
        there.add(_plain(kept[0]["negative"]))
        raws[n] += kept
    results = []
    for n, item in enumerate(items):
      losses[n] += [("negatives", REPLACED)] * len(item.negatives)
      line: dict[str, Any] = {"negatives": negatives[n]}
      if self._values["per_region"]:
        line["regions"] = [
          {**region, "negatives": false[n].get(i, [])} for i, region in enumerate(item.regions)
        ]
        before = sum(len(region.get("negatives") or ()) for region in item.regions)
        losses[n] += [("region_negatives", REPLACED)] * before
      results.append(stages.Result(line, losses[n], raws[n]))
    return results


def _words(item: stages.Item) -> frozenset[str]:
  """The words, casefolded, of all that is said of a picture."""
  texts = [*item.captions, *item.descriptions, *(r["description"] for r in item.regions)]
  cut = "".join(c if c.isalpha() else " " for c in " ".join(texts).casefold())
  return frozenset(cut.split())


def _plain(text: str) -> str:
  return " ".join(text.casefold().split())


def _distinct(entries: Sequence[dict[str, Any]], true: Collection[str]) -> list[dict[str, Any]]:
  """Each text once, and none that is true."""
  seen, kept = set(true), []
  for entry in entries:
    plain = _plain(entry["negative"])
    if plain not in seen:
      seen.add(plain)
      kept.append(entry)
  return kept


def _interleaved(lists: Sequence[Sequence[Any]]) -> list[Any]:
  """One of each list in turn."""
  longest = max(map(len, lists), default=0)
  return [own[i] for i in range(longest) for own in lists if i < len(own)]
