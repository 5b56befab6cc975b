"""The page report.html of a run, or of several side by side: one file that needs no network.

history.jsonl holds what config.json and metrics.jsonl do not tell: an object for each time that the
run was started, stopped or evaluated.
"""

import base64
import itertools
import json
import logging
import math
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jinja2

from trainer.logging import COLUMNS, duration, evaluation_table, read_lines, read_metrics

POINTS = 2000  # of a curve, at most: however long the run, the page opens at once
MEANS = 150  # of a curve: where it has more than twice as many points their means are drawn over it
log = logging.getLogger("vitrine")


def update(workdir, event: str, **facts) -> Path | None:
  """Adds an event to history.jsonl and writes report.html anew.

  Events and their facts: "start" (step, facts, command, changed), "stop" (step, spent, reason; ""
  where the run ended as asked), "evaluation" (step, metrics, changed).

  Returns the page, or None after a warning where it could not be written: never an error.
  """
  workdir = Path(workdir)
  try:
    if event == "start":
      facts["facts"] = facts["facts"] | environment()
    history = [*read_lines(workdir / "history.jsonl"),
               {"event": event, "time": time.time(), **facts}]
    _replace(workdir / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    return _replace(workdir / "report.html", render([read_run(workdir)]))
  except Exception as error:  # a page is not worth a training
    log.warning("no report of %s: %s", workdir, error)
    return None


def compare(workdirs: Sequence[str], out: str) -> Path:
  """Writes one page on several runs. Raises ValueError where one is no run or is given twice."""
  parts = [Path(workdir).resolve().parts for workdir in workdirs]
  tails = (["/".join(part[-n:]) for part in parts] for n in range(1, 1 + max(map(len, parts))))
  names = next((names for names in tails if len(set(names)) == len(names)), None)
  if names is None:
    raise ValueError(f"--compare {' '.join(workdirs)}: a run directory is given twice")
  return _replace(Path(out), render([read_run(workdir) | {"name": name}
                                     for workdir, name in zip(workdirs, names)]))


def _replace(path: Path, content: str) -> Path:
  partial = path.with_suffix(".tmp")
  partial.write_text(content, encoding="utf-8")
  return partial.replace(path)


def environment() -> dict[str, str]:
  """What the code runs on, and which code it is."""
  try:
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], text=True,
                            cwd=Path(__file__).parent, capture_output=True, timeout=10).stdout
  except (OSError, subprocess.SubprocessError):
    commit = ""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
  return {"python": f"{platform.python_version()} on {platform.platform()}",
          "packages": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
          "commit": commit.strip() or "not in a git checkout"}


# --- What a run directory tells -------------------------------------------------------------------

def read_run(workdir) -> dict:
  """What the page shows of a run. Raises ValueError if the directory holds none."""
  workdir = Path(workdir)
  try:
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{workdir} holds no run: {error}") from error
  rows, history = read_metrics(workdir), read_lines(workdir / "history.jsonl")
  curves = {}
  for row in rows:
    for name, value in row.items():
      if name not in ("step", "time"):
        curves.setdefault(name, []).append((row["step"], value))

  sessions, spent = read_sessions(history)
  latest = sessions[-1] if sessions else {}
  step = max([row["step"] for row in rows] + [s["stop"] or s["step"] for s in sessions], default=0)
  total = config.get("total_steps", step)
  finished = step >= total and not latest.get("reason")
  changed = dict(line.removeprefix("config.").split(": ", 1) for line in latest.get("changed", ()))
  clock = [row["time"] for row in rows]
  recipe, colon, variant = config.get("config_name", "?").partition(":")
  tables = read_evaluations(rows, history)
  numbers = {"steps": f"{step:,}" + ("" if finished else f" of {total:,}"),
             "wall time": duration(sum(spent.values()) or max(clock, default=0) -
                                   min(clock, default=0))}
  if losses := curves.get("train/loss"):
    numbers["last loss"] = number(losses[-1][1])
  if rates := curves.get("train/examples_per_second"):
    numbers["examples a second"] = number(statistics.median(x for _, x in rates))
  if "facts" in latest:
    numbers["parameters"] = latest["facts"]["parameters"]
  return {
    "name": workdir.resolve().name, "recipe": recipe + colon + variant, "finished": finished,
    "reason": latest.get("reason", ""), "numbers": numbers, "facts": latest.get("facts", {}),
    "config": flatten(config), "changed": changed, "curves": curves, "evaluations": tables,
    "headline": headline(tables[0]["rows"]) if tables else {}, "figures": figures(workdir),
    "sessions": sessions, "spent": spent,
    "commands": {
      "continue": latest.get("command") or shlex.join(
        ["python", "train.py", f"--config=configs/{recipe}.py{colon}{variant}",
         f"--workdir={workdir}"]),
      "evaluate": shlex.join(["python", "evaluate.py", f"--workdir={workdir}"]),
      "compare": shlex.join(["python", "evaluate.py", "--compare", str(workdir)]) + " OTHER ...",
      "notebook": f"from trainer.checkpoints import load_run\nrun = load_run({str(workdir)!r})"}}


def read_sessions(history: Sequence[Mapping]) -> tuple[list[dict], Counter]:
  """(each start with how it ended, the seconds spent on each thing in all of them)."""
  sessions, spent = [], Counter()
  for row in history:
    if row["event"] == "start":
      sessions.append({**row, "stop": None, "reason": "running, or killed"})
    elif row["event"] == "stop" and sessions:
      sessions[-1].update(stop=row["step"], reason=row["reason"],
                          seconds=sum(row["spent"].values()))
      spent.update(row["spent"])
  return sessions, spent


