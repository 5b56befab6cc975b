"""What evaluators ask of their settings and of the data, in the config's words."""

import difflib
from collections.abc import Collection, Iterable


def at_least(evaluator: str, **fields: tuple):
  """Raises ValueError where a field, (value, least), is below its least; None passes."""
  for name, (value, least) in fields.items():
    if value is not None and value < least:
      raise ValueError(f"evals.{evaluator}.{name} = {value} must be at least {least}")


def all_known(evaluator: str, field: str, names: Iterable[str], known: Collection[str]):
  """Raises ValueError on the first of `names` that is not `known`, with the nearest that is."""
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(str(name), known, 1, 0)
      raise ValueError(f"evals.{evaluator}.{field}: {name!r} is not one of {', '.join(known)}; did "
                       f"you mean {near[0]!r}?")


def has_texts(evaluator: str, context):
  """Raises ValueError where the run has no tokenizer, so no texts."""
  if context.detokenize is None:
    raise ValueError(f"evals.{evaluator} needs texts: set data.tokenizer, for data that has them")
