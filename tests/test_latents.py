"""Stored latents: read from files and TFDS sets, drawn on the device, trained on by the command."""

import json
import re

import jax
import numpy as np
import pytest

import train
from input_pipeline import batches, latents
from input_pipeline.augment import latents as augment_latents
from input_pipeline.records import BadRecord
from input_pipeline.sources import open_source
from trainer import checkpoints


def moments(n=24, size=4, channels=2, seed=0):
  """(mean, log variance), each [n, h, w, c]."""
  rng = np.random.default_rng(seed)
  return rng.normal(3, 2, (n, size, size, channels)), rng.normal(-1, 1, (n, size, size, channels))


def write(root, mean, log_variance, classes=("cat", "dog")):
  """As PyTorch code stores them, channels first: .npy, .npz, with and without a leading axis."""
  for i, stored in enumerate(np.concatenate([mean, log_variance], -1).transpose(0, 3, 1, 2)):
    folder = root / classes[i % len(classes)]
    folder.mkdir(parents=True, exist_ok=True)
    stored = stored.astype(np.float32)
    if i % 3 == 0:
      np.savez(folder / f"{i:02}.npz", moments=stored, moments_flip=stored[..., ::-1])
    else:
      np.save(folder / f"{i:02}.npy", stored[None] if i % 3 == 1 else stored)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("latents")
  write(root, *moments())
  return root


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_moments_of_a_folder_are_means_and_deviations(folder, cache_bytes):
  data = batches.make(f"folder:{folder}", batch_size=8, latents="moments", cache_bytes=cache_bytes)
  assert data.info.image_shape == (4, 4, 2) and data.info.num_classes == 2
  mean, log_variance = moments()
  order = [*range(0, 24, 2), *range(1, 24, 2)]                               # cats, then dogs
  expected = np.concatenate([mean, np.sqrt(np.exp(log_variance))], -1)[order]
  rows = np.concatenate([batch["image"] for batch in data.eval("train", 8)])
  np.testing.assert_allclose(rows, expected, rtol=1e-6)
  batch = next(data.train(0, 1))
  assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
    key: (x.shape, x.dtype) for key, x in data.spec.items()}


def test_layouts_and_shapes():
  mean, log_variance = (x[0] for x in moments(channels=3))
  deviation = np.exp(log_variance / 2)
  for layout, second in (("mean_std", deviation), ("moments", log_variance)):
    stored = {"image": np.concatenate([mean, second], -1), "name": "it"}
    for order in (0, 1, 2), (2, 0, 1):
      turned = stored | {"image": stored["image"].transpose(order)}
      np.testing.assert_allclose(latents.read_latent(turned, layout),
                                 np.concatenate([mean, deviation], -1), rtol=1e-6)
  np.testing.assert_allclose(latents.read_latent({"image": mean[None], "name": "it"}, "mean"), mean,
                             rtol=1e-6)


def test_latents_are_drawn_anew_and_scaled():
  mean, log_variance = (x[:4].astype(np.float32) for x in moments(size=32))
  deviation = np.exp(log_variance / 2)
  batch = {"image": np.concatenate([mean, deviation], -1), "label": np.arange(4)}
  augment = augment_latents.make(image_size=32, latents="moments", scale=0.5, shift=3.0)
  np.testing.assert_allclose(augment.eval(batch)["image"], (mean - 3) * 0.5, rtol=1e-6)
  drawn = [np.asarray(augment.train(jax.random.key(i), batch)["image"]) for i in range(2)]
  z = [((x / 0.5 + 3) - mean) / deviation for x in drawn]
  assert np.abs(z[0] - z[1]).mean() > 0.5
  np.testing.assert_allclose([np.mean(z), np.std(z)], [0, 1], atol=0.03)


def test_a_bad_first_latent_is_skipped_where_the_config_says_so(tmp_path):
  write(tmp_path, *moments(n=8))
  (tmp_path / "cat" / "00.npz").write_bytes(b"no array")
  source = f"folder:{tmp_path}"
  with pytest.raises(BadRecord, match="cannot read the latent"):
    open_source(source, latents="moments")
  found = open_source(source, latents="moments", on_error="skip")
  assert found.info.features["image"].shape == (4, 4, 2)


@pytest.mark.slow
def test_a_diffusion_run_on_latents(folder, tmp_path):
  """From files to a checkpoint, figures and samples, streamed and with latents as classes' rows."""
  workdir = tmp_path / "run"
  flags = [f"--config.data.source=folder:{folder}", "--config.data.latents=moments",
           "--config.data.batch_size=8", "--config.augment.affine=none", "--config.model.patch=2",
           "--config.augment.scale=0.5", "--config.augment.shift=3.0",
           "--config.evals.samples.count=8", "--config.total_steps=3"]
  assert train.main(["--config=configs/diffusion.py:smoke", f"--workdir={workdir}", *flags]) == 0
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["channels"] == 2 and config["model"]["num_classes"] == 2
  assert (workdir / "figures" / "sample_step00000003.png").exists()
  run = checkpoints.load_run(workdir)
  assert run.predict("sample", {"label": np.arange(2)}).shape == (2, 4, 4, 2)


@pytest.mark.parametrize("break_it,flags,message", [
  (lambda root: np.save(root / "cat" / "00.npy", np.zeros((4, 4, 4, 4))), [], "00.npy.*reshape"),
  (lambda root: np.save(root / "cat" / "00.npy", np.full((4, 4, 4), np.nan)), [], "finite"),
  (lambda root: np.save(root / "cat" / "00.npy", np.array([{}])), [], "00.npy.*allow_pickle"),
  (lambda root: (root / "cat" / "00.npy").write_bytes(b"no array"), [], "cannot read the latent"),
  (lambda root: np.save(root / "cat" / "00.npy", np.zeros((3, 4, 4))), [], "even number"),
  (lambda root: None, ["--config.augment.image_size=8"], "not cropped or resized"),
  (lambda root: None, ["--config.augment.flip=true"], "config.augment.flip: unknown field"),
  (lambda root: None, ["--config.augment.scale=0"], "augment.scale = 0"),
  (lambda root: None, ["--config.data.latents=moment"], "did you mean 'moments'"),
])
def test_bad_latents_are_named(tmp_path, capsys, break_it, flags, message):
  root = tmp_path / "data"
  write(root, *moments(n=8))
  (root / "cat" / "00.npz").unlink()
  np.save(root / "cat" / "00.npy", np.zeros((4, 4, 4), np.float32))
  break_it(root)
  workdir = tmp_path / "run"
  code = train.main(["--config=configs/diffusion.py:smoke", f"--workdir={workdir}",
                     f"--config.data.source=folder:{root}", "--config.data.latents=moments",
                     "--config.data.batch_size=8", "--config.augment.affine=none",
                     "--config.model.patch=2", *flags])
  assert code == 1 and re.search(message, capsys.readouterr().err, re.DOTALL)
  assert not (workdir / "checkpoints").exists()
