"""A run that starts from another one: its network, its parameters, and what became of each."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from models import adapt
from trainer import checkpoints, networks, stored
from trainer.networks import Init, image_network, text_network
from trainer.parts import path_name
from trainer.state import statistics, with_statistics


class Taken(NamedTuple):
  """What another run gives to a new one; the arrays are of host memory."""

  params: dict[str, np.ndarray]  # by path in the new run
  batch_stats: dict[str, np.ndarray]
  rows: list[tuple[str, str, str]]  # (path, shape, what became of it), for a person


def take(config: ConfigDict, state, method, **init: Init) -> Taken:
  """The parameters and batch statistics that a new run has from another, or from two.

  Args:
    config: of the new run, completed.
    state, method: its TrainState, or the shapes of one, and its method.
    init: fields of `networks.Init`: which runs, and which parts of them.

  Raises:
    ValueError: something here is neither there nor fresh, or of another shape; names the first.
    FileNotFoundError: there is no such run.
  """
  run, source, into, fresh, text_run = Init(**init)
  if text_run:
    there = text_network(stored.load_config(text_run))
    text = take(config, state, method, run=text_run, source=there, into=text_network(config),
                fresh=fresh)
    image = take(config, state, method, **{**init, "text_run": ""}) if run else Taken({}, {}, [])
    return Taken({**image.params, **text.params}, {**image.batch_stats, **text.batch_stats},
                 image.rows + text.rows)
  loaded = checkpoints.load_run(networks.given(run))
  there_path, there = image_network(loaded.config)
  here_path, here = image_network(config)
  source_path, into_path = (there_path if source is None else source,
                            here_path if into is None else into)
  given, notes = _part(loaded.params, source_path), {}
  if (source_path, into_path) == (there_path, here_path):
    given, notes = adapt.adapt(given, there, here)
  wanted = _part(state.params, into_path)
  rows, params, wrong = [], {}, []
  for name, x in wanted.items():
    path, value = f"{into_path}/{name}" if into_path else name, given.get(name)
    if fresh and re.search(fresh, name):
      rows.append((path, str(x.shape), "new"))
    elif value is None or value.shape != x.shape:
      wrong.append(f"{path} {x.shape}: " + ("missing" if value is None else f"{value.shape}"))
    else:
      params[path] = np.asarray(value)
      rows.append((path, str(x.shape), notes.get(name, "taken")))
  if wrong or not wanted:
    raise ValueError(f"config.init: {source_path!r} of {run!r} does not fit into {into_path!r}; "
                     "here, and there:\n  " + "\n  ".join(wrong[:5]))
  used = {f"{source_path}/{name}" if source_path else name for name in wanted
          if not (fresh and re.search(fresh, name))}
  rows += [(path, str(x.shape), "ignored") for path, x in _part(loaded.params, "").items()
           if path not in used]
  given = _part(statistics(loaded.method, loaded.extra), source_path)
  taken = {f"{into_path}/{name}" if into_path else name: np.asarray(given[name])
           for name in _part(statistics(method, state.extra), into_path) if name in given}
  return Taken(params, taken, rows)


def summary(rows) -> list[tuple[str, str, str]]:
  """The rows of `Taken`, those of one component that had the same fate together."""
  groups = {}
  for path, shape, became in rows:
    groups.setdefault((path.split("/")[0], became), []).append((path, shape))
  return [(found[0][0], found[0][1], became) if len(found) == 1 else
          (component, f"{len(found)} arrays", became) for (component, became), found
          in groups.items()]


def resized(run, config: ConfigDict):
  """A loaded run with its image network's patches made to fit those of a completed config.

  Raises ValueError where the grid of patches would change: at an unchanged patch the network itself
  stretches its positions.
  """
  path, there = image_network(run.config)
  _, here = image_network(config)
  if getattr(there, "patch", None) == getattr(here, "patch", None):
    return run
  if there.grid != here.grid:
    raise ValueError(f"config.model.patch = {here.patch} makes {here.grid} patches of images of "
                     f"{here.image_size} pixels; the run has {there.grid}: keep as many")
  prefix = f"{path}/" if path else ""
  part, _ = adapt.adapt(_part(run.params, path), there, here)
  part = {prefix + name: array for name, array in part.items()}
  params = jax.tree.map_with_path(lambda at, x: part.get(path_name(at), x), run.params)
  return run._replace(params=params, config=config)


def put(state, taken: Taken, method):
  """A new run's state, its running average too, with what was taken in the place of its own."""
  def into(tree, values: Mapping):
    def leaf(path, x):
      value = values.get(path_name(path))
      return x if value is None else jax.make_array_from_callback(
        x.shape, x.sharding, lambda index: value[index])
    return jax.tree.map_with_path(leaf, tree)

  own = into(statistics(method, state.extra), taken.batch_stats)
  return state._replace(params=into(state.params, taken.params),
                        extra=with_statistics(method, state.extra, own),
                        ema=state.ema and into(state.ema, taken.params),
                        ema_statistics=state.ema_statistics and into(state.ema_statistics,
                                                                     taken.batch_stats))


def _part(tree, path: str) -> dict:
  """{path below `path`: array} of a tree's part; of all of it for ""."""
  prefix = f"{path}/" if path else ""
  named = ((path_name(p), x) for p, x in jax.tree.leaves_with_path(tree))
  return {name.removeprefix(prefix): x for name, x in named if name.startswith(prefix)}
