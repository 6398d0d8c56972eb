"""`python -m grain_jax.convert --from=FORMAT --input=PATH --out=DIR`: foreign weights, as a run."""

from __future__ import annotations

from absl import flags

from grain_jax import cli

_FORMATS = "grain_torch, hf_clip, open_clip, ce_clip, sentence_t5, safetensors"


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
  )
  if towers.find(flag.out) == "text":
    text = config.model.text
    print(
      f"{flag.out}: text tower {text.width} x {text.depth} alone, {text.context} tokens, from "
      f"{flag.input}; start from it with --config.init.text={flag.out} --config.init.adopt",
      flush=True,
    )
    return
  tower = config.model.image
  print(
    f"{flag.out}: {config.method}, {tower.size} pixels, image tower {tower.width} x {tower.depth} "
    f"with patches of {tower.patch}, from {flag.input}",
    flush=True,
  )


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
  cli.run(main)
