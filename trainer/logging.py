"""What a run writes and shows: metrics.jsonl, TensorBoard, W&B, one live line, closing tables."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

COLUMNS = ("trained", "untrained", "pixels")  # of a table of evaluations


def read_metrics(workdir) -> list[dict]:
  """The objects of metrics.jsonl."""
  return read_lines(Path(workdir) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
  """The objects of a file, one a line; a last line cut short by a kill is left out."""
  rows = []
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  for line in text.splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class Reporter:
  """Writes on one process, is silent on the others. Owns the files and the live line."""

  def __init__(self, workdir, *, start: int, total: int, batch_size: int, writes: bool = True,
               wandb: bool = False, config: Mapping | None = None):
    self.total, self.batch_size, self.writes = total, batch_size, writes
    self.console = Console(quiet=not writes, highlight=False, soft_wrap=True)
    self.live = self.jsonl = self.tensorboard = self.wandb = None
    self.last_eval, self.clock, self.clock_step = "", time.monotonic(), start
    self.evaluations = {}  # step -> metrics
    if not writes:
      return
    workdir = Path(workdir)
    from tensorboardX import SummaryWriter
    self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
    if wandb:
      import wandb as weights_and_biases
      self.wandb = weights_and_biases.init(config=dict(config), dir=str(workdir), resume="allow",
                                           project="vitrine", name=workdir.name)
    # A continued run repeats the steps after its checkpoint: their earlier lines go.
    kept = [row for row in read_metrics(workdir) if row["step"] <= start]
    self.evaluations = {row["step"]: {name.removeprefix("eval/"): value for name, value
                                      in row.items() if name.startswith("eval/")}
                        for row in kept if any(name.startswith("eval/") for name in row)}
    path = workdir / "metrics.jsonl"
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)
    self.jsonl = path.open("a", buffering=1, encoding="utf-8")
    if self.console.is_terminal:
      self.live = Live(console=self.console, refresh_per_second=4, transient=True)
      self.live.start()

  def print(self, message: str = "", **kwargs):
    self.console.print(message, **kwargs)

  def facts(self, rows: Mapping[str, str]):
    width = max(map(len, rows))
    for name, value in rows.items():
      self.print(f"{name:>{width}}  {value}", markup=False)

  def table(self, title: str, columns: Sequence[str], rows):
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
      table.add_row(*row)
    self.print(table)

  def write(self, step: int, metrics: Mapping[str, float]):
    """Appends one object to metrics.jsonl, and the same to TensorBoard and W&B."""
    if not self.writes:
      return
    row = {"step": step, "time": time.time(), **{k: float(v) for k, v in metrics.items()}}
    try:
      self.jsonl.write(json.dumps(row) + "\n")
    except OSError as error:  # of an open file it does not say which
      raise OSError(error.errno, error.strerror, self.jsonl.name) from error
    for name, value in metrics.items():
      if math.isfinite(value):
        self.tensorboard.add_scalar(name, float(value), step)
    if self.wandb:
      self.wandb.log(dict(metrics), step=step)

  def restart_clock(self, step: int):
    """Leaves out of the rate what was not training (compilation, evaluation)."""
    self.clock, self.clock_step = time.monotonic(), step

  def train(self, step: int, metrics: Mapping[str, float]):
    """A log step: files, then the live line."""
    elapsed, steps = time.monotonic() - self.clock, step - self.clock_step
    self.restart_clock(step)
    rate = steps / elapsed if steps > 0 and elapsed > 0 else float("nan")
    extra = {"train/examples_per_second": rate * self.batch_size} if rate == rate else {}
    self.write(step, {**metrics, **extra})
    left = duration((self.total - step) / rate) if rate == rate else "?"
    line = (f"step {step}/{self.total}  loss {metrics['train/loss']:.4f}  "
            f"{rate * self.batch_size:,.0f} images/s  {left} left" + self.last_eval)
    if self.live:
      self.live.update(Text(line))
    else:
      self.print(line, markup=False)

  def evaluation(self, step: int, metrics: Mapping[str, float]):
    self.evaluations[step] = metrics
    self.write(step, {f"eval/{name}": value for name, value in metrics.items()})
    heads = [f"{name} {value:.3f}" for name, value in metrics.items() if name.endswith("/top1")
             and name.count("/") == 1]
    self.last_eval = f"  [step {step}: {', '.join(heads)}]" if heads else ""

  def close(self):
    if self.live:
      self.live.stop()
    for sink in (self.jsonl, self.tensorboard):
      if sink:
        sink.close()
    if self.wandb:
      self.wandb.finish()


def evaluation_table(metrics: Mapping[str, float]) -> tuple[list[str], dict[str, dict]]:
  """(columns, {evaluator/metric: {column: value}}); columns: trained, untrained, raw pixels."""
  columns = [c for c in COLUMNS if c == "trained" or any(f"/{c}/" in name for name in metrics)]
  rows: dict[str, dict[str, float]] = {}
  for name, value in metrics.items():
    parts = name.split("/")
    column = next((p for p in parts if p in columns[1:]), "trained")
    rows.setdefault("/".join(p for p in parts if p != column), {})[column] = value
  return columns, rows


def print_evaluations(metrics: Mapping[str, float], console: Console | None = None):
  """Prints the `evaluation_table`."""
  console = console or Console(file=sys.stdout)
  columns, rows = evaluation_table(metrics)
  table = Table(title="evaluation", title_justify="left")
  table.add_column("metric")
  for column in columns:
    table.add_column(column, justify="right")
  for name, row in rows.items():
    table.add_row(name, *(f"{row[c]:.4g}" if c in row else "" for c in columns))
  console.print(table)
