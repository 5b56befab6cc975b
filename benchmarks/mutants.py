"""Changes the code, one small fault at a time, and asks whether the tests see it.

  python -m pytest -m "slow or not slow" --cov --cov-context=test --cov-report=
  python benchmarks/mutants.py --coverage=.coverage [--count=80] [--seed=0] [--out=mutants.jsonl]

A mutant is one change at a place drawn from the seed: an operator, a sign, an axis, a constant, or
a statement that is left out, as many in each package. Each is made in a copy of the repository; of
the test files those that run its line are tried, the quickest first, until one of them fails. The
table names the mutants; one that survives is a fault that no test sees, or a change that makes none
(an error message's limit, a number that only speed depends on): to be looked at one by one.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "losses", "diffusion", "methods", "trainer", "input_pipeline", "evaluators",
            "interop")
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*",
             ast.Mod: "*", ast.Pow: "*", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
             ast.Eq: "!=", ast.NotEq: "==", ast.And: "or", ast.Or: "and"}
TIMEOUT = 900  # seconds for one test file; a mutant that hangs is seen


class Mutant(NamedTuple):
  path: str
  line: int
  kind: str
  start: int  # offsets in the file, in bytes
  stop: int
  new: str
  old: str


def mutants_of(path: Path) -> list[Mutant]:
  """Every change that this script knows, of one file."""
  source = path.read_bytes()
  starts = [0]
  for line in source.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
  found = []

  def span(node):
    return (starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset)

  def add(kind, node, start, stop, new):
    found.append(Mutant(str(path.relative_to(ROOT)), node.lineno, kind, start, stop, new,
                        source[start:stop].decode()))

  def between(kind, node, left, right, operator):
    """The operator between two operands: what stands there but brackets."""
    start, stop = span(left)[1], span(right)[0]
    text = source[start:stop].decode()
    if "\n" in text or "#" in text:
      return
    bare = text.strip("() ")
    at = start + text.index(bare)
    add(kind, node, at, at + len(bare), operator)

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
      if not any(isinstance(side, (ast.JoinedStr, ast.Constant)) and not isinstance(
          getattr(side, "value", 0), (int, float)) for side in (node.left, node.right)):
        between("operator", node, node.left, node.right, OPERATORS[type(node.op)])
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
      between("operator", node, node.left, node.comparators[0], OPERATORS[type(node.ops[0])])
    elif isinstance(node, ast.BoolOp):
      between("operator", node, node.values[0], node.values[1], OPERATORS[type(node.op)])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
      if not isinstance(node.operand, ast.Constant):
        add("sign", node, span(node)[0], span(node.operand)[0], "")
    elif isinstance(node, ast.keyword) and node.arg in ("axis", "axes") and isinstance(
        getattr(node.value, "value", None) or getattr(node.value, "operand", None),
        (int, ast.Constant)):
      start, stop = span(node.value)
      add("axis", node.value, start, stop, "0" if source[start:stop] != b"0" else "-1")
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
      start, stop = span(node)
      new = str(not node.value) if type(node.value) is bool else f"({node.value!r} + 1)"
      add("constant", node, start, stop, new)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(
        node.value, ast.Call)):
      add("dropped", node, *span(node), "pass")
  return found


def draw(count: int, seed: int) -> list[Mutant]:
  """`count` of them, as many of each package and, within it, of each kind as can be."""
  rng, drawn = random.Random(seed), []
  for i, package in enumerate(PACKAGES):
    kinds = defaultdict(list)
    for path in sorted((ROOT / package).rglob("*.py")):
      for mutant in mutants_of(path):
        kinds[mutant.kind].append(mutant)
    share = count // len(PACKAGES) + (i < count % len(PACKAGES))
    for j in range(share):
      kind = sorted(kinds)[j % len(kinds)]
      drawn.append(kinds[kind].pop(rng.randrange(len(kinds[kind]))))
  return drawn


def files_by_line(coverage: Path) -> dict[tuple[str, int], set[str]]:
  """(file, line) -> the test files that run it, by the contexts of a coverage database."""
  import coverage as library
  data = library.CoverageData(str(coverage))
  data.read()
  found = defaultdict(set)
  for measured in data.measured_files():
    path = Path(measured)
    if path.is_relative_to(ROOT):
      for line, contexts in data.contexts_by_lineno(measured).items():
        found[str(path.relative_to(ROOT)), line] |= {
          context.split("::")[0] for context in contexts if context}
  return found


def mutate(house: Path, mutant: Mutant):
  source = (ROOT / mutant.path).read_bytes()
  changed = source[:mutant.start] + mutant.new.encode() + source[mutant.stop:]
  compile(changed, mutant.path, "exec")
  (house / mutant.path).write_bytes(changed)


def seen_by(house: Path, tests: list[str], flags: list[str]) -> str | None:
  """The first test that fails; None where all pass."""
  for test in tests:
    try:
      done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-n0", "--no-header", *flags,
                             "-p", "no:cacheprovider", test], cwd=house, capture_output=True,
                            text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
      return f"{test} (hangs)"
    if done.returncode not in (0, 5):
      failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
      return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else test
  return None


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--coverage", type=Path, required=True)
  parser.add_argument("--count", type=int, default=80)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--jobs", type=int, default=os.cpu_count())
  parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
  parser.add_argument("--durations", type=Path, help="JUnit's XML of a run: quickest files first")
  parser.add_argument("flags", nargs="*", help="of pytest, such as -m 'slow or not slow'")
  args = parser.parse_args()
  lines, seconds = files_by_line(args.coverage), durations(args.durations)
  known = [json.loads(line) for line in args.out.read_text().splitlines()] if (
    args.out.exists()) else []
  done = {(row["path"], row["start"], row["new"]) for row in known}
  todo = [m for m in draw(args.count, args.seed) if (m.path, m.start, m.new) not in done]

  def judge(mutant):
    tests = sorted(lines.get((mutant.path, mutant.line), ()), key=lambda t: seconds.get(t, 60))
    with tempfile.TemporaryDirectory() as folder:
      house = Path(folder) / "house"
      shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(
        ".git", "__pycache__", "runs", ".venv", "mutants*"))
      mutate(house, mutant)
      row = mutant._asdict() | {"tests": len(tests), "seen": seen_by(house, tests, args.flags)}
    with args.out.open("a") as file:
      file.write(json.dumps(row) + "\n")
    print(f"{row['path']}:{row['line']} {row['kind']}: {row['old']!r} -> {row['new']!r}: "
          f"{row['seen'] or f'SURVIVED {len(tests)} files'}", flush=True)
    return row

  with ThreadPoolExecutor(args.jobs) as pool:
    rows = known + list(pool.map(judge, todo))
  print(f"{sum(bool(row['seen']) for row in rows)} of {len(rows)} seen")


def durations(report: Path | None) -> dict[str, float]:
  """Seconds of each test file, by JUnit's XML."""
  from xml.etree import ElementTree
  total = defaultdict(float)
  for case in ElementTree.parse(report).iter("testcase") if report else ():
    total[case.get("classname").replace(".", "/") + ".py"] += float(case.get("time"))
  return total


if __name__ == "__main__":
  main()
