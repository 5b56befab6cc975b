r"""Masked language modelling: an encoder of texts that tells which tokens were hidden from it.

  python train.py --config=configs/bert.py           the names of the embedded letters, minutes on
                                                     two CPU cores
  python train.py --config=configs/bert.py:smoke     the same in seconds
  python train.py --config=configs/bert.py --config.data.source=lines:PATH.txt

reads any file of texts, one a line. UniLM's mix of attention masks: --config.method.masks=unilm. A
text tower of configs/clip.py starts from such a run by --config.init.text_run=DIR.

BERT-base (1810.04805 sec. 3 and appendix A.2): batch 256 of 512 tokens, 1,000,000 steps on 3.3
billion words of books and Wikipedia. The paper's first 900,000 steps are on 128 tokens, and it
tells beside whether two texts follow each other, which later work leaves out (1907.11692 sec. 4.2).

  base

It is to be given its texts, and a tokenizer of 30,522 tokens: --config.data.tokenizer=PATH.json.
"""

from configs.base import get_base

VARIANTS = ("", "smoke", "base")


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="bert")
  return base(config) if variant == "base" else embedded(config, smoke=variant == "smoke")


def embedded(config, smoke: bool):
  """Unicode names of letters and their styles; tested on names never seen."""
  config.total_steps, config.eval_every_steps = 2000, 0
  config.expect = "accuracy 0.72 +- 0.01 of the hidden tokens of unseen names, by counts alone 0.10"
  config.model = dict(name="bert", width=128, depth=2, heads=4)
  config.data = dict(source="glyphs/letters", batch_size=128, tokenizer="bpe", vocab_size=512,
                     context=24, mask_token=True)
  config.optimizer = dict(name="adamw", lr=1e-3, b2=0.98, weight_decay=0.01, clip_norm=1.0)
  config.schedule = dict(name="linear", warmup_steps=200)
  config.evals = dict(masked_text=dict(split="unseen_names", baselines=("unigram",)))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=1, heads=2)
    config.data.update(source="glyphs/digits_16", batch_size=16, vocab_size=300)
    config.schedule.warmup_steps = 2
    config.evals = dict(masked_text=dict(baselines=("unigram",)))
  return config


def base(config):
  """Appendix A.2, all steps on whole texts.

  Its AdamW does not debias its moments, and its decay began with the run (optimization.py of
  google-research/bert).
  Dropout is of what branches give and of the MLP's hidden features; BERT's released code drops
  attention weights in the place of the latter.
  """
  config.dtype = "bfloat16"
  config.total_steps, config.checkpoint.every_steps = 1_000_000, 10_000
  config.log_every_steps, config.eval_every_steps = 50, 10_000
  config.model = dict(name="bert", variant="BERT-base", activation="gelu_tanh", dropout=0.1,
                      scan=True)
  config.data = dict(source="lines:texts.txt", batch_size=256, workers=16, on_error="skip",
                     cache_bytes=0, tokenizer="tokenizer.json", context=512, mask_token=True,
                     held_out=1e-3)
  config.optimizer = dict(name="adamw", lr=1e-4, b2=0.999, eps=1e-6, weight_decay=0.01,
                          debias=False, decay=r"(kernel|embedding|position|segment)$",
                          clip_norm=1.0)
  config.schedule = dict(name="linear", warmup_steps=10_000, from_start=True)
  config.evals = dict(masked_text=dict(limit=10_000, baselines=("unigram",)))
  return config
