"""Descriptions by a server that speaks the OpenAI protocol: a real one, on this machine."""

import base64
import collections
import json
import threading
import time

import chat_server
import numpy as np
import pytest
import toy_data
from describing import item, settings

from grain_jax import failures
from grain_jax.annotate import chat, describe

KEY = "sk-test-0123456789abcdef"


def annotate_one(server, found=None, **changes):
  stage = describe.make(settings(server, **changes))
  return stage.annotate([found or item()])[0], stage.totals()


def test_two_stages_a_caption_and_what_was_sent():
  with chat_server.serve(chat_server.sensible) as server:
    result, totals = annotate_one(server)
  assert result.line == {
    "captions": ["A brown dog sleeps on a green sofa."],
    "descriptions": ["a brown dog", "a green sofa"],
  }
  assert result.losses == [] and [r["prompt"] for r in result.raw] == [
    "subjects", "caption", "features",
  ]  # fmt: skip
  assert result.raw[0] == {"prompt": "subjects", "reply": "1. a dog\n2. a sofa", "attempts": 1}
  assert totals == {"requests": 3, "tokens_in": 3000, "tokens_out": 60, "cost": 0.0}
  assert set(server.paths) == {"/v1/chat/completions"}
  for body in server.bodies:
    image, text = body["messages"][0]["content"]  # the picture first
    assert image["type"] == "image_url" and text["type"] == "text"
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data) == item().image
    assert body["temperature"] == 0 and body["max_tokens"] == 512 and body["model"] == "m"
  asked = {chat_server.asked(body): body for body in server.bodies}
  assert '"a dog on a sofa"' in chat_server.prompt(asked["subjects"])
  assert "- a dog\n- a sofa\n" in chat_server.prompt(asked["features"])
  assert asked["features"]["response_format"]["json_schema"]["schema"]["required"] == ["list"]
  assert "response_format" not in asked["caption"]


def test_one_stage_and_no_caption_is_one_request():
  with chat_server.serve(chat_server.sensible) as server:
    result, totals = annotate_one(server, stages=1, no_caption=True)
  assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
  assert totals["requests"] == 1


def test_cost_of_tokens():
  with chat_server.serve(chat_server.sensible) as server:
    _, totals = annotate_one(server, price_in=2.0, price_out=50.0)
  assert totals["cost"] == pytest.approx(3000 * 2e-6 + 60 * 50e-6)


BAD = {  # what happens -> the reason that is counted
  "rate_limited": chat_server.Reply(429, b"slow down"),
  "server_error": chat_server.Reply(500, b"<html>oops</html>"),
  "garbage": chat_server.Reply(body=b"<html>hello</html>"),
  "garbage_json": chat_server.Reply(body=b'{"choices": []}'),
  "garbage_number": chat_server.Reply(text=7),
  "garbage_half_json": chat_server.Reply(body=b'{"choices": [{"mess'),
  "cut_reply": chat_server.Reply(close_after=30),
  "cut_reply_nothing": chat_server.Reply(close_after=0),
  "empty_reply": chat_server.Reply(text=""),
  "empty_reply_none": chat_server.Reply(text=None),
  "refusal": chat_server.Reply(text="I'm sorry, I can't help with that."),
  "refusal_field": chat_server.Reply(text=None, more={"refusal": "no"}),
  "content_filter": chat_server.Reply(text="", finish="content_filter"),
  "timeout": chat_server.Reply(wait=0.6),
  "too_long": chat_server.Reply(text="x" * 10_000),
  "other_script": chat_server.Reply(text="一只棕色的狗"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("times", [2, 3])
def test_what_goes_wrong_is_tried_again_then_counted_and_skipped(kind, times):
  """With two retries: after two failures the picture is there, after three it is skipped."""
  left = collections.Counter(subjects=times)
  reason = next(why for why in sorted(BAD, key=len) if kind.startswith(why))

  def answer(body, number):
    what = chat_server.asked(body)
    left[what] -= 1
    return BAD[kind] if left[what] >= 0 else chat_server.sensible(body, number)

  slow = {"timeout": 0.3} if kind == "timeout" else {}
  with chat_server.serve(answer) as server:
    result, totals = annotate_one(server, retries=2, no_caption=True, **slow)
  assert totals["retries"] == 2
  if times == 2:
    assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
    assert result.losses == [] and result.raw[0]["attempts"] == 3 and len(server.bodies) == 4
  else:
    assert result.line is None and result.losses == [("pictures", reason)]
    assert result.raw[0]["failed"] == reason and len(server.bodies) == 3


def test_a_refused_request_is_not_sent_again_and_costs_its_picture_alone():
  def answer(body, number):
    bad = chat_server.picture(body).endswith(base64.b64encode(item("b").image).decode())
    return chat_server.Reply(413, b"too large") if bad else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, no_caption=True))
    results = stage.annotate([item("a"), item("b"), item("c")])
  assert [result.line is None for result in results] == [False, True, False]
  assert results[1].losses == [("pictures", "request_refused")] and len(server.bodies) == 5


def test_a_caption_that_fails_is_lost_alone():
  def answer(body, number):
    failed = chat_server.asked(body) == "caption"
    return chat_server.Reply(503) if failed else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, retries=1)
  assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
  assert result.losses == [("captions", "server_error")]


