"""Every notebook runs from top to bottom on a run of seconds, and shows pictures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiers import suite

FOLDER = Path(__file__).parent.parent / "notebooks"
RECIPES = {"classify": "vit", "reconstruct": "mae", "retrieve": "clip", "sample": "diffusion",
           "finetune": "mae"}


def test_every_notebook_is_tested():
  assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(RECIPES)
  for path in FOLDER.glob("*.ipynb"):  # as they are in the repository: without outputs
    assert not any(cell.get("outputs") for cell in nbformat.read(path, 4).cells), path


@pytest.mark.parametrize("name", suite(RECIPES, keys=("reconstruct",)))
def test_notebook_runs(name, smoke_run, data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("VITRINE_RUN", str(smoke_run(RECIPES[name])))
  monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
  monkeypatch.setenv("VITRINE_OUT", str(tmp_path / name))
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert any(output.output_type == "stream" and output.name == "stdout" for output in outputs)
