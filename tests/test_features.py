"""Features of records: how each kind is read, and that all of an image move together."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiers import suite

from input_pipeline import geometry, moves, ready, viewing
from input_pipeline.augment import images
from input_pipeline.records import BadRecord, Feature, at_size

SIDE = 40
FEATURES = {"image": Feature((SIDE, SIDE, 1), "uint8", "image"),
            "mask": Feature((SIDE, SIDE), "int32", "mask", 2),
            "depth": Feature((SIDE, SIDE), "float32", "depth"),
            "frames": Feature((3, SIDE, SIDE, 1), "uint8", "frames"),
            "boxes": Feature((2, 4), "float32", "boxes"),
            "points": Feature((2, 2), "float32", "points")}
BOX = (12, 8, 24, 28)


def record():
  """A bright rectangle, and everything else that tells where it is."""
  mask = np.zeros((SIDE, SIDE), np.int32)
  mask[BOX[0]:BOX[2], BOX[1]:BOX[3]] = 1
  image = (200 * mask[..., None]).astype(np.uint8)
  return {"image": image, "mask": mask, "depth": 3.0 * mask, "frames": np.stack([image] * 3),
          "boxes": [BOX], "points": [(18.0, 18.0)], "name": "it"}


def agree(seen, tolerance):
  """All features of a moved record tell of the same rectangle."""
  mask = np.asarray(seen["mask"])
  bright = np.asarray(seen["image"])[..., 0] > 0.5 * np.asarray(seen["image"]).max()
  assert mask.any() and (bright != (mask == 1)).mean() < 0.06
  np.testing.assert_array_equal(np.asarray(seen["depth"]), 3.0 * mask)
  if "frames" in seen:
    assert (np.asarray(seen["frames"])[1, ..., 0] > 100).sum() == pytest.approx(mask.sum(), rel=0.2)
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  edges = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
  np.testing.assert_allclose(np.asarray(seen["boxes"])[0], edges, atol=tolerance)
  np.testing.assert_array_equal(np.asarray(seen["boxes"])[1], [-1] * 4)  # there is no second one
  y, x = np.asarray(seen["points"])[0]
  if min(y, x) >= 0:
    assert mask[min(int(y), len(mask) - 1), min(int(x), mask.shape[1] - 1)] == 1


@pytest.mark.parametrize("fields", [
  dict(crop_area=(0.4, 1.0)), dict(crop_padding=4), dict(train_crop="random"),
  dict(train_crop="squash")])
def test_the_cut_of_an_image_cuts_all(fields):
  view = geometry.view("augment", image_size=(32, 28), **fields)
  for seed in range(8):
    look = geometry.Look(functools.partial(
      geometry.for_training, view, np.random.default_rng(seed)), "bicubic")
    seen = viewing.read(record(), FEATURES, [look])
    assert {name: x.shape for name, x in seen.items()} == {
      name: at_size(feature, (32, 28)) for name, feature in FEATURES.items()}
    agree(seen, 1.6)


def test_two_looks_differ_and_each_is_whole():
  looks = [geometry.Look(functools.partial(
    geometry.for_training, geometry.view("augment", image_size=size, crop_area=(0.5, 0.9)),
    np.random.default_rng(size)), "bicubic") for size in (32, 20)]
  seen = viewing.read(record(), FEATURES, looks)
  assert seen["image"].shape == (32, 32, 1) and seen["image_2"].shape == (20, 20, 1)
  agree(seen, 1.6)
  agree({name.removesuffix("_2"): x for name, x in seen.items() if name.endswith("_2")}, 1.6)
  encoded = io.BytesIO()
  Image.fromarray(record()["image"][..., 0]).save(encoded, "png")  # the way of encoded images
  looks = [look._replace(cut=functools.partial(
    look.cut.func, look.cut.args[0], np.random.default_rng(size)))
    for look, size in zip(looks, (32, 20))]
  again = viewing.read(record() | {"image": encoded.getvalue()}, FEATURES, looks)
  for name in seen:
    np.testing.assert_array_equal(again[name], seen[name], err_msg=name)


def test_what_is_out_of_sight_is_no_more():
  look = geometry.Look(lambda h, w: geometry.Cut((30, 30, 10, 10), (20, 20)), "bicubic")
  seen = viewing.read(record(), FEATURES, [look])
  assert (seen["boxes"] == -1).all() and (seen["points"] == -1).all() and not seen["mask"].any()


@pytest.mark.parametrize("fields", suite([
  dict(flip=True), dict(affine=dict(degrees=25, translate=0.1)), dict(
    flip=True, affine=dict(scale=(0.7, 1.2), shear=10), color_jitter=(0.1, 0.1, 0, 0))], 0))
def test_augmentation_on_the_device_moves_all(fields):
  features = {name: x for name, x in FEATURES.items() if name != "frames"}
  augment = images.make(image_size=SIDE, mean=0.0, std=1.0, features=features, **fields)
  batch = {name: jnp.stack([jnp.asarray(x)] * 12) for name, x in viewing.read(
    record(), features).items()}
  out = jax.jit(augment.train)(jax.random.key(1), batch)
  plain = images.make(image_size=SIDE, mean=0.0, std=1.0, **fields).train(
    jax.random.key(1), {"image": batch["image"]})
  np.testing.assert_allclose(out["image"], plain["image"], atol=1e-5)  # the same draws
  turned = "degrees" in fields.get("affine", {}) or "shear" in fields.get("affine", {})
  for i in range(12):
    agree({name: x[i] for name, x in out.items()}, 3.0 if turned else 0.01)
  assert len({tuple(np.asarray(x)) for x in out["boxes"][:, 0]}) > 1  # they did move
  kept = augment.eval(batch)
  np.testing.assert_array_equal(kept["mask"], batch["mask"])


def test_frames_are_mirrored_and_moved_as_their_image():
  frames = jnp.asarray(record()["frames"])
  mirrored = moves.move(frames, "frames", (SIDE, SIDE), None, jnp.array(True))
  np.testing.assert_array_equal(mirrored, np.asarray(frames)[:, :, ::-1])
  shift = jnp.array([[1.0, 0, 3], [0, 1, 0], [0, 0, 1]])
  moved = moves.move(frames, "frames", (SIDE, SIDE), shift)
  np.testing.assert_array_equal(moved[:, :, :-3], np.asarray(frames)[:, :, 3:])


@pytest.mark.parametrize("field", ["mixup", "cutmix", "randaugment"])
def test_what_would_leave_a_mask_behind_is_refused(field):
  value = (2, 5) if field == "randaugment" else 0.5
  with pytest.raises(ValueError, match=f"augment.{field} = .*does not move mask"):
    images.make(image_size=8, features={"mask": FEATURES["mask"]}, **{field: value})


def test_values_are_read_from_files_and_bad_ones_named(tmp_path):
  mask = Image.fromarray(record()["mask"].astype(np.uint8))
  mask.putpalette([0, 0, 0, 255, 0, 0])
  mask.save(tmp_path / "mask.png")
  np.save(tmp_path / "depth.npy", 3.0 * record()["mask"])
  read = viewing.read(record() | {"mask": tmp_path / "mask.png", "depth": str(
    tmp_path / "depth.npy")}, FEATURES)
  whole = viewing.read(record(), FEATURES)
  for name in FEATURES:
    np.testing.assert_array_equal(read[name], whole[name])
  np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
  for wrong, message in (
      ({"mask": np.zeros((SIDE, 3))}, "the mask of it is .40, 3.*source says .40, 40"),
      ({"boxes": [BOX] * 3}, "3 rows, where the source says 2"),
      ({"depth": tmp_path / "pickled.npy"}, "cannot read the depth of it.*allow_pickle"),
      ({"mask": b"none"}, "cannot read the mask of it")):
    with pytest.raises(BadRecord, match=message):
      viewing.read(record() | wrong, FEATURES)
  with pytest.raises(BadRecord, match="it has no 'mask', which its source declares"):
    viewing.read({name: x for name, x in record().items() if name != "mask"}, FEATURES)
  free = {name: x._replace(shape=at_size(x, (None, None))) for name, x in FEATURES.items()}
  look = geometry.Look(lambda h, w: geometry.Cut((0, 0, h, w), (20, 20)), "bicubic")
  with pytest.raises(BadRecord, match="it: 20x20 pixels beside 40x40 of the same record"):
    viewing.read(record() | {"mask": np.zeros((20, 20))}, free, [look])


def test_records_become_batches_one_by_one_and_by_columns():
  view, one = geometry.view("augment", image_size=20), record()
  batch = ready.batch_of(one, FEATURES, view)
  assert {name: x.shape for name, x in batch.items()} == {
    name: (1, *at_size(x, (20, 20))) for name, x in FEATURES.items()}
  for given in ([one] * 3, {name: np.stack([x] * 3) for name, x in one.items()
                            if name in ("image", "mask")},
                {"image": [one["image"]] * 3, "mask": [one["mask"]] * 3}):
    several = ready.batch_of(given, FEATURES, view)
    for name, x in several.items():
      np.testing.assert_array_equal(x, np.concatenate([batch[name]] * 3))
  with pytest.raises(ValueError, match="how many differs: {'image': 2, 'mask': 1}"):
    ready.batch_of({"image": [one["image"]] * 2, "mask": [one["mask"]]}, FEATURES, view)
