"""Gives the commands what goes wrong in practice, and tables what each said and what was left.

  python benchmarks/bad_inputs.py [--only=PATTERN] [--jobs=2] [--out=docs/bad_inputs.md]

Each case is made anew in a temporary folder and run as a user runs it. A case passes where the exit
status and the error are those that it names, no traceback was printed, and what had been saved
before is whole. Cases with a disk of their own need root, and are told as skipped without it.
"""


import argparse
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bad_input_cases import CASES
from benchmarks.bad_input_parts import Case, Skip, run, state_of


def judge(case: Case) -> dict:
  """Runs one case: {kind, name, status, said, left, wrong: what is not as it has to be}."""
  with tempfile.TemporaryDirectory() as path:
    folder = Path(path)
    try:
      case.prepare(folder)
      command = case.command or (lambda folder, flags: run(folder, flags, case.config))
      done = command(folder, case.flags)
    except Skip as reason:
      return dict(kind=case.kind, name=case.name, status="", said=f"skipped: {reason}", left="",
                  wrong=[])
    lines = done.stderr.splitlines()
    said = next((line for line in lines if re.match("error: |stopped by ", line)),
                lines[-1] if lines else "")
    left, wrong = state_of(folder / "run"), []
    if done.returncode != case.status:
      wrong.append(f"status {done.returncode}, not {case.status}")
    if not re.search(case.says, done.stderr):
      wrong.append(f"does not say {case.says!r}")
    if "Traceback" in done.stdout + done.stderr:
      wrong.append("a traceback")
    if not re.fullmatch(case.left, left):
      wrong.append(f"left {left}, not {case.left}")
    said = re.sub(r"process \d+ on \S+ since \S+ [\d:]+", "process PID on HOST since TIME", said)
    return dict(kind=case.kind, name=case.name, status=done.returncode,
                said=said.replace(path, "DIR"), left=left, wrong=wrong)


def table(rows: list[dict]) -> str:
  """Markdown: a row a case."""
  def cell(text):
    text = str(text).replace("|", "\\|")
    return text if len(text) <= 200 else text[:197] + "..."
  lines = ["| kind | what | status | said | left |", "|---|---|---|---|---|"]
  lines += [f"| {row['kind']} | {cell(row['name'])} | {row['status']} | {cell(row['said'])} | "
            f"{row['left']} |" for row in rows]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="regular expression of kind or name")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--out", type=Path)
  parser.add_argument("--json", type=Path)
  args = parser.parse_args()
  chosen = [case for case in CASES if re.search(args.only, f"{case.kind} {case.name}")]

  def told(case):
    row = judge(case)
    print(f"{'WRONG' if row['wrong'] else 'right'}  {row['kind']}: {row['name']}: {row['status']} "
          f"{row['said'][:150]} [{row['left']}] {'; '.join(row['wrong'])}", flush=True)
    return row

  with ThreadPoolExecutor(args.jobs) as pool:
    rows = list(pool.map(told, chosen))
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1))
  if args.out:
    args.out.write_text("# What goes wrong, and what is said of it\n\nWritten by `python "
                        f"benchmarks/bad_inputs.py --out={args.out}`; DIR is the case's folder.\n\n"
                        + table(rows) + "\n")
  failed = sum(bool(row["wrong"]) for row in rows)
  print(f"{len(rows) - failed} of {len(rows)} right")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
