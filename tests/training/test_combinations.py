"""Objectives, poolings and towers combine freely: the step of each combination, traced."""

import itertools

import jax
import pytest

from grain_jax import config as configs
from grain_jax.models import grain, initial
from grain_jax.training import steps

# What each of these may be; the rest follows.
CHOICES = {
  "method": ("grain", "clip"),
  "pool": ("query", "class", "max", "mean", "map"),
  "class_token": (True, False),
  "text": ("clip", "t5", "siglip"),
  "contrast": ("softmax", "sigmoid"),
  "negatives": (0, 4),
  "negatives_per_region": (0, 2),
  "auxiliary": ("none", "max"),
  "anchor": (0.0, 1.0),
}


def pairs():
  """Combinations in which any two values of two choices meet, where they can; the first fits."""
  names = list(CHOICES)
  wanted = {
    frozenset(((a, x), (b, y)))
    for a, b in itertools.combinations(names, 2)
    for x in CHOICES[a]
    for y in CHOICES[b]
    if can({a: x, b: y})
  }
  found = []
  everything = [dict(zip(names, values)) for values in itertools.product(*CHOICES.values())]  # noqa: B905
  everything = [values for values in everything if can(values)]
  while wanted:
    best = max(everything, key=lambda values: len(wanted & meetings(values)))
    assert wanted & meetings(best), wanted
    found.append(best)
    wanted -= meetings(best)
  return found


def meetings(values):
  return {frozenset(two) for two in itertools.combinations(values.items(), 2)}


def can(values):
  """What no model can be: `config.check` says it."""
  pool = values.get("pool")
  if pool == "query" and values.get("method") == "clip":
    return False
  if pool == "class" and values.get("class_token") is False:
    return False
  return not (values.get("negatives_per_region") and values.get("method") == "clip")


def config_of(tiny, values):
  c = tiny
  c.method = values["method"]
  c.model.update(pool=values["pool"], auxiliary_pool=values["auxiliary"])
  c.model.image.class_token = values["class_token"]
  c.model.text.kind = values["text"]
  c.model.logit_bias = values["contrast"] == "sigmoid"
  c.loss.update(contrast=values["contrast"], anchor=values["anchor"], rank=0.2, intra=0.3)
  c.loss.update(image_grounded=0.1, text_grounded=0.1 * bool(values["anchor"]))
  c.data.update(
    negatives=values["negatives"], negatives_per_region=values["negatives_per_region"],
    row_length=600 if values["text"] == "siglip" else 200,
  )  # fmt: skip
  c = configs.resolve(c)
  configs.check(c)
  return c


@pytest.mark.parametrize("values", pairs(), ids=lambda values: "-".join(map(str, values.values())))
def test_any_two_choices_go_together(tiny, values):
  config = config_of(tiny, values)
  model = grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))
  batch = initial.dummy_batch(config, config.batch_size)

  def gradients(params, batch):
    key = jax.random.key(0)
    teacher = steps.encode_frozen(params, batch, model=model) if values["anchor"] else None
    loss = lambda p: steps.loss_function(  # noqa: E731
      p, batch, key, model=model, config=config, teacher=teacher
    )
    return jax.value_and_grad(loss, has_aux=True)(params)

  (total, (metrics, _)), found = jax.eval_shape(gradients, params, batch)
  assert total.shape == () and jax.tree.structure(found) == jax.tree.structure(params)
  wanted = {
    "loss_caption": True,
    "loss_box": values["method"] == "grain",
    "loss_region": values["method"] == "grain",
    "loss_rank": bool(values["negatives"]),
    "loss_image_grounded": bool(values["negatives"]),
    "loss_text_grounded": bool(values["negatives"] and values["anchor"]),
    "valid_region_negatives": bool(values["negatives_per_region"]),
    "loss_auxiliary": values["auxiliary"] != "none",
    "loss_anchor": bool(values["anchor"]),
  }
  assert {name: name in metrics for name in wanted} == wanted
