import functools
import json
import sys
import threading

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline import batches, geometry, reading, stand_in

N = 23


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`uniform`, PNGs of 8 x 6 whose every pixel is the example's number; `mixed`, JPEGs."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(N):
    for split in ("train", "test"):
      flat = root / "uniform" / split / f"c{i % 3}" / f"{i:02}.png"
      flat.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((8, 6, 3), i, np.uint8)).save(flat)
      mixed = root / "mixed" / split / f"c{i % 3}" / f"{i:02}.jpg"
      mixed.parent.mkdir(parents=True, exist_ok=True)
      small = rng.integers(0, 256, (4, 4, 3), np.uint8)
      Image.fromarray(small).resize((50 + i, 90 - i), Image.Resampling.BICUBIC).save(mixed)
  return root


def uniform(folders, **options):
  return batches.make(f"folder:{folders}/uniform", **{"batch_size": 5, **options})


def views(**fields):
  return geometry.views(fields)


def mixed(folders, **options):
  return batches.make(f"folder:{folders}/mixed", **{
    "batch_size": 5, "views": views(image_size=(16, 12), crop_area=(0.2, 1.0)), **options})


def numbers(batch):
  return batch["image"][:, 0, 0, 0].astype(int).tolist()


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_a_part_of_a_split_is_spread_over_it(folders, cache_bytes):
  """It was the first of it: of one class, where a split is sorted by class."""
  data = uniform(folders, cache_bytes=cache_bytes)
  found = {limit: [number for b in data.eval("test", 4, limit=limit)
                   for number, valid in zip(numbers(b), b["valid"]) if valid]
           for limit in (7, N, 99)}
  whole = [i for c in range(3) for i in range(N) if i % 3 == c]  # a folder's order is by class
  assert found[N] == found[99] == whole
  places = [whole.index(number) for number in found[7]]
  assert len(places) == 7 and places == sorted(set(places)) != [*range(7)]
  assert {number % 3 for number in found[7]} == {0, 1, 2}
  halves = [[b["image"] for b in data.eval("test", 4, rows, 7)] for rows in ([0, 1], [2, 3])]
  together = [b["image"] for b in data.eval("test", 4, limit=7)]
  np.testing.assert_array_equal([np.concatenate(pair) for pair in zip(*halves)], together)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_every_epoch_holds_every_example_once_in_its_own_order(folders, cache_bytes):
  data = uniform(folders, cache_bytes=cache_bytes)
  stream = sum((numbers(b) for b in data.train(0, N)), [])  # five epochs, across borders
  epochs = np.reshape(stream, (5, N))
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(N), (5, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 5
  assert stream != sum((numbers(b) for b in uniform(folders, seed=1).train(0, N)), [])
  assert stream[10:15] == numbers(next(data.train(2, 3)))


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_labels_belong_to_their_images(folders, cache_bytes):
  for batch in uniform(folders, cache_bytes=cache_bytes).train(0, 9):
    assert [i % 3 for i in numbers(batch)] == batch["label"].tolist()
    chex.assert_shape(batch["image"], (5, 8, 6, 3))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32


@pytest.mark.parametrize("make", [uniform, mixed])
@pytest.mark.parametrize("readers", [2, 4])
def test_readers_share_the_global_batch(folders, make, readers):
  data = make(folders, batch_size=8)
  whole = list(data.train(1, 7))
  for parts in ([slice(r * 8 // readers, (r + 1) * 8 // readers) for r in range(readers)],
                [np.arange(8)[r::readers] for r in range(readers)]):
    for rows in parts:
      for full, part in zip(whole, data.train(1, 7, rows), strict=True):
        chex.assert_trees_all_equal({k: v[rows] for k, v in full.items()}, part)


@pytest.mark.parametrize("make", [uniform, mixed])
def test_a_batch_does_not_depend_on_where_reading_began(folders, make):
  data = make(folders)
  whole = list(data.train(0, 12))
  for start in (1, 4, 11):
    chex.assert_trees_all_equal(whole[start:], list(data.train(start, 12)))
  assert list(data.train(3, 3)) == []
  assert len({batch["image"].tobytes() for batch in whole}) == 12


@pytest.mark.parametrize("make, shape", [(uniform, (8, 6, 3)), (mixed, (16, 12, 3))])
def test_spec_is_that_of_the_batches(folders, make, shape):
  data = make(folders)
  assert data.spec["image"].shape == (5, *shape)
  for key, value in next(data.train(0, 1)).items():
    assert data.spec[key] == jax.ShapeDtypeStruct(value.shape, value.dtype)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("readers", [1, 2])
def test_eval_reads_every_example_once_and_marks_padding(folders, cache_bytes, readers):
  data = uniform(folders, cache_bytes=cache_bytes)
  for split in (None, "train"):
    parts = [list(data.eval(split, 8, slice(r * 8 // readers, (r + 1) * 8 // readers)))
             for r in range(readers)]
    assert all(len(part) == 3 for part in parts)
    seen = [i for step in zip(*parts) for batch in step
            for i, valid in zip(numbers(batch), batch["valid"], strict=True) if valid]
    assert seen == sorted(range(N), key=lambda i: (i % 3, i))  # as the files sort
    chex.assert_shape(parts[0][-1]["image"], (8 // readers, 8, 6, 3))


def test_training_without_crop_area_is_the_centre(folders):
  data = mixed(folders, cache_bytes=0, views=views(image_size=(16, 12)))
  images = np.concatenate([b["image"] for b in data.train(0, 12)]).astype(float)
  centres = np.concatenate([b["image"][b["valid"]] for b in data.eval("train", 5)])
  # JPEGs of many sizes are decoded for training at a fraction of their size.
  errors = np.abs(images[:, None] - centres[None]).mean((2, 3, 4))
  assert errors.min(1).max() < 4 and {*errors.argmin(1)} == {*range(N)}


@pytest.mark.parametrize("options, match", [
  ({"batch_size": 0}, "data.batch_size=0"), ({"batch_size": 24}, "=24 is larger than the 23"),
  ({"batch_size": 2.0}, "data.batch_size=2.0"), ({"workers": -1}, "data.workers=-1"),
  ({"train_split": "trian"}, "data.train_split='trian'.*did you mean 'train'"),
  ({"eval_split": "tset"}, "data.eval_split='tset'.*did you mean 'test'"),
  ({"prefetch_batches": 0}, "data.prefetch_batches=0")])
def test_bad_fields_are_named(folders, options, match):
  with pytest.raises(ValueError, match=match):
    uniform(folders, **options)


def test_eval_names_an_unknown_split(folders):
  with pytest.raises(ValueError, match="split='tets'.*did you mean 'test'"):
    uniform(folders).eval("tets", 4)


def test_several_sizes_need_an_image_size(folders):
  with pytest.raises(ValueError, match="augment.image_size=None"):
    mixed(folders, views=views(crop_area=(0.2, 1.0)))


@pytest.mark.parametrize("options", [
  {"cache_bytes": 2**30}, {"cache_bytes": 0}, {"cache_bytes": 0, "workers": 1}])
def test_an_undecodable_file_is_named(tmp_path, options):
  for i in range(4):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(
      tmp_path / f"{i}.png")
  bad = tmp_path / "2.png"
  bad.write_bytes(bad.read_bytes()[:1500])  # the header is whole, the pixels are not
  data = batches.make(f"folder:{tmp_path}", batch_size=4, **options)
  with pytest.raises(ValueError, match="cannot decode the image .*2.png"):
    list(data.train(0, 1))


# Text --------------------------------------------------------------------------------------------


def caption(i, j):
  return f"number {i}, caption {j}"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
  """The images of `uniform` and `mixed`, image i of N with 1 + i % 3 captions."""
  root = tmp_path_factory.mktemp("captioned")
  rng = np.random.default_rng(0)
  for kind in ("uniform", "mixed"):
    for split in ("train", "test"):
      folder = root / kind / split
      folder.mkdir(parents=True)
      lines = []
      for i in range(N):
        shape = (8, 6, 3) if kind == "uniform" else (*rng.integers(20, 40, 2), 3)
        image = np.full(shape, i, np.uint8)
        if kind == "mixed":  # the first channel tells the number, the others a crop
          image[..., 1:] = rng.integers(0, 256, image[..., 1:].shape)
        Image.fromarray(image).save(folder / f"{i:02}.png")
        lines += [{"file_name": f"{i:02}.png", "text": caption(i, j)} for j in range(1 + i % 3)]
      (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return root


def paired(captioned, kind="uniform", **options):
  return batches.make(f"folder:{captioned}/{kind}", **{
    "batch_size": 5, "views": views(image_size=(8, 6)), "tokenizer": "bytes", "context": 24,
    **options})


def spelt(ids):
  """Byte tokens as a string: every id below 256 is its byte."""
  return bytes(i for i in ids.tolist() if i < 256).decode()


def drawn(data, start, stop):
  """(image, its caption) of each row, as numbers."""
  rows = [(i, spelt(ids)) for batch in data.train(start, stop)
          for i, ids in zip(numbers(batch), batch["text"], strict=True)]
  return [(i, *map(int, text.removeprefix("number ").split(", caption "))) for i, text in rows]


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"kind": "mixed"}])
def test_each_caption_of_an_image_is_drawn_as_often(captioned, options):
  epochs = 300 if not options else 12
  data = paired(captioned, **options)
  rows = drawn(data, 0, epochs * N // 5)
  assert all(i == named for i, named, _ in rows)
  drawings = {i: [j for k, _, j in rows if k == i] for i in range(N)}
  for i, chosen in drawings.items():
    counts = np.bincount(chosen, minlength=3)
    assert counts[1 + i % 3:].sum() == 0
    if epochs == 300:  # within five standard deviations
      np.testing.assert_allclose(counts[:1 + i % 3], epochs / (1 + i % 3), atol=5 * 9)
      if i % 3:  # and not in turn: the next is the same as often as chance has it
        again = np.mean(np.array(chosen[1:]) == chosen[:-1])
        assert abs(again - 1 / (1 + i % 3)) < 0.15
  assert rows != drawn(paired(captioned, seed=1, **options), 0, epochs * N // 5)


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
def test_text_follows_from_seed_and_position(captioned, kind):
  data = paired(captioned, kind, batch_size=8)
  whole = list(data.train(0, 9))
  assert len({batch["text"].tobytes() for batch in whole}) == 9
  chex.assert_trees_all_equal(whole[3:], list(data.train(3, 9)))
  for readers in (2, 4):
    for rows in (np.arange(8)[r::readers] for r in range(readers)):
      for full, part in zip(whole, data.train(0, 9, rows), strict=True):
        chex.assert_trees_all_equal({k: v[rows] for k, v in full.items()}, part)
  if kind == "uniform":
    chex.assert_trees_all_equal(whole, list(paired(captioned, batch_size=8, cache_bytes=0).train(
      0, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(captioned, workers):
  make = functools.partial(paired, captioned, "mixed",
                           views=views(crop_area=(0.2, 1.0), image_size=(16, 12)))
  chex.assert_trees_all_equal(list(make().train(3, 9)), list(make(workers=workers).train(3, 9)))


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"kind": "mixed", "workers": 1}])
def test_evaluation_has_all_captions(captioned, options):
  data = paired(captioned, **options)
  assert data.spec["text"] == jax.ShapeDtypeStruct((5, 24), np.int32)
  seen = 0
  for batch in data.eval("test", 4):
    chex.assert_shape([batch["text"], batch["captions"], batch["num_captions"]],
                      [(4, 24), (4, 3, 24), (4,)])
    assert {batch[k].dtype for k in ("text", "captions", "num_captions")} == {np.dtype(np.int32)}
    for i, text, ids, count in zip(*(batch[k][batch["valid"]] for k in (
        "image", "text", "captions", "num_captions")), strict=True):
      i, seen = int(i[0, 0, 0]), seen + 1
      assert count == 1 + i % 3
      np.testing.assert_array_equal(text, ids[0])
      assert [spelt(row) for row in ids] == [
        caption(i, j) if j < count else "" for j in range(3)]
      assert (ids[count:] == data.tokenizer.pad_id).all()
  assert seen == N


def test_without_a_tokenizer_there_is_no_text(captioned):
  for options in ({}, {"cache_bytes": 0}):
    data = paired(captioned, tokenizer=None, **options)
    assert data.tokenizer is None and set(data.spec) == set(next(data.train(0, 1))) == {"image"}
    assert set(next(data.eval())) == {"image", "valid"}


def test_bpe_is_trained_on_the_training_captions(captioned, tmp_path):
  data = paired(captioned, tokenizer="bpe", vocab_size=300)
  batch = next(data.train(0, 1))
  assert [data.tokenizer.decode(ids).split(",")[0] for ids in batch["text"]] == [
    f"number {i}" for i in numbers(batch)]
  assert data.tokenizer.vocab_size == 300 and (batch["text"] == 297).sum(1).min() > 12  # is short
  path = tmp_path / "tokenizer.json"
  path.write_text(data.tokenizer.to_json())
  chex.assert_trees_all_equal(batch, next(paired(captioned, tokenizer=str(path)).train(0, 1)))
  planned = stand_in.stand_in("tfds:some", 5, (8, 6), 3, 0, tokenizer="bpe", context=24,
                             vocab_size=300)
  assert planned.spec == data.spec and planned.tokenizer[1:] == data.tokenizer[1:]


@pytest.mark.parametrize("field, value", [("tokenizer", "bytes"), ("favour", "a")])
def test_a_source_without_captions_is_named(folders, field, value):
  with pytest.raises(ValueError, match=f"data.{field}='{value}' needs captions, but split 'train' "
                                       "of 'folder:.*uniform' has image and label only"):
    uniform(folders, **{field: value})


def test_permuted_text_is_always_that_of_the_same_other_image(captioned):
  data = paired(captioned, permute_text=True)
  partner = {}
  for i, named, j in drawn(data, 0, 5 * N):
    assert i != named and j <= named % 3 and partner.setdefault(i, named) == named
  assert sorted(partner.values()) == list(range(N))
  other = paired(captioned, permute_text=True, seed=1)
  assert partner != {i: named for i, named, _ in drawn(other, 0, N)}
  chex.assert_trees_all_equal(list(data.train(0, 9)), list(
    paired(captioned, permute_text=True, cache_bytes=0).train(0, 9)))
  chex.assert_trees_all_equal(list(data.eval()), list(paired(captioned).eval()))


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"tokenizer": None}])
def test_favourites_have_their_share(captioned, options):
  options = {"favour": r"number [2-5],|number 1\d, caption 9", "favour_share": 0.4, **options}
  data = paired(captioned, **options)
  whole = [numbers(batch) for batch in data.train(0, 5 * N)]
  chosen = np.array(whole).reshape(-1)
  position = np.arange(len(chosen))
  favoured = np.floor(0.4 * (position + 1)) > np.floor(0.4 * position)
  assert favoured.reshape(-1, 5).sum(1).tolist() == [2] * (5 * N)
  counts = np.bincount(chosen[favoured], minlength=N)
  assert counts.sum() == counts[2:6].sum()
  np.testing.assert_allclose(counts[2:6], len(chosen) * 0.1, atol=1)
  rest = chosen[~favoured]
  for epoch in range(len(rest) // N):
    assert sorted(rest[epoch * N:][:N]) == list(range(N))
  assert [numbers(batch) for batch in data.train(7, 5 * N)] == whole[7:]


@pytest.mark.parametrize("options, match", [
  ({"favour": "("}, r"data.favour='\(' is not a regular expression"),
  ({"favour": "caption"}, "data.favour='caption' matches no caption from its start"),
  ({"favour": "number", "favour_share": 1.0}, "data.favour_share=1.0"),
  ({"tokenizer": "bites"}, "data.tokenizer='bites'.*did you mean 'bytes'"),
  ({"context": 2}, "data.context=2")])
def test_bad_text_fields_are_named(captioned, options, match):
  with pytest.raises(ValueError, match=match):
    paired(captioned, **options)


# Bad records -------------------------------------------------------------------------------------


@pytest.fixture
def damaged(captioned, tmp_path):
  """`uniform` with image 3 cut short, 4 no image at all and 22, the last, cut short."""
  for split in ("train", "test"):
    (tmp_path / split).mkdir()
    for file in (captioned / "uniform" / split).iterdir():
      data = file.read_bytes()
      cut = {"03.png": len(data) - 30, "04.png": 5, "22.png": len(data) - 30}.get(file.name)
      (tmp_path / split / file.name).write_bytes(data[:cut])
  return tmp_path


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"cache_bytes": 0, "workers": 1}])
def test_bad_records_are_skipped_and_counted(captioned, damaged, options, caplog):
  make = functools.partial(
    batches.make, batch_size=5, tokenizer="bytes", context=24,
    views=views(image_size=(8, 6)))
  data = make(f"folder:{damaged}", on_error="skip", **options)
  sound = make(f"folder:{captioned}/uniform")
  stands_in = {3: 5, 4: 5, 22: 0}  # the next that is good, around the end
  for batch, whole in zip(data.train(0, N), sound.train(0, N), strict=True):
    assert numbers(batch) == [stands_in.get(i, i) for i in numbers(whole)]
    for i, ids, expected in zip(numbers(whole), batch["text"], whole["text"], strict=True):
      if i in stands_in:
        assert spelt(ids).startswith(f"number {stands_in[i]},")
      else:
        np.testing.assert_array_equal(ids, expected)
    assert set(batch) == {"image", "text"}
  last = caplog.messages[-1]
  assert "passed over 3 of the 23 records of split 'train' (undecodable image 3)" in last
  assert "train/metadata.jsonl, line" in last and len(caplog.messages) == 1 + bool(options)
  if "workers" in options:
    return
  for batch, whole in zip(data.eval(None, 8), sound.eval(None, 8), strict=True):
    good = ~np.isin(numbers(whole), [*stands_in]) & whole["valid"]
    np.testing.assert_array_equal(batch["valid"], good)
    chex.assert_trees_all_equal(*({k: v[good] for k, v in b.items()} for b in (batch, whole)))
  said = len(caplog.messages)
  assert "of split 'test'" in caplog.messages[-1]
  assert len(list(data.eval(None, 8))) == 3 and len(caplog.messages) == said  # once


def test_bad_records_are_an_error_by_default(damaged):
  with pytest.raises(ValueError, match="cannot decode the image .*jsonl, line 8, row 8: 04.png"):
    batches.make(f"folder:{damaged}", batch_size=5)
  (damaged / "train/04.png").write_bytes((damaged / "train/05.png").read_bytes())
  (damaged / "test/04.png").write_bytes((damaged / "train/05.png").read_bytes())
  for options in ({}, {"cache_bytes": 0}):
    with pytest.raises(ValueError, match="cannot decode the image .*: (03|22).png"):
      list(batches.make(f"folder:{damaged}", batch_size=5, **options).train(0, 5))


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_when_all_records_are_bad_it_is_an_error(damaged, cache_bytes):
  data = batches.make(f"folder:{damaged}", batch_size=5, on_error="skip", cache_bytes=cache_bytes,
                      views=views(image_size=(8, 6)))
  for path in (damaged / "train").glob("*.png"):
    path.write_bytes(b"")
  with pytest.raises(ValueError, match="no record of the split can be read: cannot decode"):
    list(data.train(0, 1))


def test_glyphs_from_memory_are_glyphs_from_disk(tmp_path):
  make = functools.partial(batches.make, "glyphs/digits_16", data_dir=str(tmp_path), batch_size=50)
  cached, streamed = make(), make(cache_bytes=0)
  assert cached.info.image_shape == (16, 16, 1) and cached.info.num_classes == 10
  chex.assert_trees_all_equal(list(cached.train(7, 10)), list(streamed.train(7, 10)))
  chex.assert_trees_all_equal(list(cached.eval()), list(streamed.eval()))
  assert sum(b["valid"].sum() for b in cached.eval("test", 64)) == 100
  assert "tensorflow" not in sys.modules


def test_prefetch_runs_ahead_passes_errors_on_and_ends():
  made = []

  def items():
    for i in range(6):
      made.append(i)
      yield i
    raise KeyError("at the end")

  before = threading.active_count()
  stream = reading.prefetch(items(), 2)
  assert next(stream) == 0
  stream.close()  # waits for what was under way
  assert made == [0, 1, 2]
  seen = []
  with pytest.raises(KeyError, match="at the end"):
    for item in reading.prefetch(items(), 3):
      seen.append(item)
  assert seen == list(range(6))
  assert threading.active_count() == before


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_texts_alone_carry_no_pixels(tmp_path, cache_bytes):
  (tmp_path / "lines.txt").write_text("\n".join(f"text {i}" for i in range(60)))
  data = batches.make(f"lines:{tmp_path / 'lines.txt'}", batch_size=4, held_out=0.3,
                      tokenizer="bytes", context=8, cache_bytes=cache_bytes)
  assert next(data.train(0, 1)).keys() == {"text"} == data.spec.keys()
  assert next(data.eval()).keys() == {"text", "captions", "num_captions", "valid"}
  assert next(data.train(0, 1))["text"].shape == data.spec["text"].shape == (4, 8)
