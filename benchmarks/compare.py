"""Times our training steps beside the same steps in PyTorch, in turn, in one run.

  python benchmarks/compare.py [--models=vit_s16,mae_b16] [--steps=10] [--batch=8] [--threads=1]
                               [--compile] [--python-peer=/path/to/python/with/torch]
                               [--against=benchmarks/RESULTS.md] [--config.any.field=value]

Each side is a process that is ready and asleep until it is its turn: a step of ours, a step of
theirs, ours, theirs. A ratio is of two neighbours, under 1 where ours is faster; the table has
their median and quartiles by the clock and by processor time. Shares are of the rate of a large
matrix product in the same dtype, measured by our side before it begins.

Both sides have the same shapes, parameters, AdamW and batch of bytes, which they normalise in the
step; augmentation is off and blocks are unrolled. Each runs as its users start it: ours computes
what it logs too (accuracy, the gradient's norm) and keeps its heap as train.py does, which would
give the peer 5-9% on a CPU (GLIBC_TUNABLES as in trainer/environment.py). `--threads` pins both to
as many cores (Linux). With `--against`, exits 1 and names the models that are worse than that
file's table of the same kind has them: see `worse`.
"""

import argparse
import difflib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import parse_overrides

ROOT = Path(__file__).resolve().parent.parent


class Pair(NamedTuple):
  """A row of the table: a recipe of ours, and what it is compared with."""

  config: str
  overrides: dict
  batch: dict  # "cpu", "gpu" -> examples; a device that is not here has to be asked for
  other: dict = {}  # overrides of ours that are the other side, in the place of PyTorch


VIT = {"augment.randaugment": None, "augment.mixup": 0.0, "augment.flip": False}
MAE = {"augment.flip": False}
MOCO = {"augment.color_jitter": None, "augment.grayscale": 0.0, "augment.blur": 0.0,
        "augment.flip": False, "augment.second_view.blur": 0.0,
        "augment.second_view.solarize": 0.0}
CLIP = {"data.tokenizer": "bpe", "data.vocab_size": 49_408, "method.chunk": 0}
DIT = {"data.latents": "mean"}
PAIRS = {
  "vit_s16": Pair("configs/vit.py:imagenet_s16_augreg", VIT, {"cpu": 8, "gpu": 256}),
  "vit_b16": Pair("configs/vit.py:imagenet_b16_augreg", VIT, {"cpu": 4, "gpu": 256}),
  "vit_l16": Pair("configs/vit.py:imagenet_l16_augreg", VIT, {"gpu": 128}),
  "mae_b16": Pair("configs/mae.py:imagenet_b16", MAE, {"cpu": 8, "gpu": 256}),
  "mae_l16": Pair("configs/mae.py:imagenet_l16", MAE, {"gpu": 256}),
  "moco_s16": Pair("configs/moco.py:imagenet_vit_s16_v3", MOCO, {"cpu": 8, "gpu": 128}),
  "clip_b32": Pair("configs/clip.py:vit_b32", CLIP, {"cpu": 8, "gpu": 512}),
  "dit_s4": Pair("configs/diffusion.py:imagenet_dit_b4", {**DIT, "model.variant": "S/4"},
                 {"cpu": 32, "gpu": 256}),
  "dit_xl2": Pair("configs/diffusion.py:imagenet_dit_xl2", DIT, {"gpu": 64}),
  # 2111.06377 table 2: an encoder that is fed with mask tokens too, here with all patches but one.
  "mae_l16_masks": Pair("configs/mae.py:imagenet_l16", MAE, {"gpu": 128},
                        {"method.mask_ratio": 1 / 196}),
}


# --- The two sides --------------------------------------------------------------------------------

