"""Stopping on request: a signal ends the run after a step, with all processes agreeing on which.

What is not a step (the preparation of data, an evaluation) is left at once: it is made again.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from trainer.environment import PREEMPTED

GRACE = 5.0  # seconds after which a thread does what the main one, deep in a library, does not


class Preempted(RuntimeError):
  """The run was asked to stop, and did so after saving its state."""


def before(name: str) -> str:
  """What to tell of a stop before there is anything to save, for `Signals.at_once`."""
  return f"stopped by {name} before the run began; what was saved stays as it is"


class Stop(BaseException):
  """Leaves what `Signals.at_once` calls; no library catches it as an error of its own."""


class Signals:
  """Catches SIGTERM and SIGINT until closed; a second SIGINT ends the process at once.

  With several processes SIGTERM is the coordination service's, which tells all of them, and SIGINT
  is handed on to it; they stop together, so after a step alone.
  """

  def __init__(self, command: str = ""):
    self.seen, self.inside, self.since, self.command = [], None, 0.0, command
    self.alone, self.claim = jax.process_count() == 1, threading.Lock()
    caught = [signal.SIGINT, signal.SIGTERM] if self.alone else [signal.SIGINT]
    self.ears = os.pipe()  # a byte comes as the signal does, even where Python is not listening
    os.set_blocking(self.ears[1], False)
    self.former_wakeup = signal.set_wakeup_fd(self.ears[1], warn_on_full_buffer=False)
    self.former = {number: signal.signal(number, self.handle) for number in caught}
    threading.Thread(target=self.watch, args=(self.ears[0],), daemon=True).start()

  def handle(self, number, frame):
    if number == signal.SIGINT and signal.SIGINT in self.seen:
      os._exit(128 + signal.SIGINT)
    self.seen.append(number)
    if not self.alone:  # jax's coordination service listens to SIGTERM and tells the others
      os.kill(os.getpid(), signal.SIGTERM)
    elif self.inside and len(self.seen) == 1:
      raise Stop

  def requested(self, step: int) -> str | None:
    """The signal's name if the run should stop after this step.

    Every process calls it after every step, and all get their answer at the same one.
    """
    if self.alone:
      return signal.Signals(self.seen[0]).name if self.seen else None
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None

  def at_once(self, function: Callable[[], Any], finish: Callable[[str], str]):
    """function(), which a signal breaks off: then finish(its name) saves what there is to save.

    Where the main thread does not come back within GRACE, as out of a compilation, another one
    calls `finish` and ends the process. Raises Preempted with the text of `finish`.
    """
    if not self.alone:
      return function()
    try:
      try:
        self.since, self.inside = time.monotonic(), finish
        if self.seen:
          raise Stop
        return function()
      finally:
        self.leave()
    except (Stop, Exception):  # a library that is left halfway may fail as it tidies up
      self.leave()
      if not self.seen:
        raise
      raise Preempted(finish(self.requested(0))) from None

  def leave(self):
    with self.claim:  # held for good by a thread that is ending the process
      self.inside = None

  def watch(self, ear: int):
    """Waits for a signal; then ends what the main thread does not get out of."""
    heard = b""
    while not {signal.SIGTERM, signal.SIGINT} & {*heard}:
      heard = os.read(ear, 64)
      if not heard:
        os.close(ear)
        return
    began = time.monotonic()
    while self.former:
      time.sleep(0.1)
      if self.inside and time.monotonic() - max(began, self.since) > GRACE:
        with self.claim:
          if self.inside:
            self.end(signal.Signals(next(x for x in heard if x in (
              signal.SIGTERM, signal.SIGINT))).name)

  def end(self, name: str):
    status, text = PREEMPTED, ""
    try:
      text = f"{self.inside(name)}\ncontinue with: {self.command}"
    except Exception as error:
      status, text = 1, f"error: {error}"
    print(text, file=sys.stderr, flush=True)
    os._exit(status)

  def close(self):
    """Puts the former handlers back."""
    for number, handler in self.former.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self.former_wakeup)
    self.former = {}
    os.close(self.ears[1])  # ends the thread
