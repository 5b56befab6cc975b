"""Captioning: the cached decoder against the whole one, its loss, its evaluator; what it learns."""

import functools
import math
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_params
from matplotlib.image import imread
from tiers import suite

import train
from evaluators import captions
from losses import tokens
from methods import caption as method
from models import caption, decoding
from trainer import loop, recipe, sharding, transfer
from trainer.checkpoints import load_run
from trainer.logging import read_metrics
from trainer.parts import path_name

EOS, PAD, VOCAB, CONTEXT = 2, 0, 11, 7
TOKENS = dict(vocab_size=VOCAB, context=CONTEXT, eos_id=EOS, pad_id=PAD)
IDS = np.array([[3, 5, 4, EOS, PAD, PAD, PAD], [7, EOS, PAD, PAD, PAD, PAD, PAD],
                [6, 9, 8, 3, 5, 7, EOS]])


def make(**fields):
  return caption.make(**{**dict(
    image_size=8, channels=1, patch=4, width=24, depth=1, heads=2, mlp_dim=32, pool="mean",
    text_width=16, text_depth=2, text_heads=2, text_mlp_dim=24, **TOKENS), **fields})


@functools.cache
def made(**fields):
  model, image = make(**fields), 3 * normal(3, 8, 8, 1, seed=5)
  params = random_params(0.5, model, image, IDS)
  params["text"]["transformer"]["norm"]["bias"][:] = 0  # one token would be likely everywhere
  if "position" in params["text"]:
    params["text"]["position"] *= 3
  return model, params, image


# The model ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions,scan,width", suite([
  ("learned", False, 24), ("sinusoidal", True, 16), ("rope", True, 16), ("alibi", False, 24)],
  0, 2, unpack=True))
def test_cached_steps_equal_the_whole_text(positions, scan, width):
  model, params, image = made(text_positions=positions, scan=scan, width=width)
  whole = model.apply({"params": params}, image, IDS)
  chex.assert_shape(whole, (3, CONTEXT, VOCAB))
  run = jax.jit(lambda name, *args: model.apply({"params": params}, *args, method=name),
                static_argnums=0)
  cache = run("begin", image)
  before = np.concatenate([np.full((3, 1), PAD), IDS[:, :-1]], axis=1)
  for index in range(CONTEXT):
    logits, cache = run("step", cache, before[:, index], index)
    np.testing.assert_allclose(logits, whole[:, index], rtol=1e-4, atol=1e-5)


def test_a_token_is_predicted_by_those_before_it_and_by_the_image():
  model, params, image = made()
  apply = jax.jit(functools.partial(model.apply, {"params": params}))
  whole = apply(image, IDS)
  for place in range(CONTEXT):
    other = IDS.copy()
    other[:, place] = 10
    changed = np.abs(apply(image, other) - whole).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(changed, np.arange(CONTEXT) > place)
  assert (np.abs(apply(image[::-1], IDS) - whole)[[0, 2]].max(2) > 1e-4).all()
  table = params["text"]["embed"]["embedding"].copy()
  table[1] *= 2  # which no text has: its row is the weights of its logit too
  doubled = {**params, "text": {**params["text"], "embed": {"embedding": table}}}
  twice = model.apply({"params": doubled}, image, IDS)
  np.testing.assert_allclose(twice[..., 1], 2 * whole[..., 1], rtol=1e-4, atol=1e-5)


def test_cross_attention_is_over_patches_and_of_the_last_block():
  model, params, image = made()
  logits, weights = model.apply({"params": params}, image, IDS, return_weights=True)
  chex.assert_shape(weights, (3, 2, CONTEXT, 4))
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(logits, model.apply({"params": params}, image, IDS), rtol=1e-4,
                             atol=1e-5)
  flat = jax.tree.map(np.zeros_like, params["text"]["transformer"]["blocks"]["cross_attention"])
  blocks = {**params["text"]["transformer"]["blocks"], "cross_attention": flat}
  text = {**params["text"], "transformer": {**params["text"]["transformer"], "blocks": blocks}}
  _, even = model.apply({"params": {**params, "text": text}}, image, IDS, return_weights=True)
  np.testing.assert_allclose(even, 1 / 4, rtol=1e-5)
  assert weights.std() > 0.01


