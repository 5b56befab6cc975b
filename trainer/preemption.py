"""Stopping on request: a signal ends the run after a step, with all processes agreeing on which."""

import os
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
  """The run was asked to stop, and did so after saving its state."""


def listen() -> tuple[Callable[[int], str | None], Callable[[], None]]:
  """Catches SIGTERM and SIGINT until told not to; a second SIGINT ends the process at once.

  Returns:
    requested: (step) -> name of the signal if the run should stop after this step, else None. Every
      process calls it after every step, and all get their answer at the same one.
    restore: puts the former handlers back.
  """
  seen = []
  alone = jax.process_count() == 1

  def handle(number, frame):
    if number == signal.SIGINT and signal.SIGINT in seen:
      os._exit(128 + signal.SIGINT)
    seen.append(number)
    if not alone:  # jax's coordination service listens to SIGTERM and tells the other processes
      os.kill(os.getpid(), signal.SIGTERM)

  # With several processes SIGTERM is the coordination service's own.
  caught = [signal.SIGINT, signal.SIGTERM] if alone else [signal.SIGINT]
  former = {number: signal.signal(number, handle) for number in caught}

  def requested(step: int) -> str | None:
    if alone:
      return signal.Signals(seen[0]).name if seen else None
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None

  def restore():
    for number, handler in former.items():
      signal.signal(number, handler)

  return requested, restore
