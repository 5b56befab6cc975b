"""Every notebook runs from top to bottom on a run of seconds, and shows pictures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import train

FOLDER = Path(__file__).parent.parent / "notebooks"
RECIPES = {"classify": "vit", "reconstruct": "mae", "retrieve": "clip", "sample": "diffusion",
           "finetune": "mae"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """recipe -> a run directory, trained on first use."""
  root = tmp_path_factory.mktemp("runs")

  def get(name):
    if not (root / name).exists():
      assert train.main([f"--config=configs/{name}.py:smoke", f"--workdir={root / name}",
                         f"--data_dir={root / 'data'}"]) == 0
    return root / name
  get.root = root
  return get


def test_every_notebook_is_tested():
  assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(RECIPES)
  for path in FOLDER.glob("*.ipynb"):  # as they are in the repository: without outputs
    assert not any(cell.get("outputs") for cell in nbformat.read(path, 4).cells), path


@pytest.mark.parametrize("name", RECIPES)
def test_notebook_runs(name, runs, monkeypatch):
  monkeypatch.setenv("VITRINE_RUN", str(runs(RECIPES[name])))
  monkeypatch.setenv("TFDS_DATA_DIR", str(runs.root / "data"))
  monkeypatch.setenv("VITRINE_OUT", str(runs.root / name))
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert any(output.output_type == "stream" and output.name == "stdout" for output in outputs)
