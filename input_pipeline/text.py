"""Captions to token ids: UTF-8 bytes, BPE trained on the captions at hand, or any tokenizer.json.

All three are one pipeline of the `tokenizers` library, which cuts a text to the context and then
adds the start and the end-of-text token. In what is made here end-of-text is the largest id, so
that pooling at the largest id (OpenAI's CLIP) and pooling at a given id are the same.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from input_pipeline.records import fault, nearest

PAD, START, END, MASK = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|mask|>"
# What files call these tokens where nothing else in them tells.
ENDS, PADS = (END, "</s>", "<eos>", "[SEP]"), (PAD, "<pad>", "[PAD]")
MASKS = (MASK, "[MASK]", "<mask>")


class Tokenizer(NamedTuple):
  """A text is [start,] its tokens, at most as many as fit, end-of-text, padding."""
  pipeline: tokenizers.Tokenizer
  vocab_size: int  # all ids are smaller
  context: int  # tokens a text
  eos_id: int  # once in each text: the last token before padding
  pad_id: int

  @property
  def mask_id(self) -> int | None:
    """Of the token that hides another, which no text has; None: there is none."""
    ids = map(self.pipeline.token_to_id, MASKS)
    return next((i for i in ids if i is not None), None)

  @property
  def starts(self) -> int:
    """How many tokens every text begins with before its own."""
    return self.pipeline.encode("").ids.index(self.eos_id)

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Token ids, int32 [n, context]. A caption that spells a special token is plain text.

    Raises:
      ValueError: a caption that is empty, not UTF-8 or taken for an end of text; names its row.
    """
    for row, caption in enumerate(captions):
      if why := fault(caption):
        raise ValueError(f"caption {row} is {why}: {caption!r}")
    encoded = self.pipeline.encode_batch(list(captions))
    ids = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.context)  # n l
    last = np.array([sum(e.attention_mask) - 1 for e in encoded], int)
    if (wrong := np.argmax(ids == self.eos_id, axis=1) != last).any():
      row = int(np.argmax(wrong))
      raise ValueError(f"caption {row} holds the end-of-text token {self.eos_id}, as the tokenizer "
                       f"reads it: {captions[row]!r}")
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of one row of ids, up to its end; what a cut left of a character is U+FFFD."""
    text = self.pipeline.decode([int(i) for i in takewhile(lambda i: i != self.eos_id, ids)])
    suffix = getattr(self.pipeline.model, "end_of_word_suffix", None)  # CLIP's </w>
    return text.replace(suffix, " ").strip() if suffix else text

  def to_json(self) -> str:
    """A tokenizer.json that says all of it, the context and the padding too; see `from_json`."""
    return self.pipeline.to_str()

  def __reduce__(self):  # for workers: the pipeline's own pickle forgets `encode_special_tokens`
    return from_json, (self.to_json(),)


def make(name: str, captions: Iterable[str] = (), *, context: int = 64, vocab_size: int = 1024,
         lower_case: bool = False, eos_id: int | None = None, pad_id: int | None = None,
         mask_token: bool = False) -> Tokenizer:
  """Makes a tokenizer.

  Args:
    name: "bytes", a token a byte, its id the byte; "bpe", byte-level byte-pair encoding
      (1508.07909) of `captions`; or PATH.json.
    captions: that BPE is trained on (others do not look); the same give the same tokenizer.
    context: tokens a text.
    vocab_size: of BPE, all ids counted; if the captions do not give as many, some are never used.
    lower_case: whether captions are lower-cased, before what a file may say besides.
    eos_id, pad_id: of a file that does not tell them by its post-processor, its padding or its
      tokens' names. Padding that nothing tells is 0, as in OpenAI's CLIP.
    mask_token: whether there has to be one that hides others, of an id of its own. Files that have
      one call it by a name in MASKS; to others it is added, as the largest id.

  Raises:
    ValueError, FileNotFoundError: a field that does not do, or a file that is no tokenizer.
  """
  if name in ("bytes", "bpe"):
    special = [PAD, START, *[MASK] * mask_token, END]
    pipeline = _bytes() if name == "bytes" else _bpe(captions, vocab_size, len(special))
    pipeline.add_special_tokens(special)
    pad_id, start, eos_id = map(pipeline.token_to_id, (PAD, START, END))
    start = [start]
  else:
    pipeline = _read(name)
    start, eos_id, pad_id = _special_ids(pipeline, name, eos_id, pad_id)
    if mask_token and not {*MASKS} & {*pipeline.get_vocab()}:
      pipeline.add_special_tokens([MASK])
  if not isinstance(context, int) or context < len(start) + 2:
    raise ValueError(f"data.context={context!r}; it must be a whole number >= {len(start) + 2}")
  if lower_case:
    first, then = normalizers.Lowercase(), pipeline.normalizer
    pipeline.normalizer = normalizers.Sequence([first, then]) if then else first
  token = {i: pipeline.id_to_token(i) for i in (*start, eos_id, pad_id)}
  pipeline.post_processor = processors.TemplateProcessing(
    single=[*(token[i] for i in start), "$A", token[eos_id]],
    special_tokens=[(text, i) for i, text in token.items()])
  pipeline.enable_truncation(context)
  pipeline.enable_padding(length=context, pad_id=pad_id, pad_token=token[pad_id])
  return from_json(pipeline.to_str())


def from_json(text: str) -> Tokenizer:
  """The tokenizer whose `to_json` gave `text`."""
  pipeline = tokenizers.Tokenizer.from_str(text)
  pipeline.encode_special_tokens = True  # a caption cannot spell one
  empty = pipeline.encode("")
  return Tokenizer(pipeline, max(pipeline.get_vocab().values()) + 1,
                   pipeline.truncation["max_length"], empty.ids[sum(empty.attention_mask) - 1],
                   pipeline.padding["pad_id"])


def _byte_level(vocab: dict[str, int]) -> tokenizers.Tokenizer:
  pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits into words
  pipeline.decoder = decoders.ByteLevel()
  return pipeline


def _bytes() -> tokenizers.Tokenizer:
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character stands for each byte:
  themselves = [ord(c) for c in alphabet if ord(c) < 256]  # those that print, and for the others
  others = [b for b in range(256) if b not in themselves]  # characters from 256 on, in order
  return _byte_level(dict(zip(alphabet, themselves + others, strict=True)))


def _bpe(captions: Iterable[str], vocab_size: int, special: int) -> tokenizers.Tokenizer:
  """BPE of `vocab_size` less `special` tokens."""
  if vocab_size < 256 + special:
    raise ValueError(f"data.vocab_size={vocab_size}: BPE needs at least {256 + special}, for bytes "
                     f"and {special} tokens such as padding, start and end")
  pipeline = _byte_level({})
  pipeline.train_from_iterator(captions, trainers.BpeTrainer(
    vocab_size=vocab_size - special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
  missing = vocab_size - special - pipeline.get_vocab_size()
  pipeline.add_special_tokens([f"<|unused_{i}|>" for i in range(missing)])
  return pipeline


def _read(path: str) -> tokenizers.Tokenizer:
  if not path.endswith(".json"):
    raise ValueError(f"data.tokenizer={path!r}; "
                     + nearest(path, ("bytes", "bpe"), "allowed: bytes, bpe or PATH.json"))
  file = Path(path).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"data.tokenizer={path!r}: no such file")
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as e:  # the library's own are of no narrower type
    raise ValueError(f"data.tokenizer={path!r} is not a tokenizer.json: {e}") from e


def _special_ids(pipeline: tokenizers.Tokenizer, path: str, eos_id: int | None,
                 pad_id: int | None) -> tuple[list[int], int, int]:
  """(start tokens, end-of-text, padding) of a tokenizer.json, whose padding is taken off."""
  if pad_id is None and pipeline.padding:
    pad_id = pipeline.padding["pad_id"]
  pipeline.no_padding()
  pipeline.no_truncation()
  names = {t.content: i for i, t in pipeline.get_added_tokens_decoder().items() if t.special}
  probe = pipeline.encode("a")
  begins = [*probe.special_tokens_mask, 0].index(0)
  ends = [i for i, special in zip(probe.ids, probe.special_tokens_mask) if special][begins:]
  if eos_id is None:
    eos_id = next(iter(ends[-1:] or (names[n] for n in ENDS if n in names)), None)
  if pad_id is None:
    pad_id = next((names[n] for n in PADS if n in names), 0)
    pad_id = None if pad_id in (eos_id, *probe.ids[:begins]) else pad_id
  for field, value in (("eos_id", eos_id), ("pad_id", pad_id)):
    if value is None:
      raise ValueError(f"data.tokenizer={path!r} does not tell its {field}: set data.{field}; "
                       f"special tokens there: {names or 'none'}")
    if value < 0 or pipeline.id_to_token(value) is None:
      raise ValueError(f"data.{field}={value}: {path} has no such token")
  return probe.ids[:begins], eos_id, pad_id
