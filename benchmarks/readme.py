"""The parts of README that benchmarks write."""

from pathlib import Path


def replace(readme: Path, name: str, text: str):
  """Puts `text` between README's comments `name` and `end of name`.

  Raises ValueError where it has not both.
  """
  start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  before, _, rest = readme.read_text().partition(start)
  _, found, after = rest.partition(end)
  if not found:
    raise ValueError(f"{readme}: no {start} with an {end} after it")
  readme.write_text(f"{before}{start}\n{text}\n{end}{after}")
