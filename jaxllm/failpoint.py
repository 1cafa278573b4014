"""Named places where a process can be made to kill itself, for tests of what a crash leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

VARIABLE = "JAXLLM_FAILPOINT"
"""name:n, as in manifest_half:3: SIGKILL at the n-th passing of the place of that name.  For tests of crash safety only."""


def failpoint(name: str, before: Callable[[], object] | None = None) -> None:
  """Ends the process by SIGKILL where VARIABLE says so; without that variable nothing is done.

  before: what is done right before, such as half of a write.  The passings that are left are counted in the variable itself.
  """
  wanted = os.environ.get(VARIABLE)
  if wanted is None:
    return
  armed, _, passings = wanted.rpartition(":")
  if armed != name:
    return
  if int(passings) > 1:
    os.environ[VARIABLE] = f"{name}:{int(passings) - 1}"
    return
  if before is not None:
    before()
  os.kill(os.getpid(), signal.SIGKILL)
