"""Eight host devices, strict shapes, one compilation cache: set before jax starts."""

import gc
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"  # compiling is most of what the tests do
    # On a busy machine a device's thread may be late; XLA would end the process after 40 seconds.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR",
                      str(Path(tempfile.gettempdir()) / "vitrine_test_compilation_cache"))

# All of it is kept: most programs are small, and compiled by several tests and processes.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax
import pytest
from filelock import FileLock

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects that live on


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """A folder that all workers of a session have."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope="session")
def data_dir(shared):
  """Where the embedded data sets are prepared, once a session."""
  return str(shared / "data")


@pytest.fixture(scope="session")
def smoke_run(shared, data_dir):
  """(name of a recipe) -> the directory of its smoke run, trained once a session: to be read."""
  def get(name, variant="smoke"):
    import train
    workdir = shared / f"{name}_{variant}"
    with FileLock(f"{workdir}.lock"):
      if not workdir.with_suffix(".made").exists():
        assert train.main([f"--config=configs/{name}.py:{variant}", f"--workdir={workdir}",
                           f"--data_dir={data_dir}"]) == 0
        workdir.with_suffix(".made").touch()
    return workdir
  return get