def test_bfloat16_gives_logits_in_float32():
  model, params, image = made()
  logits = make(dtype="bfloat16").apply({"params": params}, image, IDS)
  assert logits.dtype == np.float32 and (logits != logits.astype(jnp.bfloat16)).any()
  whole = model.apply({"params": params}, image, IDS)
  np.testing.assert_allclose(logits, whole, atol=0.05 * np.abs(whole).max())


@pytest.mark.parametrize("fields,message", [
  (dict(text_width=None), "give all of text_width"), (dict(text_heads=3), "text_heads = 3 does"),
  (dict(vocab_size=None), "set data.tokenizer"), (dict(patch=3), "patch = 3 does not divide"),
  (dict(backbone="resnet"), "a resnet has no such field")])
def test_bad_sizes_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    if "text_width" in fields:
      caption.make(image_size=8, channels=1, text_depth=1, text_heads=1, **TOKENS)
    make(**fields)


# The method ---------------------------------------------------------------------------------------

def test_cross_entropy_of_texts():
  z, smoothing = normal(3, CONTEXT, VOCAB).astype(np.float64) * 3, 0.2
  valid = tokens.until_end(IDS, EOS)
  np.testing.assert_array_equal(valid.sum(1), [4, 2, 7])
  np.testing.assert_array_equal(tokens.until_end(np.array([[4, 4, PAD], [EOS, EOS, 4]]), EOS),
                                [[1, 1, 1], [1, 0, 0]])
  expected = []
  for row, ids, length in zip(z, IDS, (4, 2, 7)):
    total = 0.0
    for logits, token in zip(row[:length], ids):
      p = np.exp(logits) / np.exp(logits).sum()
      target = np.full(VOCAB, smoothing / VOCAB)
      target[token] += 1 - smoothing
      total -= (target * np.log(p)).sum() / length
    expected.append(total)
  np.testing.assert_allclose(tokens.cross_entropy(z, IDS, valid, smoothing), expected, rtol=1e-5)


def test_loss_and_gradient_do_not_see_what_is_after_the_end():
  model, params, image = made()
  learner = method.make(model, smoothing=0.1)
  loss = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
  (value, (_, metrics)), grads = loss(params, {}, {"image": image, "text": IDS},
                                      jax.random.key(0), 0)
  whole = model.apply({"params": params}, image, IDS)
  expected = tokens.cross_entropy(whole, IDS, tokens.until_end(IDS, EOS), 0.1).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  right = (np.argmax(whole, -1) == IDS) | (np.cumsum(IDS == EOS, 1) - (IDS == EOS) > 0)
  np.testing.assert_allclose(metrics["exact"], right.all(1).mean())
  other = np.where((IDS == PAD) & (np.arange(CONTEXT) > 3), 4, IDS)
  again = loss(params, {}, {"image": image, "text": other}, jax.random.key(0), 0)
  np.testing.assert_allclose(again[0][0], value, rtol=1e-6)
  chex.assert_trees_all_close(again[1], grads, rtol=1e-4, atol=1e-6)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["image"]))


def slow_step(model, params, image):
  """A step without a cache: all tokens so far are read again."""
  def step(cache, token, index):
    before = cache["before"].at[:, index].set(token)
    ids = jnp.pad(before[:, 1:], ((0, 0), (0, 1)))
    logits = model.apply({"params": params}, cache["image"], ids)
    return logits[:, index], {**cache, "before": before}
  return step, {"image": image, "before": jnp.zeros((len(image), CONTEXT), jnp.int32)}


@pytest.mark.parametrize("fields", suite([dict(), dict(beams=3, length_penalty=3.0),
                                    dict(temperature=0.7, top_p=0.9)], 0), ids=str)
def test_captions_are_those_of_the_whole_text_in_any_batch(fields):
  model, params, image = made()
  predict = jax.jit(method.make(model, **fields).predict["caption"])
  rng, ends = jax.random.key(3), dict(eos_id=EOS, pad_id=PAD)
  found = predict(params, {}, {"image": image}, rng)
  step, cache = slow_step(model, params, image)
  first = jnp.full(3, PAD)
  if "beams" in fields:
    expected = decoding.beam(step, cache, first, CONTEXT, beams=3, alpha=3.0, **ends)[0][:, 0]
  else:
    choose = decoding.sampler(0.7, 0.9) if fields else decoding.greedy
    expected, _ = decoding.decode(step, cache, first, CONTEXT, choose=choose, rng=rng, **ends)
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(found, axis=0)) > 1 and (fields or (found == EOS).any())
  if not fields:  # padding rows, as of a last batch, and rows alone
    more = predict(params, {}, {"image": np.concatenate([image, 0 * image])}, rng)
    np.testing.assert_array_equal(more[:3], found)
    for row in range(3):
      np.testing.assert_array_equal(
        predict(params, {}, {"image": image[row:row + 1]}, rng)[0], found[row])


