"""Runs the benchmarks and writes what they print to benchmarks/RESULTS.md, section by section.

  python benchmarks/results.py [--python-peer=PYTHON] [--python-tf=PYTHON] [input "threads=1" ...]

With words, only the commands that contain one of them: a section is replaced where this machine has
it, and appended where not. A quiet machine is needed. PYTHON is one with torch and Pillow, or with
tensorflow-cpu.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compare

PAGE = compare.ROOT / "benchmarks/RESULTS.md"
COMMANDS = {  # device -> what it is measured by
  "cpu": ("compare.py --threads=1 --steps=5", "compare.py --threads={cores}",
          "compare.py --models=mae_l16_masks --batch=4 --steps=3 --threads=1",
          "input.py", "sampling.py", "scaling.py"),
  "gpu": ("compare.py", "compare.py --compile", "sampling.py")}
START = """# Results

`python benchmarks/results.py` writes this page; each section is what its command prints on the
machine that the heading names. What the numbers mean is at the top of each script.
"""


def replace(page: str, heading: str, body: str) -> str:
  """The page with a section of this heading: in the place of the one there is, or at the end."""
  section = f"## {heading}\n\n{body.strip()}\n"
  parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
  found = [part.startswith(f"## {heading}\n") for part in parts]
  parts = [section if same else part.strip() + "\n" for same, part in zip(found, parts)]
  return "\n".join(parts if any(found) else [*parts, section])


def machine() -> str:
  """What a reader has to know of this machine beside its processor."""
  commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=compare.ROOT,
                          text=True, capture_output=True).stdout.strip() or "unknown"
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  return (f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {memory:.0f} GiB, "
          f"{platform.system()} {platform.release()}, Python {platform.python_version()}, commit "
          f"{commit}.")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("words", nargs="*", metavar="word")
  parser.add_argument("--python-peer", default=sys.executable)
  parser.add_argument("--python-tf")
  args = parser.parse_args()
  device = compare.default_device()
  commands = [command.format(cores=os.cpu_count()) for command in COMMANDS[device]]
  for word in args.words:
    if not any(word in command for command in commands):
      parser.error(f"{word}: on a {device} there are {'; '.join(commands)}")
  pythons = {"compare": [f"--python-peer={args.python_peer}"], "input": [
    f"--python-torch={args.python_peer}", *([f"--python-tf={args.python_tf}"] if args.python_tf
                                            else [])]}
  name_of_machine = compare.cpu_name() if device == "cpu" else subprocess.run(
    ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i0"], text=True,
    capture_output=True).stdout.strip()
  for command in commands:
    if args.words and not any(word in command for word in args.words):
      continue
    name = command.split(".py")[0]
    print(f"python benchmarks/{command}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *f"benchmarks/{command}".split(),
                           *pythons.get(name, [])], cwd=compare.ROOT, text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
      return done.returncode
    page = PAGE.read_text() if PAGE.exists() else START
    PAGE.write_text(replace(page, f"{name_of_machine}: `python benchmarks/{command}`",
                            f"{machine()}\n\n{done.stdout}"))
  return 0


if __name__ == "__main__":
  sys.exit(main())
