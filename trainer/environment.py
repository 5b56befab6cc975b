"""What a process sets up before it does anything with jax."""

import logging
import os
from pathlib import Path

import jax


def prepare():
  """Compiled programs are kept between runs; the console is left to the run's own lines."""
  cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitrine" / "xla"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  for name in ("absl", "orbax", "jax._src.compilation_cache"):
    logging.getLogger(name).setLevel(logging.ERROR)