@pytest.mark.parametrize("fields", suite([dict(), dict(beams=2), dict(temperature=1.0)], 0),
                         ids=str)
def test_each_device_writes_its_own_captions(fields):
  """Devices that wait for each other in a loop may do so for ever: on CPUs nothing orders them."""
  model, params, image = made()
  own = sharding.batch_sharding(sharding.make_mesh(data=8))
  batch = {"image": jax.ShapeDtypeStruct((16, *image.shape[1:]), image.dtype, sharding=own)}
  compiled = jax.jit(method.make(model, **fields).predict["caption"], out_shardings=own).lower(
    params, {}, batch, jax.random.key(0)).compile().as_text()
  assert "while(" in compiled
  assert not re.search(r"all-(reduce|gather|to-all)|collective-permute", compiled)


@pytest.mark.parametrize("fields,message", [
  (dict(smoothing=1.0), "smoothing = 1.0"), (dict(beams=0), "beams = 0"),
  (dict(temperature=-1.0), "temperature = -1.0: expected at least 0"),
  (dict(beams=2, temperature=1.0), "expected 0 with several beams"),
  (dict(top_p=0.5), "1 at temperature 0"), (dict(length_penalty=0.6), "0 with one beam")])
def test_bad_decoding_is_an_error(fields, message):
  with pytest.raises(ValueError, match=f"method.*{message}"):
    method.make(made()[0], **fields)


# The evaluator ------------------------------------------------------------------------------------

def test_scores_by_hand():
  found = ["a red cat sat down", "a red, Cat", "dogs"]
  references = [("a red cat sat here", "down"), ("a red cat",), ("a dog", "dogs", "cats")]
  scores = captions.score(found, references)
  assert scores["exact"] == pytest.approx(1 / 3)
  assert scores["f1"] == pytest.approx((8 / 10 + 1 + 1) / 3)
  # 13a splits the comma off: 10 tokens, of references nearest in length 5 + 3 + 1, so no penalty.
  precision = [(5 + 2 + 1) / 10, (3 + 1) / 7, 2 / 5, 1 / 3]
  assert scores["bleu"] == pytest.approx(100 * math.prod(precision) ** 0.25)
  assert captions.score(["", "x"], [("a",), ("x",)])["f1"] == 0.5


ALPHABET = "|abcdefghijklmnopqrstuvwxyz ,"


def detokenize(ids):
  text = "".join(ALPHABET[i] for i in ids)
  return text.split("|")[0]


def tokenize(texts, length=20):
  return np.array([[ALPHABET.index(c) for c in text.ljust(length, "|")] for text in texts])


def fake_context(tmp_path, found, references, nearest):
  """Images 2i are training images, of which number `nearest[i]` is the one next to test image i."""
  rng = np.random.default_rng(0)
  bank = rng.normal(size=(8, 4, 8, 1)).astype(np.float32)
  images = bank[nearest] + 0.01
  most = max(map(len, references))
  batches = {
    "test": {"image": images, "num_captions": np.array([len(own) for own in references]),
             "captions": np.stack([tokenize([*own, *["junk"] * (most - len(own))])
                                   for own in references])},
    "train": {"image": bank,
              "captions": tokenize([f"{'abcdefgh'[i]} big old thing" for i in range(8)])[:, None]}}

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    batch = batches[split]
    out = tokenize(found) if name == "caption" else batch["image"].reshape(len(batch["image"]), -1)
    return out[:limit][:first], {key: batch[key][:limit][:first] for key in keys}

  def predict(name, batch):
    assert name == "cross_attention"
    weights = np.zeros((len(batch["image"]), 2, batch["text"].shape[1], 8))
    weights[..., np.arange(20), np.arange(20) % 8] = 1  # token i looks at patch i of 2 x 4
    return weights

  return SimpleNamespace(collect=collect, predict=predict, predictions={"cross_attention"},
                         detokenize=detokenize, eval_split="test", train_split="train", step=7,
                         figures=tmp_path / "figures", to_pixels=lambda x: x / 4 + 0.5)


