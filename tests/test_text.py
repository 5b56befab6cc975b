import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from input_pipeline import text

CAPTIONS = ["greek small letter omega, bold serif", "latin capital letter a, italic sans",
            "latin small letter o with stroke, mono", "digit seven, bold sans"] * 5
UNSEEN = ["Latin small letter thorn, serif", "a red car -- 100 m away!", "naïve façade, 東京🙂\n\t"]
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def row(ids, context, pad):
  return [*ids, *[pad] * (context - len(ids))]


def clip_like(path, post="roberta", padding=None):
  """A tokenizer.json with the parts of CLIP's: </w>, end-of-text also unknown, no padding token."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pairs = [("e", "r</w>"), ("t", "t"), ("l", "e"), ("tt", "er</w>"), ("le", "tter</w>")]
  vocab = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, pairs), text.START, text.END]
  pipeline = tokenizers.Tokenizer(models.BPE(
    vocab={token: i for i, token in enumerate(vocab)}, merges=pairs, unk_token=text.END,
    end_of_word_suffix="</w>"))
  pipeline.normalizer = normalizers.Sequence([
    normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
  pipeline.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), "removed", invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False)])
  pipeline.decoder = decoders.ByteLevel()
  pipeline.add_special_tokens([text.START, text.END])
  start, end = map(pipeline.token_to_id, (text.START, text.END))
  if post == "roberta":
    pipeline.post_processor = processors.RobertaProcessing((text.END, end), (text.START, start))
  if padding:
    pipeline.enable_padding(pad_id=padding, pad_token=pipeline.id_to_token(padding))
  pipeline.save(str(path))
  return start, end


def words(path, post=None, special=("</s>", "<pad>"), unk="the"):
  pipeline = tokenizers.Tokenizer(models.WordLevel({"the": 0, "a": 1, "cat": 2, "stop": 3}, unk))
  pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
  pipeline.add_special_tokens(list(special))
  if post:
    pipeline.post_processor = processors.TemplateProcessing(
      single=post, special_tokens=[(t, pipeline.token_to_id(t)) for t in post.split() if t != "$A"])
  pipeline.save(str(path))
  return str(path)


def test_bytes_are_pythons():
  tokens = text.make("bytes", context=40)
  assert tokens[1:] == (259, 40, 258, 256)
  every = "".join(map(chr, range(1, 0x250))) + "東🙂"
  pieces = [every[i:i + 18] for i in range(0, len(every), 18)] + UNSEEN
  ids = tokens.encode(pieces)
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, [row([257, *p.encode()[:38], 258], 40, 256) for p in pieces])
  assert [tokens.decode(i) for i in ids] == pieces


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_long_captions_keep_their_end(name):
  tokens = text.make(name, CAPTIONS, context=8, vocab_size=300)
  ids = tokens.encode(["a", "ab" * 4, CAPTIONS[0], "é" * 50])
  assert ids.shape == (4, 8)
  assert (np.sum(ids == tokens.eos_id, 1) == 1).all()
  assert (np.argmax(ids, 1) == np.argmax(ids == tokens.eos_id, 1)).all()  # both kinds of pooling
  assert (ids[1:, -1] == tokens.eos_id).all() and (ids[0, 3:] == tokens.pad_id).all()
  assert ids.max() == tokens.eos_id == tokens.vocab_size - 1 > tokens.pad_id
  assert CAPTIONS[0].startswith(tokens.decode(ids[2])) and tokens.decode(ids[2])


def test_bpe_is_byte_pair_encoding():
  """Against merging by rank, written out, of the words that the pre-tokenizer makes."""
  tokens = text.make("bpe", CAPTIONS, context=64, vocab_size=300)
  model = json.loads(tokens.to_json())["model"]
  ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
  assert len(ranks) == 300 - 3 - 256
  split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
  for caption in CAPTIONS[:4] + UNSEEN:
    expected = []
    for word, _ in split(caption):
      parts = list(word)
      while pairs := [p for p in zip(parts, parts[1:]) if p in ranks]:
        best = min(pairs, key=ranks.get)
        i = list(zip(parts, parts[1:])).index(best)
        parts[i:i + 2] = ["".join(best)]
      expected += [model["vocab"][part] for part in parts]
    encoded = tokens.encode([caption])[0]
    assert encoded.tolist() == row([298, *expected, 299], 64, 297)
    assert tokens.decode(encoded) == caption
  assert sum(tokens.encode(CAPTIONS)[0] != 297) < len(CAPTIONS[0]) / 2


def test_bpe_has_the_vocabulary_asked_for():
  for captions in ((), CAPTIONS[:1], CAPTIONS):
    tokens = text.make("bpe", captions, vocab_size=800)
    assert tokens[1:] == (800, 64, 799, 797)
    assert tokens.decode(tokens.encode(UNSEEN[1:2])[0]) == UNSEEN[1]
    assert text.make("bpe", captions, vocab_size=800).to_json() == tokens.to_json()
  assert text.make("bpe", UNSEEN, vocab_size=800).to_json() != tokens.to_json()


@pytest.mark.parametrize("name", ["bytes", "bpe", "clip"])
def test_special_tokens_in_captions_are_text(name, tmp_path):
  path = tmp_path / "tokenizer.json"
  clip_like(path)
  tokens = text.make(name if name != "clip" else str(path), CAPTIONS, vocab_size=400)
  spelt = f"so {text.END} and {text.START}"
  for same in (tokens, pickle.loads(pickle.dumps(tokens)), text.from_json(tokens.to_json())):
    ids = same.encode([spelt])
    assert np.sum(ids == tokens.eos_id) == 1 and same.decode(ids[0]).replace(
      " ", "") == spelt.replace(" ", "")


def test_lower_case():
  tokens = text.make("bytes", lower_case=True, context=16)
  np.testing.assert_array_equal(tokens.encode(["ÀB c"]), text.make("bytes", context=16).encode(
    ["àb c"]))


@pytest.mark.parametrize("post", ["roberta", None])
def test_clips_tokenizer_json(tmp_path, post):
  start, end = clip_like(tmp_path / "tokenizer.json", post)
  tokens = text.make(str(tmp_path / "tokenizer.json"), context=24)
  assert tokens[1:] == (end + 1, 24, end, 0)
  raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  begin = [start] if post else []  # with no post-processor nothing asks for a start
  captions = [*UNSEEN, CAPTIONS[0], "word " * 50]
  for caption, ids in zip(captions, tokens.encode(captions)):
    body = raw.encode(caption, add_special_tokens=False).ids[:23 - len(begin)]
    assert ids.tolist() == row([*begin, *body, end], 24, 0)
  assert tokens.decode(tokens.encode(["A  Greek letter, OMEGA"])[0]) == "a greek letter , omega"
  assert len(tokens.decode(ids)) > 20 and ("word " * 9).startswith(tokens.decode(ids))


def test_a_files_own_padding_is_kept_even_if_it_is_its_end_of_text(tmp_path):
  _, end = clip_like(tmp_path / "tokenizer.json")
  clip_like(tmp_path / "tokenizer.json", padding=end)
  tokens = text.make(str(tmp_path / "tokenizer.json"), context=12)
  again = text.from_json(tokens.to_json())
  assert tokens[1:] == again[1:] == (end + 1, 12, end, end)
  ids = again.encode(["omega"])[0]
  assert (ids[-5:] == end).all() and again.decode(ids) == "omega"


@pytest.mark.parametrize("post, special, options, expected", [
  ("$A </s>", ("</s>", "<pad>"), {}, ([1, 2, 4, 5, 5], 4, 5)),  # T5, SigLIP
  ("$A </s>", ("</s>",), {"pad_id": 4}, ([1, 2, 4, 4, 4], 4, 4)),
  ("<s> $A", ("<s>", "</s>", "[PAD]"), {}, ([4, 1, 2, 5, 6], 5, 6)),
  (None, ("[CLS]", "[SEP]"), {}, ([1, 2, 5, 0, 0], 5, 0)),
  (None, ("<x>",), {"eos_id": 3, "pad_id": 4}, ([1, 2, 3, 4, 4], 3, 4))])
def test_special_tokens_of_a_file(tmp_path, post, special, options, expected):
  tokens = text.make(words(tmp_path / "t.json", post, special), context=5, **options)
  assert (tokens.encode(["a cat"])[0].tolist(), tokens.eos_id, tokens.pad_id) == expected


def test_what_is_stored_is_a_tokenizer_json_that_is_the_tokenizer(tmp_path):
  for tokens in (text.make("bytes", context=20), text.make("bpe", CAPTIONS, context=20)):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokens.to_json())
    raw = tokenizers.Tokenizer.from_file(str(path))
    expected = tokens.encode(UNSEEN)
    np.testing.assert_array_equal([e.ids for e in raw.encode_batch(UNSEEN)], expected)
    for again in (text.from_json(tokens.to_json()), text.make(str(path), context=20)):
      assert again[1:] == tokens[1:] and again.to_json() == tokens.to_json()
      np.testing.assert_array_equal(again.encode(UNSEEN), expected)
    assert text.make(str(path), context=7).encode(UNSEEN).shape == (3, 7)


@pytest.mark.parametrize("caption, why", [
  ("", "empty"), (" \n", "empty"), (b"caf\xe9".decode(errors="surrogateescape"), "not UTF-8")])
def test_bad_captions_name_their_row(caption, why):
  with pytest.raises(ValueError, match=f"caption 2 is {why}"):
    text.make("bytes").encode(["a", "b", caption])


def test_a_caption_taken_for_an_end_of_text_names_its_row(tmp_path):
  tokens = text.make(words(tmp_path / "t.json", special=("<x>",)), eos_id=3, pad_id=4)
  with pytest.raises(ValueError, match="caption 1 holds the end-of-text token 3.*the stop"):
    tokens.encode(["a cat", "the stop"])


@pytest.mark.parametrize("name, options, match", [
  ("byte", {}, "data.tokenizer='byte'; allowed.*did you mean 'bytes'"),
  ("bpe", {"vocab_size": 258}, "data.vocab_size=258"), ("bytes", {"context": 2}, "data.context=2"),
  ("none.json", {}, "no such file"), ("bad.json", {}, "data.tokenizer=.*not a tokenizer.json"),
  ("plain.json", {}, "data.tokenizer=.*its eos_id: set data.eos_id.*<x>"),
  ("plain.json", {"eos_id": 0}, "data.tokenizer=.*its pad_id: set data.pad_id"),
  ("plain.json", {"eos_id": 9}, "data.eos_id=9: .* no such token"),
  ("plain.json", {"eos_id": 3, "pad_id": -1}, "data.pad_id=-1: .* no such token")])
def test_bad_fields_are_named(tmp_path, name, options, match):
  (tmp_path / "bad.json").write_text("{}")
  words(tmp_path / "plain.json", special=("<x>",))
  with pytest.raises((ValueError, FileNotFoundError), match=match):
    text.make(str(tmp_path / name) if name.endswith("json") else name, **options)
