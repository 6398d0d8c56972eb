"""CLIPpy on CC12M: max-pooled DINO ViT-B/16 and Sentence-T5-base (arXiv 2210.09996, sec. 3).

    hf download sentence-transformers/sentence-t5-base --local-dir ST5
    python -m grain_jax.convert --from=sentence_t5 --input=ST5 --out=weights/sentence-t5
    python -m grain_jax.convert --from=dino --input=dino_vitbase16_pretrain.pth \\
      --out=weights/dino-b16
    python -m grain_jax.main --config=clippy_cc12m --workdir=runs/clippy

As the released checkpoint was trained (github.com/kahnchana/clippy): 5,000 steps on 8 GPUs with
1,024 images each, float32 with gradient checkpoints; the image's embedding is the maximum over all
tokens. [i]: inferred from its code's defaults. Its configuration asks for a patch dropout of 0.5
that never reaches the tower, so that none is taken here; the paper's is for larger images:
`:model.image.size=448,model.image.patch_dropout=0.8`, which resizes DINO's positions.
"""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, from nothing: a small ViT and T5, with CLIP's tokenizer."""
  c = common.get_config()
  c.method = "clip"
  c.init.update(image="weights/dino-b16", text="weights/sentence-t5", adopt=True)
  # OpenAI's pixels on DINO's tower; training texts of 77 tokens (a Sentence-T5 takes 256).
  c.init.keep = ("model.image.mean", "model.image.std", "model.text.context")
  c.data.dir = "data/cc12m"
  c.data.max_regions = 0
  c.data.row_length = 77  # the caption alone
  c.data.caption = "original"
  c.data.eval_resize = "center_crop"
  c.data.resize = "crop"
  c.data.crop_min_area = 0.9
  c.batch_size = 8192
  c.steps = 5000
  c.model.update(embed_dim=768, pool="max", pool_includes_class=True, projects_images=False)
  c.model.image.qk_norm = False
  c.model.image.mean = (0.48145466, 0.4578275, 0.40821073)
  c.model.image.std = (0.26862954, 0.26130258, 0.27577711)
  c.model.text.update(
    kind="t5", width=768, depth=12, heads=12, vocab_size=32128, activation="relu", norm_eps=1e-6
  )
  # [i] lr 5e-4 after 10,000 steps of warm-up, of which the run sees 5,000: a line up to half of it.
  c.optimizer.update(lr=2.5e-4, lr_init=0.0, lr_end=0.0, warmup_steps=4999)
  c.optimizer.update(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.2)  # [i]
  c.save_every = 500
  c.evals = ()  # CC12M has no evaluation splits of its own; `grain_jax.evaluate` reads others
  return common.parse(c, arg)