class Side:
  """A process that takes steps; `facts` is what it said when it was ready."""

  def __init__(self, command: list[str], device: str, threads: int | None):
    def pin():
      os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    # Two share a GPU: ours does not take all of its memory.
    env = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if device == "cpu":
      env = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    self.command = command
    self.process = subprocess.Popen(
      command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      preexec_fn=pin if threads else None, env={**os.environ, **env})
    self.facts = self.answer()

  def answer(self) -> dict:
    for line in self.process.stdout:
      if line.startswith("{"):  # a library may print too
        return json.loads(line)
    raise SystemExit(f"exit status {self.process.wait()} of {' '.join(self.command)}")

  def steps(self, n: int = 1) -> dict:
    """Seconds a step, {"wall", "cpu"}."""
    print(n, file=self.process.stdin, flush=True)
    return self.answer()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.stdin.close()
    self.process.wait()


def ours(pair: Pair, batch: int, dtype: str, overrides: dict) -> list[str]:
  overrides = {"data.batch_size": batch, "dtype": dtype, "model.scan": False, **pair.overrides,
               **overrides}
  return [sys.executable, "benchmarks/train_step.py", f"--config={pair.config}", "--worker",
          *(f"--config.{name}={value}" for name, value in overrides.items())]


def theirs(args, name: str, batch: int) -> list[str]:
  return [args.python_peer, "benchmarks/peers/train_step.py", f"--model={name}",
          f"--batch={batch}", f"--dtype={args.dtype}",
          *([f"--threads={args.threads}"] if args.threads else []),
          *(["--compile"] if args.compile else [])]


def alternate(a, b, steps: int, warm_up: int = 3) -> list[tuple[dict, dict]]:
  """Times of single steps, a b a b, after some that do not count."""
  a.steps(warm_up), b.steps(warm_up)
  return [(a.steps(), b.steps()) for _ in range(steps)]


# --- The table ------------------------------------------------------------------------------------

COLUMNS = ("model", "batch", "parameters", "ours, ms", "of peak", "other, ms", "of peak", "ratio",
           "quartiles", "by processor time", "quartiles")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(name: str, batch: int, facts: dict, pairs: list[tuple[dict, dict]]) -> str:
  """A line of the table from our side's facts and the times of neighbouring steps."""
  milliseconds = [1e3 * statistics.median(side["wall"] for side in sides) for sides in zip(*pairs)]
  cells = [name, batch, f"{facts['parameters']:,}"]
  for ms in milliseconds:
    cells += [f"{ms:,.1f}", f"{facts['flops'] / ms * 1e3 / facts['peak']:.2f}"]
  for clock in ("wall", "cpu"):
    low, middle, high = statistics.quantiles(a[clock] / b[clock] for a, b in pairs)
    cells += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
  return f"| {' | '.join(map(str, cells))} |"


def kind(device: str, args) -> str:
  """What two tables must have in common for their ratios to be compared."""
  threads = f"{args.threads} thread{'s' * (args.threads > 1)}, " if args.threads else ""
  return f"{device}, {threads}{args.dtype}, PyTorch {'compiled' if args.compile else 'eager'}"


ROW = re.compile(r"\| (\w+) \| (\d+) \|.*\| ([\d.]+) \| ([\d.]+) to ([\d.]+) "
                 r"\| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|")


def read(text: str, wanted: str, clock: str) -> dict:
  """{(model, batch): (median, first, third quartile of its ratio)} of a table of the wanted kind.

  Raises ValueError where there is no such table.
  """
  tables = dict(re.findall(r"^\*\*(.+?)\*\*.*\n\n((?:\|.*\n?)+)", text, re.MULTILINE))
  if wanted not in tables:
    raise ValueError(f"no table of {wanted!r}; there: {', '.join(map(repr, tables)) or 'none'}")
  first = 2 if clock == "wall" else 5
  return {(cells[0], int(cells[1])): tuple(map(float, cells[first:first + 3]))
          for cells in ROW.findall(tables[wanted])}


