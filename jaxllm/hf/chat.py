"""Chat templates, which are programs of the checkpoint's author, in Jinja's sandbox, in a process of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import TokenizerError
from jaxllm.hf import hub

CHARACTERS, SECONDS, MEMORY = 4_000_000, 5.0, 1 << 30
"""No chat comes near: a template that writes more, for longer, or with more bytes of memory, is stopped."""
SAFE_JINJA = (3, 1, 6)
"""Earlier sandboxes have known ways out."""
PROCESS = Path(__file__).with_name("chat_process.py")
KEPT = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""What the process gets of the environment, which may hold secrets: what it needs to start, and the time zone."""


def render(template: str, values: Mapping[str, Any], source: str) -> str:
  """The text that a template writes for its variables, as transformers would render it.

  In an ImmutableSandboxedEnvironment, with plain JSON values: no attribute that leads out of them, no change to them, no files,
  no imports.  The sandbox does not stop a loop or a text that grows, so it is in a process of its own, which is ended when it
  takes longer than SECONDS (it starts in a tenth of one).  Raises TokenizerError for whatever goes wrong, what the template
  itself refuses included.
  """
  try:
    import jinja2
  except ImportError:
    raise TokenizerError(
      f"{source}: the package jinja2 renders its chat template; install the extra `hub` ({hub.INSTALL})"
    ) from None
  if tuple(map(int, re.findall(r"[0-9]+", jinja2.__version__)[:3])) < SAFE_JINJA:
    raise TokenizerError(
      f"{source}: its chat template is not rendered by jinja2 {jinja2.__version__}, whose sandbox has holes; "
      f"pip install -U 'jinja2>={'.'.join(map(str, SAFE_JINJA))}'"
    )
  request = {
    "path": [path for path in sys.path if path],
    "template": template,
    "values": dict(values),
    "characters": CHARACTERS,
    "memory": MEMORY,
  }
  try:
    text = json.dumps(request)
  except (TypeError, ValueError, RecursionError) as e:
    raise TokenizerError(
      f"messages: {e}; expected lists, objects, texts and numbers only, as JSON has them"
    ) from None
  answer = _answer(text.encode(), source)
  if "error" in answer:
    raise TokenizerError(f"{source}: the chat template failed ({answer['error']})")
  return answer["text"]


def _answer(request: bytes, source: str) -> dict[str, str]:
  """What the process answers."""
  command = [sys.executable, "-I", "-X", "utf8", str(PROCESS)]
  environment = {name: os.environ[name] for name in KEPT if name in os.environ}
  try:
    done = subprocess.run(
      command, input=request, capture_output=True, timeout=SECONDS, env=environment, check=False
    )
  except subprocess.TimeoutExpired:
    raise TokenizerError(
      f"{source}: the chat template failed (stopped after {SECONDS:g} s; expected an answer within that)"
    ) from None
  try:
    return json.loads(done.stdout)
  except ValueError:  # ended by the system, for its memory say
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
    raise TokenizerError(
      f"{source}: the chat template failed (its process ended with {done.returncode}: {last or 'no message'})"
    ) from None