def test_words_and_their_tokens():
  text = tokenize(["ab, c d"])[0]
  assert captions.spell(detokenize, text) == (["ab,", "c", "d"], [[0, 1, 2, 3], [4, 5], [6]])
  assert captions.spell(detokenize, tokenize([""])[0]) == ([], [])


def test_evaluation_with_its_baseline_and_its_figure(tmp_path):
  found = ["a big old thing", "b big old thing", "", "a big old thing"]
  references = [("x", "a big old thing"), ("a big old thing",), ("c big old thing",), ("d",)]
  context = fake_context(tmp_path, found, references, [0, 0, 3, 3])
  metrics = captions.evaluate(context, baselines=("pixels",))
  assert metrics == {**captions.score(found, references),
                     "pixels/exact": 0.5, "pixels/f1": pytest.approx((1 + 1 + 3 / 4 + 2 / 5) / 4),
                     "pixels/bleu": metrics["pixels/bleu"]}
  assert metrics["exact"] == 0.25 and 0 < metrics["bleu"] < metrics["pixels/bleu"]
  picture = imread(tmp_path / "figures" / "captions_step00000007.png")[..., :3]
  for colour in ((0x2c, 0xa0, 0x2c), (0xd6, 0x27, 0x28)):  # frames of right and of wrong ones
    assert (np.abs(picture * 255 - colour).max(-1) < 1).sum() > 2000
  limited = captions.evaluate(context, limit=1, examples=0)
  assert set(limited) == {"exact", "f1", "bleu"} and limited["exact"] == 1


def test_evaluation_says_what_is_wrong(tmp_path):
  context = fake_context(tmp_path, ["a"], [("a",)], [0])
  for fields, message in ((dict(limit=0), "limit = 0"), (dict(examples=-1), "examples = -1"),
                          (dict(baselines=("pixel",)), "did you mean 'pixels'")):
    with pytest.raises(ValueError, match=message):
      captions.evaluate(context, **fields)
  context.detokenize = None
  with pytest.raises(ValueError, match="set data.tokenizer"):
    captions.evaluate(context)


# End to end ---------------------------------------------------------------------------------------

LEARN = {"total_steps": 300, "data.batch_size": 64, "optimizer.lr": 5e-3, "log_every_steps": 50,
         "schedule.warmup_steps": 20, "eval_every_steps": 0, "augment.affine": None,
         "evals.captions.split": "train", "evals.captions.baselines": "()"}


def run_train(name, workdir, data_dir, **overrides):
  flags = [f"--config.{field}={value}" for field, value in overrides.items()]
  return train.main([f"--config=configs/{name}.py:smoke", f"--workdir={workdir}",
                     f"--data_dir={data_dir}", *flags])


@pytest.mark.slow
def test_it_learns_to_say_what_it_is_shown_and_starts_from_other_runs(tmp_path):
  data_dir, vit, workdir = (str(tmp_path / name) for name in ("data", "vit", "caption"))
  assert run_train("caption", workdir, data_dir, **LEARN) == 0
  last = read_metrics(workdir)[-1]
  assert last["eval/captions/exact"] > 0.4  # of 120 captions
  assert last["eval/captions/f1"] > 0.7 and last["eval/captions/bleu"] > 60
  figure, = (tmp_path / "caption" / "figures").iterdir()
  assert figure.name == "captions_step00000300.png" and figure.stat().st_size > 10_000

  assert run_train("vit", vit, data_dir, **{"evals.classification": None}) == 0
  config = recipe.load_config("configs/caption.py:smoke", {"init.run": vit})
  built = recipe.build(config, data_dir)
  taken = transfer.take(built.config, loop.abstract_state(built)[0], built.method,
                        **config.init).params
  expected = {"image/" + path_name(path): x for path, x in
              jax.tree.leaves_with_path(load_run(vit).params) if path_name(path)[:5] != "head/"}
  chex.assert_trees_all_equal(taken, expected)
