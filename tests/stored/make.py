"""Writes the run directories of this folder, by another version of the code than today's.

Those here were made with Python 3.12 and jax 0.12.0.1 at commit 3892131, the last one before the
sources of data became a folder and the fields of a section one account:

  git worktree add /tmp/then 3892131
  python tests/stored/make.py /tmp/then [NAME...]

NAME.zip is a run after step 2 of 4 (`run/`); and, in `after.npz`, the arrays of the unbroken run
after step 4, with the answer of the run after step 2. NAME.json is what else that code did with it:
digests of the arrays that it loaded, its evaluation at step 2, and what the unbroken run logged in
steps 3 and 4. tests/test_stored_runs.py asks the same of today's code.
"""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SMALL = {  # the smoke recipes, narrower
  "mae": ("model.width=16", "model.mlp_dim=16", "model.depth=1", "model.decoder_depth=1"),
  "moco": ("model.widths=(8,16)", "model.dim=8", "model.projector_hidden=(16,)"),
  "clip": ("model.width=16", "model.mlp_dim=16", "model.depth=1", "model.text_width=16"),
  "diffusion": ("model.width=16", "model.mlp_dim=16", "model.depth=1"),
  "vit": ("model.width=16", "model.mlp_dim=16", "model.depth=1", "ema_decay=0.9"),
  "bert": ("model.width=16",),
  "caption": ("model.width=16", "model.mlp_dim=16", "model.depth=1", "model.text_width=16")}
STEPS = ("total_steps=4", "eval_every_steps=0", "log_every_steps=1", "checkpoint.every_steps=2",
         "checkpoint.keep=none")


def environment() -> dict:
  """What a run's last bits depend on, beside the code."""
  import jax
  import jaxlib
  cpu = Path("/proc/cpuinfo")
  lines = {line for line in (cpu.read_text().splitlines() if cpu.exists() else [])
           if line.startswith(("model name", "flags", "Features"))}
  return {"python": sys.version.split()[0], "jax": jax.__version__, "jaxlib": jaxlib.__version__,
          "numpy": np.__version__, "flags": sorted(set(os.environ.get("XLA_FLAGS", "").split())),
          "cpus": os.cpu_count(),
          "cpu": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()}


def arrays(run) -> dict[str, np.ndarray]:
  """{path: array} of all that a loaded run holds."""
  import jax
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in
          jax.tree_util.tree_leaves_with_path({"params": run.params, "extra": run.extra})}


def answer(name: str, run) -> np.ndarray:
  """What a loaded run says of fixed inputs."""
  if name == "diffusion":
    return run.predict("sample", {"label": np.arange(4)})
  if name == "bert":
    return run.predict("features", {"text": run.tokenize(["digit one, sans", "digit two, serif"])})
  pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
  return run.predict("features", {"image": run.preprocess(pixels)})


def digest(x: np.ndarray) -> str:
  return hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()


def curve(workdir) -> list[dict]:
  """metrics.jsonl without what depends on the clock."""
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in row.items() if k != "time" and "per_second" not in k} for row in rows]


def lighten(checkpoint: Path):
  """Takes away files that nothing refers to any more: three quarters of so small a checkpoint."""
  import orbax.checkpoint as ocp
  reader = ocp.StandardCheckpointer()
  for path in sorted(checkpoint.glob("*/ocdbt.process_*/d/*")):
    content = path.read_bytes()
    path.unlink()
    try:
      reader.restore(path.parents[2])
    except Exception:  # whatever the storage makes of a file that is not there
      path.write_bytes(content)


def make(name: str, folder: Path, commit: str):
  import evaluate
  import train
  from trainer import checkpoints
  flags = [f"--config=configs/{name}.py:smoke",
           *(f"--config.{text}" for text in STEPS + SMALL[name])]
  workdir = folder / name
  place = [f"--workdir={workdir}", f"--data_dir={folder / 'data'}"]
  assert train.main([*flags, *place]) == 0
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    assert evaluate.main([*place, "--step=2", "--json"]) == 0
  run = checkpoints.load_run(workdir, 2)
  facts = checkpoints.Checkpoints(workdir, read_only=True).manager.restore(2)["metadata"]
  then = {"commit": commit, "environment": environment(), "data": facts["data"], "flags": flags,
          "evaluated": json.loads(printed.getvalue().splitlines()[-1]),
          "continued": [row for row in curve(workdir) if row["step"] > 2],
          "loaded": {path: digest(x) for path, x in arrays(run).items()}}
  (HERE / f"{name}.json").write_text(json.dumps(then, indent=1) + "\n")
  after = io.BytesIO()
  np.savez(after, answer=answer(name, run), **arrays(checkpoints.load_run(workdir, 4)))
  lighten(workdir / "checkpoints" / "2")
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  with zipfile.ZipFile(HERE / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("after.npz", after.getvalue())
    file.writestr("run/metrics.jsonl", "".join(
      row + "\n" for row in rows if json.loads(row)["step"] <= 2))
    for path in [workdir / "config.json", *workdir.glob("tokenizer.json"),
                 *sorted((workdir / "checkpoints" / "2").rglob("*"))]:
      file.write(path, Path("run") / path.relative_to(workdir))


def main(tree: str, *names: str):
  sys.path.insert(0, str(HERE.parent))
  import conftest  # noqa: F401  devices and flags as the tests have them
  sys.path.insert(0, tree)
  os.chdir(tree)
  commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True,
                          check=True).stdout.strip()
  with tempfile.TemporaryDirectory() as folder:
    for name in names or SMALL:
      make(name, Path(folder), commit)


if __name__ == "__main__":
  main(*sys.argv[1:])
