"""What a model's reply says: hand-worked replies, and properties that hold of any text."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from grain_jax.annotate import replies

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=400)  # halves of characters too
WORDS = st.lists(
  st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8), min_size=2, max_size=6
)
DESCRIPTIONS = st.lists(WORDS.map(" ".join), min_size=1, max_size=10, unique=True).filter(
  lambda texts: not any(text.startswith(("i ", "no ", "as ")) for text in texts)
)


@pytest.mark.parametrize(
  ("text", "kept", "dropped"),
  [
    ("1. a red dog\n2) a cat\n(3) a cow", ["a red dog", "a cat", "a cow"], []),
    ("- a dog\n* a cat\n• a cow\n– a hen", ["a dog", "a cat", "a cow", "a hen"], []),
    ("**a dog** with `spots`.\n\n\n\"a cat\",", ["a dog with spots", "a cat"], []),
    ("Here are ten of them:\n1. a dog", ["a dog"], ["heading"]),
    ("a dog\nA DOG\n2. a dog.", ["a dog"], ["duplicate", "duplicate"]),
    ("A Dog\na dog", ["A Dog"], ["duplicate"]),
    ('["a dog", "a cat"]', ["a dog", "a cat"], []),
    ('```json\n{"list": ["a dog", 3, ""]}\n```', ["a dog"], ["not_text", "empty"]),
    ('{"dog": ["brown fur"], "cat": {"tail": "a long tail"}}', ["brown fur", "a long tail"], []),
    ('{"list": ["a dog", "a cat with a lo', ["a dog"], ["cut_off"]),
    ('["a \\"stop\\" sign", "a d', ['a "stop" sign'], ["cut_off"]),
    ("I'm sorry, but I cannot help with that.", [], ["refusal"]),
    ("a dog\nI can’t see more.", ["a dog"], ["refusal"]),
    ("a sorry dog\nan unable man", ["a sorry dog", "an unable man"], []),
    ("a 3.5 litre bottle\n3.5 litres of milk", ["a 3.5 litre bottle", "3.5 litres of milk"], []),
    ("a dog\n" + "very " * 30 + "long", ["a dog"], ["too_long"]),
    ("x" * 41 + " dog\n" + "x" * 40 + " dog", ["x" * 40 + " dog"], ["too_long"]),
    ("word " * 20 + "\n" + "words " * 21 + "\n" + "wordsword " * 13, ["word " * 19 + "word"],
     ["too_long"] * 2),
    ("a dog\n---\n***", ["a dog"], ["empty", "empty"]),
    ("<think>a cat? no\n</think>a dog", ["a dog"], []),
    ("A dog? Let me see.\n</think>\n\na dog", ["a dog"], []),
    ("Sure! Here are the subjects\na dog\nHope this helps!", ["a dog"], ["heading"] * 2),
    ("**Main subjects**\n- a dog", ["a dog"], ["heading"]),
    ("['a brown dog', 'a man\\'s hat', \"a cat's tail\"]",
     ["a brown dog", "a man's hat", "a cat's tail"], []),
    ("[\"a man's hat\", 'a dog']", ["a man's hat", "a dog"], []),
    ("{'list': ['a dog', 'a man's h", ["a dog"], ["cut_off"]),
    ("A. a dog\nB. a cat", ["a dog", "a cat"], []),
    ("T. rex skeleton\nA. Lincoln statue", ["T. rex skeleton", "A. Lincoln statue"], []),
    ("a dog\n" * 9000, ["a dog"], ["duplicate"] * 8332 + ["cut_off"]),
    ("一只棕色的狗\na dog\nсобака", ["a dog"], ["other_script", "other_script"]),
    ("ein Bär in der Höhle", ["ein Bär in der Höhle"], []),
    ("\n".join(f"{i}. thing {i}" for i in range(1, 15)), [f"thing {i}" for i in range(1, 11)],
     ["too_many"] * 4),
    ('["\\ud800 dog"]', ["? dog"], []),
    ("[" * 20_000, [], ["empty"]),
    ("", [], []),
  ],
)  # fmt: skip
def test_lines_of_a_reply(text, kept, dropped):
  assert replies.lines(text) == (kept, dropped)


def test_a_single_line_of_subjects_is_a_list():
  assert replies.lines("dog, a cat, sofa.", commas=True).kept == ["dog", "a cat", "sofa"]
  assert replies.lines("a cat, asleep").kept == ["a cat, asleep"]
  assert replies.lines("собака", any_script=True).kept == ["собака"]


@pytest.mark.parametrize(
  ("text", "kept", "dropped"),
  [
    ("a dog\na ca", ["a dog"], ["cut_off"]),
    ("a brown dog with a", [], ["cut_off"]),
    ("a dog\na cat\n", ["a dog", "a cat"], []),
    ("a dog\na cat\na dog", ["a dog", "a cat"], ["cut_off"]),
    ("\n".join(f"thing {i}" for i in range(12)) + "\na th", [f"thing {i}" for i in range(10)],
     ["too_many"] * 2 + ["cut_off"]),
    ('["a dog", "a cat",', ["a dog", "a cat"], []),
    ('["a dog", "a cat"]', ["a dog", "a cat"], []),
    ("```\na dog\na cat\n```", ["a dog", "a cat"], []),
  ],
)  # fmt: skip
def test_lines_of_a_reply_that_ended_at_the_most_tokens(text, kept, dropped):
  assert replies.lines(text, cut=True) == (kept, dropped)


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("", "empty_reply"), ("\n \n", "empty_reply"), ("Here:", "empty_reply"), ("[]", "empty_reply"),
    ("As an AI, I do not", "refusal"), ("x" * 10_000, "too_long"), ("狗", "other_script"),
    ("狗\n" + "x" * 200, "nothing_usable"), ("狗\na dog", None),
  ],
)  # fmt: skip
def test_why_a_reply_cannot_be_used(text, why):
  assert replies.failure_of_lines(replies.lines(text)) == why


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A dog sleeps on a sofa.", ("A dog sleeps on a sofa.", None)),
    ('Caption: "A dog sleeps."', ("A dog sleeps.", None)),
    ("Here is a caption:\n\n**A dog** sleeps.", ("A dog sleeps.", None)),
    ('{"caption": "A dog sleeps."}', ("A dog sleeps.", None)),
    ('```json\n["A dog sleeps."]\n```', ("A dog sleeps.", None)),
    ('The sign says "stop"', ('The sign says "stop"', None)),
    ("I cannot describe people.", (None, "refusal")),
    ("  ...  ", (None, "empty_reply")),
    ("x" * 10_000, (None, "too_long")),
    ("a dog and " * 20, (None, "repeats_itself")),
    ("собака спит", (None, "other_script")),
    ("The user wants a sentence.\n</think>\n\nA dog sleeps.", ("A dog sleeps.", None)),
    ("Sure, here you go!\n\nA dog sleeps.", ("A dog sleeps.", None)),
    ("Certainly! A dog sleeps.", ("A dog sleeps.", None)),
    ("Sure, here is a caption: A dog.", ("A dog.", None)),
    ("Here is a dog.", ("Here is a dog.", None)),
    ("Here is your caption.\nA dog.", ("A dog.", None)),
    ("**Description**\nA dog sleeps.", ("A dog sleeps.", None)),
    ("Sure, here you go!", (None, "empty_reply")),
    ("A dog lies on a sofa.\nIt sleeps.", ("A dog lies on a sofa. It sleeps.", None)),
    ("T. rex stands.", ("T. rex stands.", None)),
  ],
)
def test_a_sentence_of_a_reply(text, expected):
  assert replies.sentence(text) == (*expected, 0)


@pytest.mark.parametrize("text", ["A dog.\n\nIt shows a pet.", "1. A dog.\n2. A hound."])
def test_lines_beyond_a_sentence_are_counted(text):
  assert replies.sentence(text) == ("A dog.", None, 1)


@hypothesis.given(ANY_TEXT, st.booleans(), st.booleans())
@hypothesis.settings(max_examples=300, deadline=None)
def test_of_any_text_at_most_ten_different_short_lines(text, any_script, commas):
  found = replies.lines(text, any_script=any_script, commas=commas)
  assert len(found.kept) <= 10 == replies.MOST
  assert len({line.casefold() for line in found.kept}) == len(found.kept)
  for line in found.kept:
    assert line == " ".join(line.split()) and 0 < len(line) <= 120 and line.isprintable()
    line.encode("utf-8")
    again = replies.lines(json.dumps([line]), any_script=any_script)
    assert again == ([line], [])  # what was taken would be taken as it is
  caption, why, _ = replies.sentence(text, any_script=any_script)
  assert (caption is None) != (why is None)


@hypothesis.given(
  DESCRIPTIONS, st.sampled_from(["{}. {}", "{}) {}", "- {1}", "* {1}", "{1}.", '"{1}",'])
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_however_a_list_is_written_its_lines_come_back(texts, form):
  written = "\n".join(form.format(number, text) for number, text in enumerate(texts, start=1))
  assert replies.lines(written) == (texts, [])
  assert replies.lines("Here they are:\n\n" + written).kept == texts
  assert replies.lines(json.dumps({"list": texts})) == (texts, [])
  assert replies.lines(f"```json\n{json.dumps(texts, indent=1)}\n```") == (texts, [])


@hypothesis.given(DESCRIPTIONS, st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_lines_cut_anywhere_give_no_part_of_one(texts, data):
  whole = "\n".join(f"- {text}" for text in texts)
  cut = data.draw(st.integers(1, len(whole)))
  found = replies.lines(whole[:cut], cut=True)
  assert found.kept == texts[: len(found.kept)] and len(found.kept) >= whole[:cut].count("\n")


@hypothesis.given(
  st.lists(st.text("ab' \\\"", min_size=3, max_size=9).map("a{}b".format), min_size=1, max_size=8)
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_list_of_python_is_one_of_json(texts):
  assert replies.lines(repr(texts)) == replies.lines(json.dumps(texts))


@hypothesis.given(DESCRIPTIONS, st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_json_cut_anywhere_gives_its_whole_texts_and_no_part_of_one(texts, data):
  whole = json.dumps({"list": texts})
  cut = data.draw(st.integers(len('{"list": ["'), len(whole) - 1))
  found = replies.lines(whole[:cut])
  assert found.kept == texts[: len(found.kept)]
  assert set(found.dropped) <= {"cut_off"}
