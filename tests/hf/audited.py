"""Loads directories in a process where nothing may be run, and prints what came of each.

`python audited.py GOOD DIRECTORY...`: GOOD is loaded first, which imports all there is to import.  From then on an audit hook
(PEP 578) ends the process where a pickle looks a global up, code is compiled or run, a program is started, a socket
connected, or a file opened outside of the directories: what reads files here is written in Python, so that the hook sees every
opening (tokenizers gets bytes, and safetensors is not asked).
"""

import json
import os
import pickle  # noqa: F401 (before the hook sees imports, as the two below)
import socket  # noqa: F401
import subprocess  # noqa: F401
import sys
import types
from pathlib import Path

from jaxllm import hf
from jaxllm.errors import JaxllmError

FORBIDDEN = {
  *(
    "pickle.find_class",
    "exec",
    "compile",
    "import",
    "marshal.loads",
    "ctypes.dlopen",
    "socket.connect",
    "socket.getaddrinfo",
  ),
  *(
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "shutil.rmtree",
    "os.remove",
    "os.rename",
  ),
}
HARMLESS = ("/proc/cpuinfo", "/proc/self/", "/sys/")


def watch(roots):
  """The hook; `os.write` and `os._exit`, as an exception could be caught on the way."""

  def hook(event, args):
    bad = event in FORBIDDEN
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
      path = os.path.abspath(os.fsdecode(args[0]))
      bad = not path.startswith((*roots, *HARMLESS))
    if bad:
      os.write(2, f"{event} {args!r}"[:2000].encode())
      os._exit(99)

  sys.addaudithook(hook)


def controls(codes):
  """Runs each text in a process of its own that is watched, and prints their exit codes."""
  found = []
  for code in codes.values():
    compiled = compile(code, "control", "exec")
    if (child := os.fork()) == 0:
      watch(["/none/"])
      types.FunctionType(compiled, {"__builtins__": __builtins__})()  # without an event of its own
      os._exit(0)
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os.write(2, b"\n")
  print(json.dumps(found))


def outcome(call, directory):
  """ok, or the error's name and message."""
  try:
    call(directory)
    return "ok"
  except JaxllmError as e:
    return f"{type(e).__name__}: {e}"


def main():
  """All directories, by `hf.load` and `hf.load_tokenizer`."""
  first, *directories = sys.argv[1:]
  hf.load(first)
  hf.load_tokenizer(first)
  outcome(hf.load, "/none")
  watch([f"{Path(directory).resolve()}/" for directory in directories])
  found = {
    directory: [outcome(call, directory) for call in (hf.load, hf.load_tokenizer)]
    for directory in directories
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