def test_lines_that_are_dropped_are_counted():
  def answer(body, number):
    many = "\n".join(["a dog", "A dog", "x" * 200, *(f"thing {i}" for i in range(12))])
    return many if chat_server.asked(body) == "features" else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, item(captions=["A brown dog sleeps on a green sofa."]))
  assert result.line == {"descriptions": ["a dog", *(f"thing {i}" for i in range(9))]}
  assert collections.Counter(result.losses) == {
    ("captions", "duplicate"): 1,
    ("descriptions", "duplicate"): 1,
    ("descriptions", "too_long"): 1,
    ("descriptions", "too_many"): 3,
  }


def test_the_last_line_of_a_reply_that_ended_at_max_tokens_is_half_of_one():
  def answer(body, number):
    cut = chat_server.Reply(text="- a brown dog\n- a green so", finish="length")
    return cut if chat_server.asked(body) == "features" else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, no_caption=True)
  assert result.line == {"descriptions": ["a brown dog"]}
  assert result.losses == [("descriptions", "cut_off")]


@pytest.mark.parametrize("what", ("features", "region"))
def test_a_reply_of_nothing_but_half_a_line_is_none(what):
  region = {"description": "a dog", "box": (0.0, 0.0, 1.0, 1.0), "score": 0.5, "negatives": []}

  def answer(body, number):
    cut = chat_server.Reply(text="A brown dog with a", finish="length")
    return cut if chat_server.asked(body) == what else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    changes = {"region_captions": what == "region", "no_caption": True}
    result, _ = annotate_one(server, item(regions=[region]), **changes)
  assert result.line is None
  lost = "long_descriptions" if what == "region" else "descriptions"
  assert result.losses == [(lost, "cut_off"), ("pictures", "cut_off")]


def test_it_waits_as_long_as_the_server_asks_and_longer_each_time():
  replies = [
    chat_server.Reply(429, headers={"Retry-After": "1"}), chat_server.Reply(503),
    chat_server.Reply(502),
  ]  # fmt: skip

  def answer(body, number):
    return replies[number] if number < 3 else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, stages=1, no_caption=True, backoff=0.1)
  waits = np.diff(server.times)
  assert result.line and waits[0] >= 1.0 and waits[1] >= 0.2 and waits[2] >= 0.4


def test_retry_after_as_a_date():
  from email import utils

  for seconds in (50, -50):
    date = utils.formatdate(time.time() + seconds, usegmt=True)
    assert chat._wait({"retry-after": date}) == pytest.approx(max(seconds, 0), abs=2)
  assert chat._wait({"retry-after": "soon"}) is None and chat._wait({}) is None


@pytest.mark.parametrize("concurrency", [1, 6])
def test_as_many_requests_at_a_time_as_asked_for(concurrency):
  together = threading.Barrier(concurrency)  # as many as asked for are at the server at once

  def answer(body, number):
    if number < concurrency:
      together.wait(timeout=60)
    return chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, concurrency=concurrency))
    found = stage.annotate([item(f"{i}.jpg") for i in range(12)])
  assert all(result.line for result in found)
  assert server.most == concurrency and len(server.bodies) == 36


def test_a_server_without_a_schema_or_with_other_parameters_is_asked_without():
  def answer(body, number):
    if "max_tokens" in body:
      return chat_server.Reply(400, b"Unsupported parameter, use 'max_completion_tokens'")
    if "temperature" in body:
      return chat_server.Reply(400, b"'temperature' does not support 0")
    if "response_format" in body:
      return chat_server.Reply(400, b"unknown field response_format")
    return chat_server.sensible(body, number)

  said = []
  with chat_server.serve(answer) as server:
    found = settings(server, sample=0)
    describe.check(found, toy_data.source([]), say=said.append)
  assert len(said) == 1 and said[0].endswith("takes no JSON schema: lines of text are asked for.")
  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, concurrency=1))
    assert stage.annotate([item()])[0].line["descriptions"] == ["a brown dog", "a green sofa"]
    before = len(server.bodies)
    assert stage.annotate([item("b")])[0].line and len(server.bodies) == before + 3


def test_a_key_that_is_refused_ends_it():
  def answer(body, number):
    return chat_server.Reply(401, json.dumps({"error": f"bad key {KEY[:8]}"}).encode())

  with chat_server.serve(answer) as server:
    with pytest.raises(ValueError, match=r"refuses the key \(401\)\. Put a valid") as error:
      annotate_one(server)
    assert "sk-" not in str(error.value)


def test_a_server_that_is_gone_is_for_another_start():
  with chat_server.serve(chat_server.sensible) as server:
    found = settings(server, retries=1)
  with pytest.raises(failures.TransientError, match="does not answer any more. Start it; the same"):
    describe.make(found).annotate([item()])


def test_long_descriptions_of_boxes():
  region = {"description": "a dog", "box": (0.25, 0.5, 0.75, 1.0), "score": 0.5,
            "negatives": ["a cat", "a cow"]}  # fmt: skip
  other = {**region, "description": "a sofa", "box": (0.0, 0.0, 0.5, 0.5), "negatives": []}

  def answer(body, number):
    bad = '"a sofa"' in chat_server.prompt(body)
    return chat_server.Reply(500) if bad else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, region_captions=True, retries=0))
    result, without = stage.annotate([item(regions=[region, other]), item()])
  long = "A brown dog with a white paw, asleep on a green sofa."
  assert result.line == {
    "regions": [
      {"description": long, "of": "a dog", "box": [0.25, 0.5, 0.75, 1.0], "score": 0.5,
       "negatives": []},
      {**other, "box": [0.0, 0.0, 0.5, 0.5]},
    ]
  }  # fmt: skip
  assert sorted(result.losses) == [
    ("long_descriptions", "server_error"),
    *[("region_negatives", "description_replaced")] * 2,
  ]
  assert without.line == {} and len(server.bodies) == 2
