"""Decoding against all texts there are, a beam search on lists, and counts of samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoding

EOS, PAD, V, LENGTH = 1, 0, 5, 4
ENDS = dict(eos_id=EOS, pad_id=PAD)
# Of each of three rows: logits of the next token by the two tokens before it. Never padding.
LOGITS = np.random.default_rng(0).normal(0, 2, (3, V, V, V)).astype(np.float32)
LOGITS[..., PAD] = -np.inf


def step(cache, token, index):
  """The cache has what a text's row is and what stood before, with a leading axis of its own."""
  row, before = cache["row"][0], cache["before"][0]
  logits = jnp.asarray(LOGITS)[row, jnp.where(index > 0, before, PAD), token]
  return logits, {"row": cache["row"], "before": token[None]}


def begin(rows):
  rows = np.asarray(rows)
  return {"row": rows[None], "before": np.full((1, len(rows)), 3)}, np.full(len(rows), PAD)


def log_probability(row, text):
  total, before, token = 0.0, PAD, PAD
  for following in text:
    z = LOGITS[row, before, token].astype(np.float64)
    total += z[following] - np.log(np.exp(z).sum())
    before, token = token, following
  return total


def score(row, text, alpha):
  return log_probability(row, text) * 6**alpha / (5 + len(text))**alpha


def padded(text):
  return (*text, *[PAD] * (LENGTH - len(text)))


def every_text():
  for n in range(1, LENGTH + 1):
    for body in itertools.product(range(2, V), repeat=n - 1):
      yield (*body, EOS)
      if n == LENGTH:
        yield from ((*body, last) for last in range(2, V))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beams_for_all_texts_find_the_best(alpha):
  texts = list(every_text())
  search = jax.jit(lambda cache, first: decoding.beam(
    step, cache, first, LENGTH, beams=len(texts) + 2, alpha=alpha, axis=1, **ENDS))
  tokens, scores = search(*begin([0, 1, 2]))
  for row in range(3):
    best = sorted(texts, key=lambda text: -score(row, text, alpha))
    np.testing.assert_array_equal(tokens[row, :20], [padded(text) for text in best[:20]])
    best = [score(row, text, alpha) for text in best]
    np.testing.assert_allclose(scores[row], [*best, -np.inf, -np.inf], rtol=1e-4)


def beam_of_lists(row, beams, alpha):
  kept = [()]
  for _ in range(LENGTH):
    grown = [text for text in kept if text[-1:] == (EOS,)]
    grown += [(*text, token) for text in kept if text[-1:] != (EOS,) for token in range(V)]
    kept = sorted(grown, key=lambda text: -score(row, text, alpha))[:beams]
  return kept


@pytest.mark.parametrize("beams,alpha", [(2, 0.0), (3, 1.0), (8, 0.6)])
def test_few_beams_keep_what_a_search_on_lists_keeps(beams, alpha):
  tokens, scores = decoding.beam(step, *begin([2, 0, 1]), LENGTH, beams=beams, alpha=alpha, axis=1,
                                 **ENDS)
  for row, found, value in zip([2, 0, 1], tokens, scores):
    expected = beam_of_lists(row, beams, alpha)
    np.testing.assert_array_equal(found, [padded(text) for text in expected])
    np.testing.assert_allclose(value, [score(row, text, alpha) for text in expected], rtol=1e-4)


def test_greedy_takes_the_likeliest_in_any_batch_and_is_one_beam():
  together = decoding.decode(step, *begin([0, 1, 2]), 12, **ENDS)
  lengths = set()
  for row in range(3):
    text, before, token = [], PAD, PAD
    while len(text) < 12 and token != EOS:
      before, token = token, int(np.argmax(LOGITS[row, before, token]))
      text.append(token)
    alone = decoding.decode(step, *begin([row]), 12, **ENDS)
    for tokens, log_p in (alone, (together[0][row:], together[1][row:])):
      np.testing.assert_array_equal(tokens[0], text + [PAD] * (12 - len(text)))
      np.testing.assert_allclose(log_p[0], log_probability(row, text), rtol=1e-5)
    lengths.add(len(text))
  assert len(lengths) > 1  # one ends while others go on
  for alpha in (0.0, 3.0):
    tokens, _ = decoding.beam(step, *begin([0, 1, 2]), 12, beams=1, alpha=alpha, axis=1, **ENDS)
    np.testing.assert_array_equal(tokens[:, 0], together[0])


def test_the_nucleus_is_the_smallest_set():
  p = np.array([[0.15, 0.4, 0.05, 0.3, 0.1], [0.2] * 5])
  for top_p, sizes in ((0.1, (1, 1)), (0.41, (2, 3)), (0.75, (3, 4)), (1.0, (5, 5))):
    kept = np.isfinite(decoding.nucleus(jnp.log(p), top_p))
    assert tuple(kept.sum(1)) == sizes
    assert (p[0][kept[0]].min() >= p[0][~kept[0]]).all() and kept[1, :sizes[1]].all()
  np.testing.assert_array_equal(decoding.nucleus(jnp.log(p), 0.75)[0, [1, 3, 0]],
                                jnp.log(p)[0, [1, 3, 0]])


def nucleus(row, before, token, temperature, top_p):
  p = np.exp(LOGITS[row, before, token].astype(np.float64) / temperature)
  p, chosen = p / p.sum(), np.zeros(V)
  for i in sorted(range(V), key=lambda i: -p[i]):
    if chosen.sum() < top_p:
      chosen[i] = p[i]
  return chosen / chosen.sum()


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_samples_have_the_probabilities_asked_for(temperature, top_p):
  n, row = 40_000, 1
  tokens, log_p = decoding.decode(
    step, *begin([row] * n), 2, choose=decoding.sampler(temperature, top_p), **ENDS,
    rng=jax.random.key(1))
  then = np.stack([nucleus(row, PAD, token, temperature, top_p) for token in range(V)])
  then[EOS] = np.eye(V)[PAD]
  expected = nucleus(row, PAD, PAD, temperature, top_p)[:, None] * then
  counts = np.zeros((V, V))
  np.add.at(counts, tuple(np.asarray(tokens).T), 1)
  assert (np.abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()
  texts = [tuple(int(t) for t in text if t != PAD) for text in tokens[:20]]
  np.testing.assert_allclose(log_p[:20], [log_probability(row, text) for text in texts], rtol=1e-5)
