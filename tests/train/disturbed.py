"""Starts runs of trainee.py, reads what they tell, and ends them."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Server:
  """A process that has imported everything and forks runs, one at a time."""

  def __init__(self, log):
    self.log = Path(log)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (ROOT, HERE))), JAX_PLATFORMS="cpu")
    flags = (flag for flag in env.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    env["XLA_FLAGS"] = " ".join(flags)
    pipe, log = subprocess.PIPE, open(self.log, "ab")  # noqa: SIM115 the process has it
    self._process = subprocess.Popen(
      [sys.executable, str(HERE / "trainee.py")], stdin=pipe, stdout=pipe, stderr=log, env=env, cwd=ROOT
    )
    log.close()

  def close(self):
    self._process.stdin.close()
    self._process.wait(60)
    self._process.stdout.close()

  def start(self, run, out, **request):
    """A run; its words are read by `Run.next`."""
    request = {"run": run, "out": str(out), "log": str(self.log), **request}
    self._process.stdin.write(json.dumps(request).encode() + b"\n")
    self._process.stdin.flush()
    run = Run(self._process.stdout)
    while run.next()[0] != "PID":  # the child may speak first
      pass
    run.pid = int(next(words[1] for words in run.told if words[0] == "PID"))
    return run

  def to_end(self, run, out, **request):
    """A run that nobody disturbs."""
    run = self.start(run, out, **request)
    run.end()
    return run


class Run:
  """What a run has told, as lists of words, and its status once it has ended."""

  def __init__(self, stream):
    self._stream, self._rest = stream.fileno(), b""
    self.told, self.status, self.pid = [], None, None

  def next(self, timeout=None):
    """The next words; None at the end, [] where none came in `timeout` seconds."""
    if self.status is not None:
      return None
    while b"\n" not in self._rest:
      if timeout is not None and not select.select([self._stream], [], [], timeout)[0]:
        return []
      data = os.read(self._stream, 1 << 16)
      assert data, "the server has ended"
      self._rest += data
    line, _, self._rest = self._rest.partition(b"\n")
    words = line.decode().split()
    self.told.append(words)
    if words[0] == "EXIT":
      self.status = int(words[1])
    return words

  def until(self, word):
    """Reads to a line that begins with `word`; None where the run ends before."""
    if found := self.all(word):
      return found[-1]
    while (words := self.next()) is not None:
      if words[0] == word:
        return words

  def end(self, number=None):
    """Sends a signal, if there is one, reads the rest, and gives the status."""
    if number is not None:
      os.kill(self.pid, number)
    while self.next() is not None:
      pass
    return self.status

  def kill(self):
    return self.end(signal.SIGKILL)

  def all(self, word):
    return [words for words in self.told if words[0] == word]

  def saved(self):
    """{step: digest} of what was announced as saved."""
    return {int(step): sha for _, step, sha in self.all("SAVED")}


def half_saved(out):
  """Directories of a save that has begun and not ended."""
  return list(Path(out).glob("*.saving"))
