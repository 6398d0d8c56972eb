"""A JSON object read as members that are found again by their place."""

from grain_jax import textfiles


def read(path):
  """What `json.loads` would give."""
  data = path.read_bytes()
  members = textfiles.iterate_json_object(path)
  pairs = [(m.key, textfiles.parse_member(data[m.offset : m.offset + m.length])) for m in members]
  assert all(key == name for key, (name, _) in pairs)
  return dict(pair for _, pair in pairs)
