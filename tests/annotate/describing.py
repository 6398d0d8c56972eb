"""Settings of `describe` and pictures for its tests."""

import toy_data

from grain_jax.annotate import describe, stages


def settings(server, **changes):
  values = {flag.name: flag.default for flag in describe.FLAGS}
  own = {"server": server if isinstance(server, str) else server.url, "model": "m", "backoff": 0.01}
  return describe.settings({**values, **own, **changes})


def item(key="a.jpg", *, regions=(), captions=("a dog on a sofa",)):
  picture = toy_data.record(sum(map(ord, key)))["image"]
  return stages.Item(key, picture, list(captions), [], list(regions), [])
