"""BERT against recordings of Hugging Face's BertForMaskedLM, and its file in and out."""

import jax
import numpy as np
import published
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import convert
from methods import bert as method_module
from models import bert, masks
from trainer import checkpoints

FIELDS = dict(width=48, depth=2, heads=4, mlp_dim=96, segments=2, vocab_size=120, context=24,
              eos_id=102, pad_id=0, mask_id=103, starts=1)


@pytest.fixture(scope="module")
def recorded():
  """(arrays, weights, our parameters)."""
  weights = published.load("bert_mlm")
  return (published.arrays("bert_mlm"), weights,
          published.to_ours("bert/hf", weights, FIELDS)[0])


@pytest.mark.parametrize("padded, scan", [(True, False), (False, True)])
def test_logits(recorded, padded, scan):
  io, _, params = recorded
  model = bert.make(**FIELDS, scan=scan)
  mask = masks.padding(io["attention_mask"] > 0) if padded else None
  logits = jax.jit(model.apply)({"params": params}, io["input_ids"], io["token_type_ids"], mask)
  np.testing.assert_allclose(logits, io["logits" if padded else "logits_nomask"], atol=1e-5)
  some = np.array([[3, 0], [11, 5], [7, 7]])
  np.testing.assert_allclose(
    model.apply({"params": params}, io["input_ids"], io["token_type_ids"], mask, some),
    np.take_along_axis(np.asarray(logits), some[:, :, None], 1), atol=1e-5)


def test_hidden_states(recorded):
  """What is embedded, what a first block makes of it, and the last one."""
  io, _, params = recorded
  mask = masks.padding(io["attention_mask"] > 0)
  blocks = params["encoder"]["transformer"]["blocks"]
  for depth in (1, 2):
    first = {**params["encoder"], "transformer": {
      "blocks": jax.tree.map(lambda x, depth=depth: x[:depth], blocks)}}
    tower = bert.make(**{**FIELDS, "depth": depth}).encoder
    (_, out), inside = tower.apply({"params": first}, io["input_ids"], io["token_type_ids"], mask,
                                   capture_intermediates=lambda m, _: m.name == "embed_norm")
    np.testing.assert_allclose(inside["intermediates"]["embed_norm"]["__call__"][0],
                               io["hidden_0"], atol=1e-5)
    np.testing.assert_allclose(out["tokens"], io[f"hidden_{depth}"], atol=1e-5)


def test_loss_and_gradients(recorded):
  """Places of the labels as if drawn; the embeddings' gradient is the sum of both their uses."""
  io, _, params = recorded
  method = method_module.make(bert.make(**FIELDS))
  given = io["labels"] != -100
  places = np.argsort(~given, axis=1, kind="stable")[:, :given.sum(1).max()]
  chosen = np.take_along_axis(given, places, 1).astype(np.float32)
  batch = {"text": np.where(given, io["labels"], 0).astype(np.int32), "masked": io["input_ids"],
           "places": places, "weight": chosen * 3 / chosen.sum(), "segments": io["token_type_ids"],
           "mask": np.asarray(masks.padding(io["attention_mask"] > 0))}
  batch = method.draw(jax.random.key(0), batch)
  loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, (extra, metrics)), grads = loss(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io["loss"], rtol=1e-5)
  right = io["logits"].argmax(-1) == io["labels"]
  np.testing.assert_allclose(metrics["accuracy"], right[given].mean(), atol=1e-6)
  assert extra == {}
  recorded_grads = published.arrays("bert_mlm", "grads")
  assert len(recorded_grads) == 42
  published.assert_gradients("bert/hf", FIELDS, grads, recorded_grads)


def test_old_names_and_parts_of_other_tasks_come_back(recorded, tmp_path):
  """The files of the first models: gamma and beta, a pooler, the decoder written a second time."""
  _, weights, params = recorded
  old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"): x for name, x in weights.items()}
  old |= {"bert.pooler.dense.weight": np.ones((48, 48), np.float32),
          "cls.seq_relationship.bias": np.ones(2, np.float32),
          "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"]}
  save_file(old, tmp_path / "model.safetensors")
  flags = [f"--from={tmp_path / 'model.safetensors'}", f"--to={tmp_path / 'run'}"]
  assert convert.main([*flags, "--config.model.heads=4"]) == 0
  run = checkpoints.load_run(tmp_path / "run")
  ours, expected = flatten_dict(run.params), flatten_dict(params)
  assert set(ours) == set(expected)
  assert all(np.array_equal(ours[path], x) for path, x in expected.items())
  assert convert.main([f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}",
                       "--to_format=hf"]) == 0
  after = load_file(tmp_path / "out" / "model.safetensors")
  assert set(after) == set(old) and all(np.array_equal(after[name], x) for name, x in old.items())
  assert not (tmp_path / "out" / "preprocessor_config.json").exists()