def worse(now: dict, then: dict, by: float = 0.05) -> list[str]:
  """What got worse by more than `by`, beyond the spread: of two results of `read`, lines to print.

  The median must have grown by more, and the ranges between quartiles, of half a run's ratios,
  must lie apart: so a noisy machine flags less.
  """
  return [f"{name}, batch {batch}: ratio {middle:.3f}, was {was:.3f} (+{middle / was - 1:.0%})"
          for (name, batch), (middle, low, _) in now.items() if (name, batch) in then
          for was, _, high in [then[name, batch]] if middle > (1 + by) * was and low > high]


def cpu_name() -> str:
  info = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
  return found.group(1) if found else platform.processor() or platform.machine()


def default_device() -> str:
  return "gpu" if shutil.which("nvidia-smi") else "cpu"


def check(args) -> dict[str, int]:
  """Model -> batch. Raises ValueError with what a user has to change."""
  names = args.models.split(",") if args.models else [
    name for name, pair in PAIRS.items() if args.device in pair.batch]
  for name in names:
    if name not in PAIRS:
      close = difflib.get_close_matches(name, PAIRS, 1)
      raise ValueError(f"--models={name}: " + (f"did you mean {close[0]!r}?" if close else
                                               f"allowed: {', '.join(PAIRS)}"))
    if not args.batch and args.device not in PAIRS[name].batch:
      raise ValueError(f"--models={name}: on a {args.device} it needs --batch")
  if args.steps < 2:
    raise ValueError(f"--steps={args.steps}: expected at least 2")
  if args.threads and not hasattr(os, "sched_setaffinity"):
    raise ValueError("--threads: pins processes to cores, which only Linux can")
  if args.against and not Path(args.against).is_file():
    raise ValueError(f"--against={args.against}: no such file")
  if not all(PAIRS[name].other for name in names) and (
      not shutil.which(args.python_peer) or subprocess.run(
        [args.python_peer, "-c", "import torch"], capture_output=True).returncode):
    raise ValueError(f"--python-peer={args.python_peer}: no Python with torch (pip install torch)")
  return {name: args.batch or PAIRS[name].batch[args.device] for name in names}


def parse(argv: list[str] | None):
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", help="default: those that fit the device")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--batch", type=int)
  parser.add_argument("--threads", type=int)
  parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
  parser.add_argument("--device", choices=("cpu", "gpu"), default=default_device())
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as the device")
  parser.add_argument("--python-peer", default=sys.executable)
  parser.add_argument("--against")
  args, rest = parser.parse_known_args(argv)
  args.dtype = args.dtype or {"cpu": "float32", "gpu": "bfloat16"}[args.device]
  return args, parse_overrides(rest, parser)


def main(argv: list[str] | None = None) -> int:
  args, overrides = parse(argv)
  try:
    batches = check(args)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  text = ""

  def show(line):
    nonlocal text
    text += line + "\n"
    print(line, flush=True)

  for name, batch in batches.items():
    pair = PAIRS[name]
    command = ours(pair, batch, args.dtype, {**pair.other, **overrides}) if pair.other else theirs(
      args, name, batch)
    with Side(ours(pair, batch, args.dtype, overrides), args.device, args.threads) as a, Side(
        command, args.device, args.threads) as b:
      if a.facts["parameters"] != b.facts["parameters"]:
        raise SystemExit(f"{name}: {a.facts['parameters']:,} parameters here, "
                         f"{b.facts['parameters']:,} there")
      if not text:
        the_kind = kind(cpu_name() if args.device == "cpu" else a.facts["device"], args)
        show(f"**{the_kind}** ({a.facts['version']}, {b.facts['version']})\n\n{HEADER}")
      show(row(name, batch, a.facts, alternate(a, b, args.steps)))
  if not args.against:
    return 0
  clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
  try:
    then = read(Path(args.against).read_text(), the_kind, clock)
  except ValueError as error:
    print(f"error: --against={args.against}: {error}", file=sys.stderr)
    return 1
  lines = worse(read(text, the_kind, clock), then)
  print("\n".join(["", *lines]) if lines else "\nno model is worse", file=sys.stderr)
  return 1 if lines else 0


if __name__ == "__main__":
  sys.exit(main())
