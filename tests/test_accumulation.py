"""A contrastive loss by parts of a batch: that of the whole batch, with the memory of one part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import suite

from methods import clip as clip_method
from methods import moco as moco_method
from models import clip, moco
from trainer.state import make_init, make_step

VIT = dict(image_size=(16, 16), channels=1, patch=4, width=16, depth=1, heads=2, mlp_dim=32)
TEXT = dict(text_width=16, text_depth=1, text_heads=2, embed_dim=8, vocab_size=20, context=6,
            eos_id=1, pad_id=0)


def methods(batch_size: int):
  return {
    "clip": lambda: clip_method.make(clip.make(**VIT, **TEXT), batch_size=batch_size),
    "siglip": lambda: clip_method.make(clip.make(**VIT, **TEXT, init_bias=-1.0),
                                       batch_size=batch_size, loss="sigmoid", max_logit_scale=None),
    "moco_v3": lambda: moco_method.make(
      moco.make(backbone="vit", **VIT, dim=8, projector_hidden=(16,), predictor_hidden=(16,),
                head_norm=False),
      batch_size=batch_size, total_steps=10, queue_size=0, momentum=0.9, temperature=0.2)}


def batch_of(n: int):
  rng = np.random.default_rng(0)
  images = {name: jnp.asarray(rng.normal(size=(n, 16, 16, 1)), jnp.float32)
            for name in ("image", "image_2")}
  return images | {"text": jnp.asarray(rng.integers(2, 20, (n, 6)), jnp.int32).at[:, -1].set(1)}


def stepper(name: str, accumulate: int, n: int = 16):
  # A step as long as 1 at most, so that 1e-5 of a parameter is 1e-5 of the gradient's norm.
  method = methods(n // accumulate)[name]()
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
  spec = jax.eval_shape(lambda: batch_of(n))
  init = make_init(method, tx, lambda batch: batch, spec, 0, with_ema=False)
  return init, make_step(method, tx, lambda rng, batch: batch, seed=0, accumulate=accumulate)


@pytest.mark.parametrize("name", suite(["clip", "siglip", "moco_v3"], 0))
def test_parts_have_the_negatives_of_the_whole(name):
  results, before = {}, jax.jit(stepper(name, 1)[0])()
  for n in (1, 2, 4):
    results[n] = jax.jit(stepper(name, n)[1])(before, batch_of(16))
  moved = optax.tree.norm(optax.tree.sub(results[4][0].params, before.params))
  assert moved > 1e-3
  for n in (2, 4):
    for got, want in zip(jax.tree.leaves(results[n]), jax.tree.leaves(results[1])):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  method = methods(8)[name]()  # the mean over parts would have fewer negatives
  part = jax.tree.map(lambda x: x[::2], batch_of(16))
  alone, _ = jax.jit(method.loss)(before.params, before.extra, part, jax.random.key(0), 0)
  assert abs(alone - results[1][1]["loss"]) > 0.02


@pytest.mark.slow
def test_the_memory_is_that_of_a_part():
  spent = {}
  for n in (1, 4):
    init, step = stepper("clip", n, 64)
    compiled = jax.jit(step).lower(jax.eval_shape(init), jax.eval_shape(
      functools.partial(batch_of, 64))).compile()
    spent[n] = compiled.memory_analysis().temp_size_in_bytes
  assert spent[4] < 0.5 * spent[1]
