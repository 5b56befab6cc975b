"""Inception as pytorch-fid computes it, from a file with its names, and files that are not that.

`tests/reference/inception` holds what pytorch-fid 0.3.0 gave with the weights below, whose names
and shapes are its own; of each block's output (b, c, h, w) at most 64 numbers, evenly spaced.
"""

import pickle
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import published
import pytest
from safetensors.numpy import load_file, save_file

from evaluators import generation
from models import inception


def weight(name, shape):
  """Random, of a generator whose numbers NumPy keeps for ever; no layer forgets the image."""
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  if name.endswith("running_var") or name.endswith("bn.weight"):
    w = rng.uniform(0.5, 1.5, shape)
  elif len(shape) > 1:
    w = rng.standard_normal(shape) * (2 / np.prod(shape[1:]))**0.5
  else:
    w = 0.1 * rng.standard_normal(shape)
  return np.asarray(w, np.float32)


@pytest.fixture(scope="module")
def recorded():
  return published.arrays("inception")


@pytest.fixture(scope="module")
def path(recorded, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
  named = zip(map(str, recorded["names"]), recorded["shapes"])
  save_file({name: weight(name, tuple(shape[shape > 0])) for name, shape in named}, path)
  yield str(path)
  path.unlink()  # 96 MB


@pytest.fixture(scope="module")
def variables(path):
  return inception.load(path)


@pytest.mark.slow
def test_every_block_as_pytorch_fid(variables, recorded):
  x = recorded["images"].astype(np.float32) / 255
  x = 2 * jax.image.resize(x, (2, 299, 299, 3), "linear", antialias=False) - 1
  names = {name for name in recorded if name.startswith(("Mixed", "Conv"))}
  out, captured = jax.jit(lambda x: inception.Inception().apply(
    variables, x, capture_intermediates=lambda module, _: module.name in names))(x)
  blocks = captured["intermediates"]
  assert set(blocks) == names and len(names) == 16
  outputs = {name: published.thinned(np.asarray(block["__call__"][0]).transpose(0, 3, 1, 2).ravel())
             for name, block in blocks.items()}
  outputs |= {"features": out["features"][:, ::2], "logits": out["logits"][:, ::16]}
  for name, actual in outputs.items():
    scale = np.abs(recorded[name]).max()
    np.testing.assert_allclose(actual, recorded[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_features_of_images_of_another_size_and_grey_ones(path, variables, recorded):
  large = np.random.RandomState(1).randint(0, 256, (2, 340, 310, 3)).astype(np.uint8)
  features = np.asarray(inception.features(variables, large))
  np.testing.assert_allclose(features[:, ::16], recorded["features_large"], atol=1e-4)
  context = SimpleNamespace(info=SimpleNamespace(image_shape=(340, 310, 1)))
  embed = generation.make_embed(context, f"inception:{path}", batch_size=2)
  grey = large[..., :1]
  expected = inception.features(variables, np.concatenate([grey] * 3, axis=-1))
  assert np.abs(expected - features).max() > 0.1
  np.testing.assert_array_equal(embed(grey[[0, 1, 0]]), np.asarray(expected)[[0, 1, 0]])
  context.info.image_shape = (340, 310, 4)
  with pytest.raises(ValueError, match="features = 'inception:.*: takes images of 1 or 3 channels"):
    generation.make_embed(context, f"inception:{path}")


@pytest.mark.parametrize("change, message", [
  (lambda w: w.pop("Mixed_7c.branch3x3_2b.conv.weight"),
   r"1 tensors differ.*\n.*Mixed_7c.branch3x3_2b.conv.weight \(384, 384, 3, 1\): missing"),
  (lambda w: w.update({"fc.weight": np.zeros((1000, 2048), np.float32)}),
   r"fc.weight \(1008, 2048\): \(1000, 2048\)"),
  (lambda w: w.update({"AuxLogits.fc.bias": np.zeros(2, np.float32)}),
   "AuxLogits.fc.bias: not of this network")], ids=["missing", "shape", "unexpected"])
def test_tensors_that_are_not_the_networks(path, change, message, monkeypatch):
  weights = dict(load_file(path))
  change(weights)
  monkeypatch.setattr(inception, "load_file", lambda path: weights)
  with pytest.raises(ValueError, match=message):
    inception.load(path)


def test_files_that_are_not_safetensors(tmp_path):
  with pytest.raises(FileNotFoundError, match="gone.safetensors: no such file"):
    inception.load(str(tmp_path / "gone.safetensors"))
  for name, message in (("a.pth", r"weights_only=True\), 'inception.safetensors'\)"),
                        ("a.safetensors", "a.safetensors is damaged")):
    (tmp_path / name).write_bytes(pickle.dumps({"fc.bias": np.zeros(2)}))
    with pytest.raises(ValueError, match=message):
      inception.load(str(tmp_path / name))
