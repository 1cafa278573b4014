"""Answers to one line after another, from standard input."""

from __future__ import annotations

import signal
import sys
from typing import Any

import jax

from experiments.continuing import Drawing, continued
from experiments.showing import note, write
from experiments.source import On, Source
from jaxllm.errors import DataError, JaxllmError
from jaxllm.generate.text import StopStrings, Stream
from jaxllm.study.stop import STOPPED


def talk(
  source: Source,
  params: Any,
  method: On,
  drawing: Drawing,
  key: jax.Array,
  stops: list[str],
  chat: bool,
  system: str | None,
) -> int:
  """Answer each line until there is no more; 0.

  chat: a line is said after all that was said before; otherwise each is a text of its own, which is continued.  Ctrl-C ends an
  answer, of which what is shown stays in the dialogue, and between answers the program.  What is wrong with one line (as a
  dialogue beyond the model's positions) is told, and the dialogue goes on without it.
  """
  signal.signal(
    signal.SIGTERM, lambda *_: sys.exit(STOPPED)
  )  # elsewhere as Ctrl-C, which here ends answers only
  said, turn = [], 0
  if system is not None:
    said.append({"role": "system", "content": system})
  while True:
    try:
      line = _line()
    except DataError as e:
      note(f"error: {e}")
      continue
    if line is None:
      return 0
    messages = [*said, {"role": "user", "content": line}]
    ids = answer = None
    try:
      ids = source.tokenizer.chat(messages) if chat else source.tokenizer.encode(line)
      before = [ids] if ids else []
      stop = StopStrings(stops, source.decode, broken=source.broken, prompts=before)
      answer = Stream(source.decode, source.broken, ids, stop)
      own = jax.random.fold_in(key, turn)[None]
      continued(
        source,
        params,
        method,
        drawing,
        before,
        own,
        stop,
        lambda _, new, answer=answer: write(answer.push(new)),
      )
    except KeyboardInterrupt:
      note("\n[the answer ends here; Ctrl-C once more ends the program]")
    except JaxllmError as e:
      note(f"error: {e}")
      continue
    if answer is not None:
      write(answer.finish() + "\n")
      said = [*messages, {"role": "assistant", "content": answer.text}]
    turn += 1


def _line() -> str | None:
  """The next line that is not empty; None at the end, or for Ctrl-C."""
  while True:
    if sys.stdin.isatty():
      print("> ", end="", file=sys.stderr, flush=True)
    try:
      line = sys.stdin.buffer.readline()
    except KeyboardInterrupt:
      line = b""
    if not line:
      if sys.stdin.isatty():
        note("")
      return None
    try:
      text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as e:
      raise DataError(
        f"standard input: not UTF-8 at byte {e.start} of a line ({e.reason}); expected text"
      ) from None
    if text.strip():
      return text
