"""JSON objects of any size read in pieces, against `json` on the whole."""

import json

import json_objects
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grain_jax import jsonfiles, textfiles

JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
SHOWN = settings(
  max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SHOWN
@given(
  content=st.lists(st.tuples(st.text(max_size=5), JSON), max_size=5),
  separators=st.sampled_from([(",", ":"), (" ,\n\t", " : "), (",\r\n", ":\n")]),
  escaped=st.booleans(),
  size=st.integers(1, 40),
)
def test_an_object_read_in_pieces_is_jsons(
  tmp_path, monkeypatch, content, separators, escaped, size
):
  """Keys that come twice and NaN included, whatever byte a piece ends at."""
  monkeypatch.setattr(textfiles, "BUFFER", size)
  comma, colon = separators
  dumped = [
    json.dumps(key) + colon + json.dumps(value, ensure_ascii=escaped, separators=separators)
    for key, value in content
  ]
  path = tmp_path / "a.json"
  path.write_bytes(f" {{\n{comma.join(dumped)} }}\n".encode("utf-8", "surrogatepass"))
  try:
    want = json.loads(path.read_text("utf-8"))
  except UnicodeDecodeError:
    return
  assert repr(json_objects.read(path)) == repr(want)


@SHOWN
@given(data=st.data(), size=st.integers(1, 40))
@example(data=None, size=3)
def test_an_object_that_is_broken_is_told_as_json_tells_it(tmp_path, monkeypatch, data, size):
  """A good object with a piece cut out, put in or changed: the error of `read_json`, or none."""
  monkeypatch.setattr(textfiles, "BUFFER", size)
  text = '{"ä": [1, 2.5e3, "x\\u00e9"],\n "b": {"c": null}, "b": true,\n"d": "y"}\n'
  if data is not None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 4, len(text))))
    text = (
      text[:start] + data.draw(st.sampled_from(["", ",", "}", '"', "x", "[", " 1"])) + text[end:]
    )
  path = tmp_path / "a.json"
  path.write_text(text, "utf-8")
  errors = []
  for read in (textfiles.read_json, json_objects.read):
    try:
      errors.append(("", repr(read(path))))
    except ValueError as error:
      errors.append((str(error), ""))
  if "not an object" not in errors[1][0]:
    assert errors[0] == errors[1]


@SHOWN
@given(
  content=st.lists(JSON, max_size=5) | st.dictionaries(st.text(max_size=5), JSON, max_size=5),
  separators=st.sampled_from([(",", ":"), (" ,\n\t", " : "), (",\r\n", ":\n")]),
  escaped=st.booleans(),
  size=st.integers(1, 40),
)
def test_elements_of_arrays_read_in_pieces_are_jsons(
  tmp_path, monkeypatch, content, separators, escaped, size
):
  monkeypatch.setattr(textfiles, "BUFFER", size)
  path = tmp_path / "a.json"
  text = json.dumps(content, ensure_ascii=escaped, separators=separators)
  path.write_bytes(f" {text}\n".encode("utf-8", "surrogatepass"))
  try:
    whole = json.loads(path.read_text("utf-8"))
  except UnicodeDecodeError:
    return
  arrays = {"": whole} if isinstance(whole, list) else whole
  want = [(key, e) for key, array in arrays.items() if isinstance(array, list) for e in array]
  assert repr([tuple(element) for element in jsonfiles.iterate_elements(path)]) == repr(want)


