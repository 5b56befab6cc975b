"""One writer of a run directory: a small file says which process it is, and that it still lives.

On one machine the kernel tells whether a process lives. From another (a shared disk) its file is
watched: the writer renews it every few seconds, so what does not change is dead. Clocks of machines
are not compared, and no death leaves anything that a person has to remove.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from trainer import sharding

NAME = "in_use.json"  # in the run directory
RENEW = 5.0  # seconds between two signs of life
DEAD = 30.0  # seconds without one, seen from another machine, after which a writer is dead
_mine = set()  # tokens that this process holds


class InUse(RuntimeError):
  """Another process writes to the run directory, or none can."""


def machine() -> str:
  """This host as far as its process numbers are unique: a restart or a container is another one."""
  parts = [socket.gethostname()]
  for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
    with contextlib.suppress(OSError):
      parts.append(os.readlink(path) if "/ns/" in path else Path(path).read_text("ascii").strip())
  return " ".join(parts)


def born(pid: int) -> str:
  """When a process of this machine started, in the kernel's words; "" if it does not live."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
  except OSError:
    if Path("/proc/self/stat").exists():
      return ""
  return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], text=True,
                        capture_output=True).stdout.strip()


def read(path: Path) -> dict | None:
  """Who holds a lease; None where there is none. {} of one that is not yet written."""
  try:
    return json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError:
    return {}


def lives(path: Path, holder: dict) -> bool:
  """Whether a lease's holder lives. May take DEAD seconds to tell, of another machine."""
  if holder.get("machine") == machine():
    if holder["pid"] == os.getpid():
      return holder["token"] in _mine
    return born(holder["pid"]) == holder["born"]
  deadline = time.monotonic() + DEAD
  while time.monotonic() < deadline:
    time.sleep(RENEW / 10)
    if read(path) != holder:
      return True  # renewed, or another's by now
  return False


def create(path: Path, content: bytes) -> bool:
  """Makes a file with its whole content unless it is there; False if it is."""
  aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  aside.write_bytes(content)
  try:
    os.link(aside, path)
  except FileExistsError:
    return False
  except OSError:  # a disk without hard links
    try:
      with path.open("xb") as file:
        file.write(content)
    except FileExistsError:
      return False
  finally:
    aside.unlink()
  return True


class Lease:
  """The right to write to a run directory, renewed by a thread until `release`."""

  def __init__(self, workdir: Path):
    self.path, self.token, self.count = workdir / NAME, uuid.uuid4().hex, 0
    self.since, self.done = time.strftime("%Y-%m-%d %H:%M:%S"), threading.Event()
    self.lost = ""  # who has it, if it was taken from this process, which seemed dead
    _mine.add(self.token)
    try:
      while not self.take():
        pass
    except BaseException:
      _mine.discard(self.token)
      raise
    threading.Thread(target=self.renew, daemon=True).start()

  def content(self) -> bytes:
    pid = os.getpid()
    return json.dumps({
      "host": socket.gethostname(), "pid": pid, "since": self.since, "token": self.token,
      "machine": machine(), "born": born(pid), "sign_of_life": f"{self.count:012}"}).encode()

  def take(self) -> bool:
    """Whether the lease is ours; False: try again. Raises InUse where its holder lives.

    The right to follow a dead holder is a file of its own, named by that one: only one process can
    make it. Whoever makes it after the lease has gone on to another finds that out, and gives up.
    """
    if create(self.path, self.content()):
      return True
    path, chain = self.path, []
    while (holder := read(path)) is not None:
      if lives(path, holder):
        holder = read(path) or holder
        raise InUse(f"{self.path.parent} is being written by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')} since {holder.get('since', '?')}; two runs in one "
                    "directory would spoil each other: choose another --workdir, or wait for it")
      name = holder.get("token") or hashlib.sha256(path.read_bytes()).hexdigest()
      path = self.path.with_name(f"{NAME}.after.{name}")
      chain.append(path)
      if len(chain) == 1:
        first = holder
      if create(path, self.content()):
        break
    else:
      return False
    if read(self.path) != first:  # it went to another, who has put the chain away
      path.unlink(missing_ok=True)
      return False
    aside = self.path.with_name(f"{NAME}.{self.token}")
    aside.write_bytes(self.content())
    aside.replace(self.path)
    for path in chain:
      path.unlink(missing_ok=True)
    return True

  def renew(self):
    while not self.done.wait(RENEW):
      holder = self.held()
      if not holder:
        return
      self.count += 1
      with contextlib.suppress(OSError):
        if not self.path.exists():  # somebody removed it
          create(self.path, self.content())
        with self.path.open("r+b") as file:  # in place, of the same length: a full disk has room
          file.write(self.content())
          file.flush()
          os.fsync(file.fileno())

  def held(self) -> bool:
    """Whether it is still ours: not where this process stood still for so long as to seem dead."""
    try:
      holder = read(self.path)
    except OSError:  # a disk that does not answer tells nothing
      return True
    if holder and holder.get("token") != self.token:
      self.lost = f"process {holder.get('pid')} on {holder.get('host')}"
    return not self.lost

  def release(self):
    self.done.set()
    _mine.discard(self.token)
    with contextlib.suppress(OSError):
      if self.held():
        self.path.unlink()


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Lease | None]:
  """The lease of a run directory, which is made if it is not there; process 0 holds it for all.

  Raises InUse on every process, also where the directory cannot be written to.
  """
  lease, refused = None, "process 0 was refused the run directory"
  if jax.process_index() == 0:
    try:
      if workdir.is_file():
        raise InUse(f"--workdir={workdir} is a file: a run needs a folder of its own")
      workdir.mkdir(parents=True, exist_ok=True)
      lease = Lease(workdir)
    except (InUse, OSError) as error:
      refused = str(error)
  if not sharding.agreed(lease is not None):
    raise InUse(refused)
  try:
    yield lease
  finally:
    if lease:
      lease.release()
      with contextlib.suppress(OSError):
        workdir.rmdir()  # where nothing came of the run
