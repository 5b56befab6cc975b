"""Tables of one network in two layouts, theirs and ours, that are read in both directions.

A row of a table is (their name, our name, kind). A kind is the einops pattern that takes a tensor
of theirs to ours, or a key of KINDS: the tensors of a module. In their names {a,b} are tensors that
lie stacked on a leading axis in ours and {i} counts the layers, our first axis. "a + b" of ours is
the first row of their table of positions (the class token's) and the rest.

Our names are paths in {"params": ..., "extra": ...}. Only `theirs` and `ours` know of these rules;
both only move numbers about, and take NumPy arrays and what JAX traces alike.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

VECTOR = "d -> d"
QKV = "(s k e) d -> d s k e", "(s k e) -> s k e"  # q, k and v as one matrix: queries come first
HEADS = "d (k e) -> k e d"
# Kind of module -> (what follows its name in theirs, in ours, pattern) of its tensors.
KINDS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
  # PyTorch: matrices [out, in]
  "dense": ((".weight", "/kernel", "o i -> i o"), (".bias", "/bias", VECTOR)),
  "norm": ((".weight", "/scale", VECTOR), (".bias", "/bias", VECTOR)),
  "patches": ((".weight", "/kernel", "d c p q -> (p q c) d"), (".bias", "/bias", VECTOR)),
  "qkv": ((".weight", "/qkv_kernel", QKV[0]), (".bias", "/qkv_bias", QKV[1])),
  "in_proj": (("_weight", "/qkv_kernel", QKV[0]), ("_bias", "/qkv_bias", QKV[1])),
  "q, k, v": ((".weight", "/qkv_kernel", "s (k e) d -> d s k e"),
              (".bias", "/qkv_bias", "s (k e) -> s k e")),
  "heads": ((".weight", "/kernel", HEADS), (".bias", "/bias", VECTOR)),
  "conv": ((".weight", "/kernel", "o i h w -> h w i o"),),
  "batch_norm": ((".weight", "/scale", VECTOR), (".bias", "/bias", VECTOR),
                 (".running_mean", "/mean", VECTOR), (".running_var", "/var", VECTOR)),
  # Flax: matrices [in, out], heads apart
  "flax dense": (("/kernel", "/kernel", "i o -> i o"), ("/bias", "/bias", VECTOR)),
  "flax norm": (("/scale", "/scale", VECTOR), ("/bias", "/bias", VECTOR)),
  "flax patches": (("/kernel", "/kernel", "p q c d -> (p q c) d"), ("/bias", "/bias", VECTOR)),
  "flax q, k, v": (("/kernel", "/qkv_kernel", "s d k e -> d s k e"),
                   ("/bias", "/qkv_bias", "s k e -> s k e")),
  "flax heads": (("/kernel", "/kernel", "k e d -> k e d"), ("/bias", "/bias", VECTOR)),
}


class Row(NamedTuple):
  """One tensor of ours, or two, and those of theirs that it is made of."""

  theirs: tuple[str, ...]  # stacked if several; {i} stands for a layer
  ours: tuple[str, ...]  # two: the first row, and the rest
  pattern: str  # einops, theirs -> ours
  sizes: Mapping[str, int]  # of the pattern's axes

  @property
  def layered(self) -> bool:
    return "{i}" in self.theirs[0]

  def names(self, layers: int) -> list[str]:
    return [name.replace("{i}", str(i)) for i in range(layers) for name in self.theirs]

  def forward(self, x):
    return rearrange(x, self.pattern, **self._sizes())

  def backward(self, x):
    left, right = self.pattern.split("->")
    return rearrange(x, f"{right} -> {left}", **self._sizes())

  def _sizes(self):
    return {axis: n for axis, n in self.sizes.items() if re.search(rf"\b{axis}\b", self.pattern)}


def rows(table: Iterable[tuple[str, str, str]], theirs: str = "", ours: str = "params",
         stats: str = "extra/batch_stats", **sizes: int) -> list[Row]:
  """The rows of a table, with what its names begin with.

  Args:
    table: (their name, our name, kind) as the module says.
    theirs, ours, stats: prefixes; `stats` is that of running statistics in ours.
    sizes: of axes: k heads, p and q pixels of a patch, c channels.
  """
  def expand(text):
    before, braces, after = re.fullmatch(r"(.*?)(?:\{(\w+,[\w,]+)\})?([^,]*)", text).groups()
    return [before + part + after for part in (braces or "").split(",")]

  result = []
  for their_name, our_name, kind in table:
    tensors = (("", "", kind),) if "->" in kind else KINDS[kind]
    for suffix, our_suffix, pattern in tensors:
      root = stats if our_suffix in ("/mean", "/var") else ours
      result.append(Row(
        tuple(theirs + name + suffix for name in expand(their_name)),
        tuple(f"{root}/{name}{our_suffix}" for name in our_name.split(" + ")), pattern,
        {"s": 3, **sizes}))
  return result


def ours(table: Iterable[Row], weights: Mapping) -> dict:
  """{our path: array} of the rows whose tensors are all in `weights`, {their name: array}."""
  result = {}
  for row in table:
    layers = depth(weights, row.theirs[0]) if row.layered else 1
    parts = [weights.get(name) for name in row.names(layers)]
    if not layers or any(part is None for part in parts):
      continue
    each = len(row.theirs)
    parts = [row.forward(parts[i] if each == 1 else rearrange(parts[i:i + each], "s ... -> s ..."))
             for i in range(0, len(parts), each)]
    x = rearrange(parts, "l ... -> l ...") if row.layered else parts[0]
    *first, rest = row.ours
    for name in first:                                                       # 1+n d
      result[name], x = x[None, :1], x[1:]                                   # 1 1 d; n d
    result[rest] = x
  return result


def theirs(table: Iterable[Row], arrays: Mapping) -> dict:
  """{their name: array} of the rows whose parts are all in `arrays`, {our path: array}."""
  result = {}
  for row in table:
    if not all(name in arrays for name in row.ours):
      continue
    *first, x = (arrays[name] for name in row.ours)
    if first:                                                                # 1 1 d; n d
      x = (np if isinstance(x, np.ndarray) else jnp).concatenate([first[0][0], x])  # 1+n d
    parts = [row.backward(layer) for layer in (x if row.layered else [x])]
    parts = parts if len(row.theirs) == 1 else [piece for part in parts for piece in part]
    result.update(zip(row.names(len(x) if row.layered else 1), parts))
  return result


def depth(names: Iterable[str], pattern: str) -> int:
  """How many layers {i} of a name there are."""
  found = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
  return 1 + max((int(m[1]) for m in map(found.fullmatch, names) if m), default=-1)


# --- Accounting -----------------------------------------------------------------------------------

class Entry(NamedTuple):
  """What became of the tensors of a row, or of some that no row speaks of."""

  status: str  # a key of ORDER
  theirs: str
  shape: tuple[int, ...] | None  # of one of theirs
  ours: str = ""
  count: int = 1  # tensors
  note: str = ""


ORDER = ("taken", "transposed", "aside", "new", "assumed", "missing", "unexpected", "wrong shape")
WRONG = ORDER[-3:]


def account(table: list[Row], given: Mapping, expected: Mapping, *, aside: str = "",
            new: str = "") -> list[Entry]:
  """Where each of their tensors, and of ours, goes.

  Args:
    table: rows.
    given: {their name: array or shape}, of a file.
    expected: {our path: array or shape}, of the network that is to take them.
    aside: regular expression, their names that we have no use for; they are kept for the way back.
    new: regular expression, the parts of ours that a file may leave out: each match is a part, and
      a part is there as a whole or not at all.
  """
  needed = jax.eval_shape(lambda arrays: theirs(table, arrays), _shapes(expected))
  named = {path for row in table for path in row.ours}
  part = {path: m[0] for path in expected if new and (m := re.match(new, path))}
  present = {part[path] for row in table for path in row.ours if path in part
             and any(name in given for name in row.names(_layers(row, expected)))}
  entries = [Entry("new", "", None, path, note="ours alone") for path in expected
             if path not in named and path in part]
  entries += [Entry("missing", "", None, path, note="this format has no name for it")
              for path in expected if path not in named and path not in part]
  used = set()
  for row in table:
    if not all(path in expected for path in row.ours):
      continue
    names = row.names(_layers(row, expected))
    used.update(names)
    ours_name = " + ".join(row.ours)
    absent = [name for name in names if name not in given]
    if absent and all(path in part and part[path] not in present for path in row.ours):
      entries.append(Entry("new", "", None, ours_name, note=f"no {row.theirs[0]} in the file"))
      continue
    entries += [Entry("missing", name, needed[name].shape, ours_name) for name in absent]
    wrong = [name for name in names if name in given and given[name].shape != needed[name].shape]
    entries += [Entry("wrong shape", name, given[name].shape, ours_name,
                      note=f"expected {list(needed[name].shape)}") for name in wrong]
    if not absent and not wrong:
      left, right = (re.sub(r"[()\s1]", "", side) for side in row.pattern.split("->"))
      entries.append(Entry("taken" if left == right else "transposed", _braces(row.theirs),
                           needed[names[0]].shape, ours_name, len(names)))
  for name in sorted(set(given) - used):
    known = aside and re.fullmatch(aside, name)
    entries.append(Entry("aside" if known else "unexpected", name, given[name].shape))
  return entries


def show(entries: Iterable[Entry], verbose: bool = True) -> str:
  """The accounts, one line an entry, those in need of attention at the end; then the sums."""
  entries = sorted(entries, key=lambda entry: ORDER.index(entry.status))
  lines = []
  for status, name, shape, ours_name, count, note in entries:
    if verbose or status in WRONG:
      size = "" if shape is None else f" {list(shape)}" + (f" x {count}" if count > 1 else "")
      lines.append(f"  {status:11} {name}{size}" + (f" -> {ours_name}" if ours_name else "")
                   + (f" ({note})" if note else ""))
  sums = {status: sum(e.count for e in entries if e.status == status) for status in ORDER}
  return "\n".join([*lines, ", ".join(f"{n:,} {status}" for status, n in sums.items() if n)])


def _layers(row: Row, expected: Mapping) -> int:
  return expected[row.ours[-1]].shape[0] if row.layered and row.ours[-1] in expected else 1


def _braces(names: tuple[str, ...]) -> str:
  return names[0] if len(names) == 1 else " | ".join(names)


def _shapes(arrays: Mapping) -> dict:
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
