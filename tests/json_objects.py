"""A JSON object read as members that are found again by their place."""

from grain_jax import jsonfiles


def read(path):
  """What `json.loads` would give."""
  data = path.read_bytes()
  members = jsonfiles.iterate_object(path)
  pairs = [(m.key, jsonfiles.parse_member(data[m.offset : m.offset + m.length])) for m in members]
  assert all(key == name for key, (name, _) in pairs)
  return dict(pair for _, pair in pairs)
