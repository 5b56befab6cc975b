"""Run directories that older code wrote: today's loads, evaluates and continues them.

What it gives is held against what the older code gave (tests/stored/make.py): to the bit where the
machine and the versions are those that the runs were made with, closely elsewhere.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from stored import make
from tiers import suite

import evaluate
import train
from input_pipeline import batches
from trainer import checkpoints

STORED = Path(make.__file__).parent
NAMES = sorted(path.stem for path in STORED.glob("*.zip"))
# Shares of a hundred test examples, or of a few texts, elsewhere: so many may change sides.
SHARES = ("top1", "top5", "r1", "r5", "r10", "recognised", "held_out", "accuracy", "exact", "f1",
          "bleu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """(data_dir, fingerprint) of the embedded digits as this machine draws them."""
  folder = str(tmp_path_factory.mktemp("data"))
  made = batches.make("glyphs/digits_16", data_dir=folder, batch_size=16)
  return folder, made.info.fingerprint


@pytest.fixture(params=suite(NAMES, keys=("mae",)))
def stored(request, tmp_path):
  """(name, a copy of the run directory, what the older code did with it, its arrays)."""
  with zipfile.ZipFile(STORED / f"{request.param}.zip") as file:
    file.extractall(tmp_path)
  with np.load(tmp_path / "after.npz") as file:
    after = dict(file)
  then = json.loads((STORED / f"{request.param}.json").read_text())
  return request.param, tmp_path / "run", then, after


def skip_with_other_data(data, then):
  if data[1] != then["data"]:
    pytest.skip(f"the glyphs drawn here are others (fingerprint {data[1]}) than those that the run "
                f"was trained on ({then['data']}): FreeType, matplotlib or Unicode differs")


def same_numbers(now: dict, was: dict, exact: bool):
  if exact:
    assert now == was
    return
  assert set(now) == set(was)
  for name, value in was.items():
    shares = name.rpartition("/")[2] in SHARES
    assert now[name] == pytest.approx(value, rel=1e-4, abs=0.05 if shares else 1e-6), name


def same_array(now, was, exact: bool, name: str, atol: float):
  assert now.shape == was.shape and now.dtype == was.dtype, name
  if exact:
    np.testing.assert_array_equal(now, was, err_msg=name)
  else:
    np.testing.assert_allclose(now, was, rtol=1e-4, atol=atol, err_msg=name)


def is_same_place(then) -> bool:
  return make.environment() == then["environment"]


def test_every_family_is_there():
  assert NAMES == sorted(make.SMALL)


def test_loads(stored):
  """To the bit on any machine; what the network makes of the arrays, closely."""
  name, workdir, then, after = stored
  run = checkpoints.load_run(workdir)
  assert run.step == 2
  assert {path: make.digest(x) for path, x in make.arrays(run).items()} == then["loaded"]
  same_array(make.answer(name, run), after["answer"], is_same_place(then), "answer", atol=1e-5)


def test_evaluates(stored, data, capsys):
  _, workdir, then, _ = stored
  skip_with_other_data(data, then)
  assert evaluate.main([f"--workdir={workdir}", f"--data_dir={data[0]}", "--json"]) == 0
  now = json.loads(capsys.readouterr().out.splitlines()[-1])
  same_numbers(now, then["evaluated"], is_same_place(then))


def test_continues(stored, data, capsys):
  _, workdir, then, after = stored
  skip_with_other_data(data, then)
  before = make.curve(workdir)
  assert before[-1]["step"] == 2
  command = [*then["flags"], f"--workdir={workdir}", f"--data_dir={data[0]}"]
  assert train.main(command) == 0
  assert "continuing from step 2" in capsys.readouterr().out
  rows, exact = make.curve(workdir), is_same_place(then)
  assert rows[:len(before)] == before
  assert len(rows) == len(before) + len(then["continued"])
  for now, was in zip(rows[len(before):], then["continued"]):
    same_numbers(now, was, exact)
  run = checkpoints.load_run(workdir)
  assert run.step == 4
  now = make.arrays(run)
  assert set(now) == set(after) - {"answer"}
  for path, x in now.items():
    was = after[path]
    if "qkv_bias" in path and not exact:
      # No softmax sees a bias of keys: its gradient is rounding, of which Adam makes whole steps.
      x, was = np.delete(x, 1, axis=-3), np.delete(was, 1, axis=-3)
    same_array(x, was, exact, path, atol=1e-5)
