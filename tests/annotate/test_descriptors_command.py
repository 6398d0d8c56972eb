"""Class descriptors from a language model: of a server of OpenAI's protocol, and in-process."""

import json
import pathlib

import chat_server
import pytest
import tiny_language
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from grain_jax import failures
from grain_jax.annotate import descriptors, language_models
from grain_jax.evals import zero_shot

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "descriptors"
KEY = "sk-never-shown"


def parsed(text, name="hen", *, most=10, is_cut=False):
  return descriptors.parse(language_models.Reply(text, is_cut), name, most=most)


@pytest.mark.parametrize(
  "text, kept, losses",
  [
    ("- two legs\n- a red comb", ["two legs", "a red comb"], []),
    ("There are several:\n\n1. **two legs**.\n2) a beak,\n(3) wings",
     ["two legs", "a beak", "wings"], []),
    ("* two legs\n• Two  legs\n* -", ["two legs"], ["duplicate", "empty_or_cut"]),
    ('["two legs", "a beak"]', ["two legs", "a beak"], []),
    ('```json\n["two legs"]\n```', ["two legs"], []),
    ("- a hen\n- henna\n- like a Hen's\n- feathers", ["henna", "feathers"],
     ["names_the_class"] * 2),
    ("- two legs\n- " + "x" * 101, ["two legs"], ["too_long"]),
    ("I'm sorry, I can’t help with that.", [], ["refusal"]),
    ("- I cannot see it\n- two legs", ["two legs"], ["refusal"]),
    ("A hen has two legs and a beak.", [], ["no_list"]),
    ("", [], ["no_list"]),
    ('{"a": 1}', [], ["no_list"]),
    ("[1, 2]", [], ["no_list"]),
    ("-5 degrees\n", [], ["no_list"]),
  ],
)  # fmt: skip
def test_replies_are_read_strictly(text, kept, losses):
  assert parsed(text) == (kept, losses)


def test_a_reply_is_cut_at_its_end_and_at_the_most():
  assert parsed("- a\n- b\n- c d", is_cut=True) == (["a", "b"], ["empty_or_cut"])
  assert parsed("- a\n- b\n- c", most=2) == (["a", "b"], ["too_many"])


@given(st.text(), st.text(min_size=1), st.booleans())
def test_any_reply_gives_descriptors_or_a_reason(text, name, is_cut):
  found = parsed(text, name, is_cut=is_cut)
  assert found.descriptors or found.losses
  assert all(d.strip() and len(d) <= 100 for d in found.descriptors)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setattr(language_models, "_BASE", 0.001)