@SHOWN
@given(data=st.data(), size=st.integers(1, 40))
@example(data=None, size=3)
def test_broken_arrays_are_told_with_the_files_name(tmp_path, monkeypatch, data, size):
  monkeypatch.setattr(textfiles, "BUFFER", size)
  text = '{"ä": [1, 2.5e3, {"x\\u00e9": [1]}],\n "b": {"c": null}, "b": [true],\n"d": "y"}\n'
  if data is not None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 4, len(text))))
    put = data.draw(st.sampled_from(["", ",", "}", "]", '"', "x", "[", " 1"]))
    text = text[:start] + put + text[end:]
  path = tmp_path / "a.json"
  path.write_text(text, "utf-8")
  try:
    whole, error = json.loads(text), None
  except ValueError as raised:
    error = raised
  if error is None and isinstance(whole, (dict, list)):
    list(jsonfiles.iterate_elements(path))
    return
  with pytest.raises(ValueError, match=rf"^{path} .*\.$") as raised:
    list(jsonfiles.iterate_elements(path))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ['{"a": 1, "b": %s}', '{"a": %s', "[1, %s]", "[%s"])
@pytest.mark.parametrize("read", [jsonfiles.iterate_object, jsonfiles.iterate_array])
def test_a_number_of_thousands_of_digits_is_told_with_the_files_name(tmp_path, text, read):
  path = tmp_path / "a.json"
  path.write_text(text % ("9" * 5000))
  with pytest.raises(ValueError, match=rf"^{path} [^\n]*$"):
    list(read(path))


def test_elements_behind_a_damaged_one_are_not_read_and_memory_stays_flat(tmp_path, monkeypatch):
  """The element is told at once: a file of gigabytes is not taken into memory for it."""
  monkeypatch.setattr(textfiles, "BUFFER", 1000)
  read = []
  opened = textfiles.open_binary

  def counting(*args):
    file = opened(*args)
    whole = file.read
    file = type("Counted", (), {"__enter__": lambda s: s, "__exit__": lambda s, *e: None})()
    file.read = lambda size: read.append(size) or whole(size)
    return file

  monkeypatch.setattr(textfiles, "open_binary", counting)
  path = tmp_path / "a.json"
  path.write_text('{"images": [{"id": 1}, {"id": nope}' + ', {"id": 2}' * 100_000 + "]}")
  elements = jsonfiles.iterate_elements(path)
  assert next(elements) == ("images", {"id": 1})
  with pytest.raises(ValueError, match="Expecting value: line 1 column 31"):
    next(elements)
  assert sum(read) < 10_000


@SHOWN
@given(content=st.lists(JSON, max_size=6), escaped=st.booleans(), size=st.integers(3, 40))
def test_an_array_read_in_pieces_is_jsons(tmp_path, monkeypatch, content, escaped, size):
  monkeypatch.setattr(textfiles, "BUFFER", size)
  path = tmp_path / "a.json"
  text = " ,\n".join(json.dumps(value, ensure_ascii=escaped) for value in content)
  path.write_bytes(f"\ufeff [{text} ]\n".encode("utf-8", "surrogatepass"))
  try:
    want = json.loads(path.read_text("utf-8-sig"))
  except UnicodeDecodeError:
    return
  data = path.read_bytes()
  items = list(jsonfiles.iterate_array(path))
  found = [json.loads(data[item.offset : item.offset + item.length]) for item in items]
  assert repr(found) == repr(want)


@SHOWN
@given(data=st.data(), size=st.integers(1, 40))
def test_an_array_that_is_broken_is_told_as_json_tells_it(tmp_path, monkeypatch, data, size):
  monkeypatch.setattr(textfiles, "BUFFER", size)
  text = '[{"ä": 1}, 2.5e3, "x\\u00e9",\n [true, null]]\n'
  start = data.draw(st.integers(0, len(text)))
  end = data.draw(st.integers(start, min(start + 4, len(text))))
  text = text[:start] + data.draw(st.sampled_from(["", ",", "]", '"', "x", "[", " 1"])) + text[end:]
  path = tmp_path / "a.json"
  path.write_text(text)
  told = []
  for read in (textfiles.read_json, lambda path: list(jsonfiles.iterate_array(path))):
    try:
      read(path)
      told.append("")
    except ValueError as error:
      told.append(str(error))
  if "not an array" not in told[1]:
    assert told[1] == told[0]
