"""`python -m grain_jax.convert --from=FORMAT --input=PATH --out=DIR`: foreign weights, as a run."""

from __future__ import annotations

from absl import flags

from grain_jax import cli

_FORMATS = (
  "grain_torch, hf_clip, open_clip, ce_clip, clippy, dino, sentence_t5, siglip, safetensors"
)


def main() -> None:
  from grain_jax.convert import convert, towers  # after the flags: a wrong one answers at once

  flag = flags.FLAGS
  source = flag["from"].value  # a keyword of Python
  config = convert.convert(
    source,
    flag.input,
    out=flag.out,
    recipe=flag.config,
    image_size=flag.image_size,
    quick_gelu=flag.quick_gelu,
    tokenizer=flag.tokenizer,
  )
  image, text = config.model.image, config.model.text
  part = towers.find(flag.out)
  seen = f"{image.width} x {image.depth} with patches of {image.patch}, {image.size} pixels"
  what = {
    None: f"{config.method}, image tower {seen}",
    "image": f"image tower {seen}, alone",
    "text": f"text tower {text.width} x {text.depth}, {text.context} tokens, alone",
  }[part]
  then = f"; start from it with --config.init.{part}={flag.out} --config.init.adopt" if part else ""
  print(f"{flag.out}: {what}, from {flag.input}{then}", flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("from", None, f"Format: {_FORMATS}.", required=True)
  flags.DEFINE_string("input", None, "File or folder of the checkpoint.", required=True)
  flags.DEFINE_string("out", None, "Run folder to be written; must not exist.", required=True)
  flags.DEFINE_string(
    "config", None, "Recipe that describes the checkpoint; by default its sizes come from the file."
  )
  flags.DEFINE_integer("image_size", None, "Side in pixels; by default the checkpoint's own.")
  flags.DEFINE_bool(
    "quick_gelu",
    None,
    "open_clip: trained with QuickGELU (OpenAI's weights are); by default as its "
    "configuration or its name says.",
  )
  flags.DEFINE_string(
    "tokenizer",
    None,
    "clippy, siglip: folder of the text tower's SentencePiece tokenizer; by default the "
    "checkpoint's own, or none: then texts are taken as token ids alone.",
  )
  cli.run(main)