def run(tmp_path, server, names, *more):
  (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
  return descriptors.main(
    [f"--classes={tmp_path}/classes.txt", f"--out={tmp_path}/d.json", f"--server={server.url}",
     "--model=tiny", "--api_key_env=OPENAI_API_KEY", *more]
  )  # fmt: skip


def test_what_evaluation_reads_is_written(tmp_path, capsys):
  answers = {"hen": ["- two legs\n- a beak"], "sea_lion": ["- flippers"], "sea lion": ["- fins"]}
  with chat_server.serve(chat_server.Told(answers)) as server:
    assert run(tmp_path, server, ["hen", "sea_lion"]) == 0
  out = tmp_path / "d.json"
  classes = ["hen", "sea_lion"]
  assert zero_shot.load_descriptors(out, classes) == {
    "hen": ["two legs", "a beak"], "sea_lion": ["fins"],
  }  # fmt: skip
  if REAL.is_dir():  # of the same make as a published one
    real = json.loads((REAL / "food101.json").read_text())
    assert type(real) is dict and {type(v) for v in real.values()} == {list}
  assert out.read_text().startswith('{\n    "hen": [\n        "two legs",')
  assert server.keys == {f"Bearer {KEY}"}
  body = server.bodies[0]
  assert body["model"] == "tiny" and body["temperature"] == 0 and "10" in json.dumps(body)
  told = capsys.readouterr().out
  assert "descriptors                     3" in told and "completion_tokens               6" in told
  assert KEY not in told + "".join(p.read_text() for p in tmp_path.iterdir())


def test_classes_that_are_there_are_not_asked_again(tmp_path, capsys):
  """One that failed is, by the same command; nothing is written before all are there."""
  answers = {"hen": ["- two legs"], "owl": ["no list", "- round eyes"], "cow": ["- horns"]}
  with chat_server.serve(chat_server.Told(answers)) as server:
    assert run(tmp_path, server, ["hen", "owl"]) == 2
    told = capsys.readouterr().err
    assert "1 of 2 classes have no descriptors (no_list 1), 'owl' first" in told
    assert told.count("\n") == 1 and not (tmp_path / "d.json").exists()
    replies = tmp_path / "d.replies.jsonl"
    with replies.open("a") as file:
      file.write('{"class": "co')  # it was killed there
    assert run(tmp_path, server, ["hen", "owl"]) == 0
    assert server.asked == {"hen": 1, "owl": 2}
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    told = [line["reply"] for line in lines if line.get("class") == "owl"]
    assert told == ["no list", "- round eyes"]
    replies.unlink()  # what was written is enough
    assert run(tmp_path, server, ["cow", "hen"]) == 0
    assert server.asked == {"hen": 1, "owl": 2, "cow": 1}
    found = json.loads((tmp_path / "d.json").read_text())
    assert found == {"hen": ["two legs"], "owl": ["round eyes"], "cow": ["horns"]}
    assert run(tmp_path, server, ["cow", "pig"], "--max_descriptors=3") == 2
    assert "replies to another prompt or of another model" in capsys.readouterr().err


def test_texts_of_another_prompt_are_no_answer(tmp_path, capsys):
  """Whichever of the files is removed: what is left is told, until all of it is gone."""
  (tmp_path / "other.txt").write_text("What has a {class} in a photo?")
  out, replies, other = tmp_path / "d.json", tmp_path / "d.replies.jsonl", tmp_path / "other.txt"
  with chat_server.serve(chat_server.Told({"hen": ["- two legs", "- a beak"]})) as server:

    def ask(*more):
      code, told = run(tmp_path, server, ["hen"], *more), capsys.readouterr()
      assert code == 0 or (code == 2 and told.err.count("\n") == 1)
      return code, told.err

    assert ask() == (0, "")
    first = out.read_text()
    for left in ([out, replies], [out], [replies]):
      held = {file: file.read_bytes() for file in {out, replies} - set(left)}
      for file in held:
        file.unlink()
      code, told = ask(f"--prompt={other}")
      assert code == 2 and f"{' and '.join(map(str, left))}: these are replies to another" in told
      assert [file for file in (out, replies) if file.exists()] == left
      for file, data in held.items():
        file.write_bytes(data)
    assert server.asked == {"hen": 1} and out.read_text() == first
    assert ask() == (0, "")  # those of the first still do
    out.unlink()
    replies.unlink()
    assert ask(f"--prompt={other}") == (0, "")
    assert server.asked == {"hen": 2} and json.loads(out.read_text()) == {"hen": ["a beak"]}
    assert ask()[0] == 2


def test_a_file_without_replies_is_of_no_prompt(tmp_path, capsys):
  with chat_server.serve(chat_server.Told({"hen": ["- two legs"]})) as server:
    assert run(tmp_path, server, ["hen"], "--model=other") == 2
    assert "has tiny. Name one of them" in capsys.readouterr().err
    assert run(tmp_path, server, ["hen"]) == 0
    (tmp_path / "d.json").unlink()
    (tmp_path / "d.replies.jsonl").write_text("5\n")  # somebody else's
    assert run(tmp_path, server, ["hen"]) == 2
  assert (tmp_path / "d.replies.jsonl").read_text() == "5\n"


def test_texts_of_an_unknown_prompt_are_taken_and_told(tmp_path, capsys):
  """As published ones are, or those of older versions, beside which no settings stand."""
  (tmp_path / "d.json").write_text('{"hen": ["two legs"], "pig": []}')
  line = "1 of 2 classes are there; {}/d.json is taken, of whatever prompt and model it may be\n"
  with chat_server.serve(chat_server.Told({"owl": ["- eyes"]})) as server:
    assert run(tmp_path, server, ["hen", "owl"]) == 0
    assert line.format(tmp_path) in capsys.readouterr().out
    assert run(tmp_path, server, ["hen", "owl"]) == 0  # of more than one prompt, perhaps
    assert "is taken, of whatever" in capsys.readouterr().out and server.asked == {"owl": 1}
  found = json.loads((tmp_path / "d.json").read_text())
  assert found == {"hen": ["two legs"], "pig": [], "owl": ["eyes"]}


def test_files_in_the_users_folder(tmp_path, monkeypatch):
  (tmp_path / "p.txt").write_text("What has a {class} in a photo?")
  monkeypatch.setenv("HOME", str(tmp_path))
  with chat_server.serve(chat_server.Told({"hen": ["- two legs"]})) as server:
    more = ("--classes=~/classes.txt", "--out=~/e.json", "--prompt=~/p.txt")
    assert run(tmp_path, server, ["hen"], *more) == 0
  assert json.loads((tmp_path / "e.json").read_text()) == {"hen": ["two legs"]}


def test_allowed_failures_are_classes_by_name_alone(tmp_path):
  with chat_server.serve(chat_server.Told({"hen": ["- two legs"], "owl": ["nothing"]})) as server:
    assert run(tmp_path, server, ["hen", "owl"], "--allow_failed") == 0
  said = []
  found = zero_shot.load_descriptors(tmp_path / "d.json", ["hen", "owl"], warn=said.append)
  assert found == {"hen": ["two legs"], "owl": []} and "1 of 2 classes by name alone" in said[0]


def test_a_server_in_trouble_is_asked_again(tmp_path, capsys):
  answers = {"hen": [429, 500, b"garbage", b'{"choices": []}', "- two legs"], "owl": [b"garbage"]}
  with chat_server.serve(chat_server.Told(answers)) as server:
    assert run(tmp_path, server, ["hen", "owl"]) == 2
    assert "no_reply 1), 'owl'" in capsys.readouterr().err
    assert server.asked == {"hen": 5, "owl": 5}
  with chat_server.serve(chat_server.Told({"hen": [503], "owl": ["- eyes"]})) as server:
    (tmp_path / "d.replies.jsonl").unlink()
    assert run(tmp_path, server, ["owl", "hen"]) == failures.EXIT_RESTART
    told = capsys.readouterr().err
    assert "gave no answer in 5 tries (server_error). The same command goes on." in told
    assert KEY not in told
  with chat_server.serve(chat_server.Told({"hen": ["- two legs"], "owl": ["- eyes"]})) as server:
    assert run(tmp_path, server, ["hen", "owl"]) == 0
    assert server.asked == {"hen": 1}  # the owl's came, though the hen's did not


def test_after_a_failure_no_further_class_is_asked(tmp_path):
  names = ["hen", *(f"bird{n}" for n in range(30))]
  with chat_server.serve(
    chat_server.Told({"hen": [500], **{name: ["- wings"] for name in names[1:]}})
  ) as server:
    assert run(tmp_path, server, names, "--concurrency=1") == failures.EXIT_RESTART
    assert server.asked == {"hen": 5}


@pytest.mark.parametrize(
  "changes, match",
  [
    (["--server=ftp://x"], "not an address of the form http://HOST:PORT/v1"),
    (["--server=http://a:b@x"], "has a name or a password in it"),
    (["--server="], "--server is not given"),
    (["--server=http://127.0.0.1:9"], "does not answer"),
    ([f"--api_key_env={KEY}"], "not the name of an environment variable"),
    (["--model=other"], "has tiny. Name one of them"),
    (["--prompt=PROMPT"], "lacks {class}"),
    (["--max_tokens=0"], "must be more than 0"),
    (["--classes=/nowhere"], "No such file"),
    (["--classes=TWICE"], "names 'a' twice"),
    (["--classes=EMPTY"], "names no class"),
    (["--out=/nowhere/x.json"], "there is no folder"),
    (["--out=FOLDER"], "FOLDER is a folder. Name a file in it"),
    (["--out=NUMBER"], "NUMBER is there and holds 'hen': 5, which is no {class: [descriptor"),
    (["--out=TEXT"], "holds 'hen': 'feathers', which is no {class: [descriptor, ...]}"),
    (["--out=MIXED"], "holds 'owl': ['eyes', 3], which is no"),
    (["--out=LIST"], "holds a list, which is no {class: [descriptor, ...]}. Move it away"),
    (["--out=EMPTY"], "EMPTY is not JSON"),
    (["--backend=transformers", "--model=/nowhere"], "has no config.json"),
  ],
)
def test_what_is_wrong_is_told_before_anything_is_spent(tmp_path, capsys, changes, match):
  texts = {
    "PROMPT": "describe it", "TWICE": "a\na\n", "EMPTY": "\n", "NUMBER": '{"hen": 5}',
    "TEXT": '{"hen": "feathers"}', "MIXED": '{"hen": ["two legs"], "owl": ["eyes", 3]}',
    "LIST": '["hen"]',
  }  # fmt: skip
  (tmp_path / "FOLDER").mkdir()
  for name in (*texts, "FOLDER"):
    if name in texts:
      (tmp_path / name).write_text(texts[name])
    changes = [change.replace(name, str(tmp_path / name)) for change in changes]
  with chat_server.serve(chat_server.Told({"hen": ["- two legs"]})) as server:
    assert run(tmp_path, server, ["hen"], *changes) == 2
    told = capsys.readouterr().err
    assert match in told and told.count("\n") == 1 and not server.asked and KEY not in told


def test_a_class_that_a_filter_refuses_fails_alone(tmp_path, capsys):
  def answer(body, number):
    refused = "a gun in a photo" in chat_server.prompt(body)
    return chat_server.Reply(400, b"content_filter") if refused else "- legs"

  with chat_server.serve(answer) as server:
    assert run(tmp_path, server, ["gun", "hen"], "--concurrency=1") == 2
    assert "(request_refused 1), 'gun' first" in capsys.readouterr().err
    assert run(tmp_path, server, ["gun", "hen"], "--allow_failed") == 0  # it is the only one left
  assert json.loads((tmp_path / "d.json").read_text()) == {"gun": [], "hen": ["legs"]}


def test_a_key_that_is_refused_ends_it_at_once(tmp_path, capsys):
  with chat_server.serve(chat_server.Told({"hen": [401]})) as server:
    assert run(tmp_path, server, ["hen"]) == 2
    assert server.asked == {"hen": 1}
  told = capsys.readouterr().err
  assert "refuses the key (401)" in told and KEY not in told


def test_a_model_in_this_process_says_what_transformers_says(tmp_path, capsys):
  """A random Llama: its words are no list, which is counted."""
  words = {"<s>": 0, "</s>": 1, "<unk>": 2}
  for word, *_ in tiny_language.words():
    words.setdefault(word, len(words))
  plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
  )
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
  )  # fmt: skip
  folder = tmp_path / "model"
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  own = language_models.TransformersChat(str(folder), max_tokens=12)
  pipeline = transformers.pipeline("text-generation", model=str(folder), tokenizer=str(folder))
  prompt = "a photo of a red dog"
  want = pipeline(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)
  reply = own.ask(prompt)
  assert reply.text.strip() == want[0]["generated_text"].strip() and reply.text.strip()
  assert reply.is_cut and own.totals() == {
    "requests": 1, "prompt_tokens": 6, "completion_tokens": 12,
  }  # fmt: skip
  (tmp_path / "classes.json").write_text('["dog", "cat"]')
  flags = [f"--classes={tmp_path}/classes.json", f"--out={tmp_path}/d.json", f"--model={folder}"]
  flags += ["--backend=transformers", "--max_tokens=8"]
  assert descriptors.main(flags) == 2
  assert "2 of 2 classes have no descriptors (no_list 2)" in capsys.readouterr().err
