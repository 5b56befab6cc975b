"""What a process sets up before it does anything with jax."""

import logging
import os
import sys
from pathlib import Path

PREEMPTED = 75  # exit status of a run that was stopped, EX_TEMPFAIL of sysexits.h: try again


def keep_memory():
  """Starts this command again with a C heap that keeps its memory, in huge pages (Linux, glibc).

  XLA allocates the temporaries of a step on a CPU anew each time. Given back to the kernel, their
  pages are mapped and zeroed again: from a quarter of a step to half of it, where other programs
  have broken up the machine's memory. The library reads these settings only as a process starts.

  So does Python that of what file names are written in: UTF-8 in any locale, or a run's data would
  have other names, and another fingerprint, where LC_ALL=C.
  """
  is_utf8 = sys.getfilesystemencoding().lower() in ("utf-8", "utf8")
  if not is_utf8:
    os.environ["PYTHONUTF8"] = "1"
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = ":".join(
      "glibc.malloc." + setting for setting in (
        "hugetlb=1", "mmap_max=0", f"trim_threshold={2**40}", "arena_max=1"))
    is_utf8 = False  # starts again in any case
  if not is_utf8:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def add_flags(parser):
  """The flags of a run of several processes; none are needed for one."""
  group = parser.add_argument_group("several processes (docs/pods.md)")
  group.add_argument("--distributed", action="store_true",
                     help="find the other processes by the cluster: TPU pod, Slurm, Open MPI, K8s")
  group.add_argument("--coordinator", help="HOST:PORT of process 0, where no cluster tells")
  group.add_argument("--num_processes", type=int)
  group.add_argument("--process_id", type=int)


def prepare(args):
  """Joins the other processes if there are any, keeps compiled programs, quiets libraries."""
  import jax
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes before
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitrine" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  if args.distributed or args.coordinator:
    jax.config.update("jax_enable_preemption_service", True)
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  # Checkpoint and data libraries print tracebacks of errors that we handle and put in words.
  for name in ("absl", "orbax"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