def read_evaluations(rows: Sequence[Mapping], history: Sequence[Mapping]) -> list[dict]:
  """A table for the last evaluation in training, and for each one after it with its own flags."""
  evaluations = {}  # (step, flags) -> metrics; a later one of the same takes its place
  for row in rows:
    if final := {name.removeprefix("eval/"): x for name, x in row.items() if name[:5] == "eval/"}:
      evaluations = {(row["step"], ()): final}
  for row in history:
    if row["event"] == "evaluation":
      evaluations[row["step"], tuple(row["changed"])] = row["metrics"]
  return [{"step": at, "changed": " ".join(flags), "columns": columns, "rows": cells}
          for (at, flags), metrics in evaluations.items()
          for columns, cells in [evaluation_table(metrics)]]


def headline(rows: Mapping[str, Mapping], most: int = 4) -> dict[str, Mapping]:
  """The first metric of each evaluator, then the second of each, and so on up to `most`."""
  evaluators = {}
  for name in rows:
    evaluators.setdefault(name.split("/")[0], []).append(name)
  names = [name for turn in itertools.zip_longest(*evaluators.values()) for name in turn if name]
  return {name: rows[name] for name in names[:most]}


def figures(workdir: Path) -> dict[str, list[dict]]:
  """{name: its pictures as data URIs, the newest step first}, from NAME_stepSTEP.png."""
  result = {}
  for path in sorted((workdir / "figures").glob("*.png"), reverse=True):
    name, step = re.fullmatch(r"(.*?)(?:_step(\d+))?", path.stem).groups()
    picture = base64.b64encode(path.read_bytes()).decode()
    result.setdefault(name, []).append(
      {"step": step and int(step), "uri": f"data:image/png;base64,{picture}"})
  return dict(sorted(result.items()))


def flatten(section: Mapping, prefix: str = "") -> dict:
  """{"model": {"depth": 2}} -> {"model.depth": 2}."""
  flat = {}
  for name, value in section.items():
    inner = isinstance(value, Mapping) and value
    flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
  return flat


# --- The page -------------------------------------------------------------------------------------

def thin(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
  """At most about `most` of the (step, value) points: of each stretch both extremes.

  A value that is not finite is an extreme; the first and the last point stay.
  """
  if len(points) <= most:
    return list(points)
  size, kept = math.ceil(2 * len(points) / most), {0, len(points) - 1}
  for start in range(0, len(points), size):
    stretch = range(start, min(start + size, len(points)))
    finite = [i for i in stretch if math.isfinite(points[i][1])]
    if finite:
      kept |= {pick(finite, key=lambda i: points[i][1]) for pick in (min, max)}
    if len(finite) < len(stretch):
      kept.add(next(i for i in stretch if i not in finite))
  return [points[i] for i in sorted(kept)]


def means(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """The means of about MEANS stretches of a long curve, of its finite values; [] if it is short."""
  if len(points) <= 2 * MEANS:
    return []
  finite, size = [p for p in points if math.isfinite(p[1])], math.ceil(len(points) / MEANS)
  return [tuple(map(statistics.fmean, zip(*finite[start:start + size])))
          for start in range(0, len(finite), size)]


def charts(runs: Sequence[Mapping]) -> list[dict]:
  """The curves, by metric: those of training, and of evaluation where there are several steps."""
  names = dict.fromkeys(name for run in runs for name in run["curves"])
  most = max(200, POINTS // len(runs))

  def short(points):
    return [(step, float(f"{x:.6g}") if math.isfinite(x) else str(x)) for step, x in points]

  result = []
  for name in sorted(names, key=lambda name: not name.startswith("train/")):
    series = [{"run": i, "points": short(thin(run["curves"][name], most)),
               "means": short(means(run["curves"][name]))}
              for i, run in enumerate(runs) if name in run["curves"]]
    if name.startswith("train/") or any(len(s["points"]) > 1 for s in series):
      result.append({"name": name, "series": series})
  return result


def number(value) -> str:
  return "" if value is None else f"{value:.4g}"


def render(runs: Sequence[Mapping]) -> str:
  """The page of one run, or of several side by side. Whatever a run's strings hold is text."""
  templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                                 autoescape=True, undefined=jinja2.StrictUndefined,
                                 trim_blocks=True, lstrip_blocks=True)
  templates.filters.update(
    number=number, duration=duration,
    plain=lambda value: value if isinstance(value, str) else json.dumps(value),
    day=lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)))
  def union(sections):
    return dict.fromkeys(itertools.chain(*sections))

  tables = [run["evaluations"][0]["rows"] if run["evaluations"] else {} for run in runs]
  metrics = [(name, column, cells) for name in union(tables) for column in COLUMNS
             for cells in [[table.get(name, {}).get(column) for table in tables]]
             if any(cell is not None for cell in cells)]
  return templates.get_template("report.html").render(
    runs=runs, charts=charts(runs), now=time.time(), metrics=metrics,
    numbers=union(run["numbers"] for run in runs),
    differing=[field for field in union(run["config"] for run in runs)
               if any(run["config"].get(field) != runs[0]["config"].get(field) for run in runs)],
    pictures=sorted(union(run["figures"] for run in runs)))
