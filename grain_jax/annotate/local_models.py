"""A model of `transformers` that sees and writes (LLaVA, Qwen-VL, ...), in this process."""

from __future__ import annotations

import collections
import importlib.util
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grain_jax import failures
from grain_jax.annotate import asking, stages

_LOCAL = {"local_files_only": True, "trust_remote_code": False}  # code of a folder is not run
_NO_TORCH = "--backend=transformers needs torch: pip install -r requirements-annotate.txt."
MODEL_ERROR, OUT_OF_MEMORY = "model_error", "out_of_memory"


def check_folder(folder: str) -> str:
  """The folder of a model, as an absolute path; one line where it is none."""
  path = pathlib.Path(folder).expanduser()
  if not (path / "config.json").is_file():
    raise ValueError(
      f"--model={folder} is no folder with a config.json. Download the model first (hf download "
      "NAME --local-dir FOLDER) and give the folder."
    )
  if not list(path.glob("*.safetensors")):
    raise ValueError(f"--model={folder} has no *.safetensors. Take weights of that format.")
  if importlib.util.find_spec("torch") is None:
    raise ValueError(_NO_TORCH)
  return str(path.resolve())


def _import():
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(_NO_TORCH) from error
  return torch, transformers


def load_processor(folder: str):
  """The processor of a model; without the part for films, which alone needs torchvision."""
  _, transformers = _import()
  from transformers.models.auto import processing_auto

  config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
  kind = processing_auto.PROCESSOR_MAPPING.get(type(config), None)
  if kind is None or "video_processor" not in kind.get_attributes():
    return transformers.AutoProcessor.from_pretrained(folder, **_LOCAL)

  class Still(kind):
    @classmethod
    def get_attributes(cls):
      return [name for name in kind.get_attributes() if name != "video_processor"]

  Still.__name__ = kind.__name__  # which transformers compares with what the folder says
  return Still.from_pretrained(folder, **_LOCAL)


class Local:
  """Asks a model, `batch_size` questions at a time, greedily."""

  def __init__(self, settings: Mapping[str, Any]):
    """`settings`: model (a folder), batch_size, max_tokens."""
    self.settings = settings
    self.spent = collections.Counter[str]()
    self._model: Any = None
    self._processor: Any = None
    self._answered = False

  def totals(self) -> dict[str, float]:
    """What was spent since it was last asked."""
    spent, self.spent = self.spent, collections.Counter()
    return dict(spent)

  def run(self, dialogues: Iterable[asking.Dialogue]) -> list[stages.Result]:
    """The results of dialogues, in their order.

    Raises ValueError: the model cannot be loaded, or fails at every one of them; one line.
    """
    return asking.rounds(dialogues, self.ask)

  def ask(self, requests: Sequence[asking.Request]) -> list[asking.Reply]:
    """A reply to each request."""
    if self._model is None:
      self._load()
    size, replies = self.settings["batch_size"], []
    for start in range(0, len(requests), size):
      replies += self._ask(requests[start : start + size])
    self._answered |= any(reply.why != MODEL_ERROR for reply in replies)
    if not self._answered and replies:
      raise ValueError(f"--model={self.settings['model']} fails at every picture: {replies[0].raw}")
    return replies

  def _load(self) -> None:
    torch, transformers = _import()
    folder = self.settings["model"]
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    try:
      self._processor = load_processor(folder)
      model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, **_LOCAL, use_safetensors=True, dtype="auto" if cuda else torch.float32
      )
    except Exception as error:  # of the file, the class, the weights: each library has its own
      raise ValueError(
        f"--model={folder} cannot be loaded as a model of pictures and texts: "
        f"{failures.one_line(error, limit=300)}"
      ) from error
    if not getattr(self._processor, "image_processor", None) or not self._template():
      raise ValueError(
        f"--model={folder} has no image processor or no chat template. Take an instruction-tuned "
        "model that sees (LLaVA, Qwen-VL), with all of its files."
      )
    self._processor.tokenizer.padding_side = "left"
    if self._processor.tokenizer.pad_token is None:
      self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
    self._model = model.to("cuda" if cuda else "cpu").eval()

  def _template(self) -> Any:
    own = getattr(self._processor, "chat_template", None)
    return own or getattr(self._processor.tokenizer, "chat_template", None)

  def _ask(self, requests: Sequence[asking.Request]) -> list[asking.Reply]:
    """Of one batch; halves of it where it fails as a whole."""
    torch, _ = _import()
    try:
      return self._generate(requests)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
      if len(requests) == 1:
        memory = isinstance(error, torch.OutOfMemoryError)
        why = OUT_OF_MEMORY if memory else MODEL_ERROR
        return [asking.Reply(None, why, raw=failures.one_line(error, limit=300))]
    middle = len(requests) // 2  # outside the clause, whose error holds what filled the memory
    return self._ask(requests[:middle]) + self._ask(requests[middle:])

  def _generate(self, requests: Sequence[asking.Request]) -> list[asking.Reply]:
    torch, _ = _import()
    from PIL import Image

    talks = []
    for request in requests:
      image = Image.open(io.BytesIO(request.image)).convert("RGB")
      parts = [{"type": "image", "image": image}, {"type": "text", "text": request.prompt}]
      talks.append([{"role": "user", "content": parts}])
    inputs = self._processor.apply_chat_template(
      talks,
      add_generation_prompt=True,
      tokenize=True,
      return_dict=True,
      return_tensors="pt",
      processor_kwargs={"padding": True},
    ).to(self._model.device, dtype=self._model.dtype)
    most, length = self.settings["max_tokens"], inputs["input_ids"].shape[1]
    with torch.inference_mode():
      ids = self._model.generate(**inputs, max_new_tokens=most, do_sample=False)[:, length:].cpu()
    tokenizer = self._processor.tokenizer
    ends = torch.tensor(sorted(self._ends()))
    lengths = [int(end[0]) if len(end := torch.isin(row, ends).nonzero()) else -1 for row in ids]
    self.spent["requests"] += len(requests)
    self.spent["tokens_in"] += int(inputs["attention_mask"].sum())
    self.spent["tokens_out"] += sum(ids.shape[1] if n < 0 else n + 1 for n in lengths)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
      self._reply(request, text.encode("utf-8", "replace").decode(), cut=length < 0)
      for request, text, length in zip(requests, texts, lengths, strict=True)
    ]

  def _reply(self, request: asking.Request, text: str, *, cut: bool) -> asking.Reply:
    why = request.failure(text)  # asked again, it would say the same
    return asking.Reply(None if why else text, why or "", cut, text)

  def _ends(self) -> set[int]:
    """Tokens that end a text."""
    own = self._model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {n for n in [*own, self._processor.tokenizer.eos_token_id] if n is not None}
