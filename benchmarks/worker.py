"""One side of a comparison: a process that takes timed steps when it is told to, and else sleeps.

Standard library only: the other side's Python may have nothing of ours.
"""

import json
import sys
import time


def serve(step, **facts):
  """Prints facts as a line of JSON; then takes n steps for each number n that a line of stdin says.

  `step` takes one step and returns when it is done. The answer to each line is {"wall", "cpu"}:
  seconds a step by the clock, and of processor time over all threads.
  """
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    n = int(line)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
      step()
    print(json.dumps({"wall": (time.perf_counter() - wall) / n,
                      "cpu": (time.process_time() - cpu) / n}), flush=True)
