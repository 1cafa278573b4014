"""Prompts of a script: one of a flag or of standard input, or a file of them.  No JAX here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, DataError

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text to continue, or the messages of a chat to answer, [{"role": ..., "content": ...}, ...]; source: where it is from."""

  text: str | None = None
  messages: tuple[Mapping[str, Any], ...] | None = None
  source: str = dataclasses.field(default="prompt", compare=False)

  def in_chat(self, system: str | None = None) -> Prompt:
    """As messages: a text is what the user says.  `system`: a message before them, unless they begin with one of that role."""
    messages = self.messages or ({"role": "user", "content": self.text},)
    if system is not None and messages[0].get("role") != "system":
      messages = ({"role": "system", "content": system}, *messages)
    return Prompt(messages=messages, source=self.source)


def read_prompt(text: str) -> Prompt:
  """The prompt of a flag, where - is all of standard input; DataError where that is empty or not UTF-8."""
  if text != STANDARD_INPUT:
    return Prompt(text, source="--prompt")
  return Prompt(_decoded(sys.stdin.buffer.read(), "standard input"), source="standard input")


def read_prompts(path: str, settings: Collection[str] = ()) -> list[Prompt]:
  """The prompts of a file: of .jsonl {"prompt": text} or {"messages": [...]} a line, else a text a line; empty lines are none.

  Other keys of a line are left alone, but for `settings`, names of flags, which a line cannot have of its own.
  Raises ConfigError where there is no such file; DataError, with the line, for one that is empty, not UTF-8 or not such JSON.
  """
  file = Path(path)
  if not file.is_file():
    raise ConfigError(
      f"--prompts_file={path}: there is no such file; give one prompt a line, or JSON lines as .jsonl"
    )
  lines = [line.rstrip("\r") for line in _decoded(file.read_bytes(), str(path)).split("\n")]
  numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  if not numbered:
    raise DataError(f"{path}: found empty lines only, expected a prompt a line")
  if file.suffix != ".jsonl":
    return [Prompt(line, source=f"{path}, line {number}") for number, line in numbered]
  return [_of_json(f"{path}, line {number}", line, settings) for number, line in numbered]


def _of_json(where: str, line: str, settings: Collection[str]) -> Prompt:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise DataError(f"{where}: not JSON ({e})") from None
  expected = 'expected {"prompt": text} or {"messages": [{"role": text, "content": ...}, ...]}'
  if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
    raise DataError(f"{where}: found {line[:80]!r}, {expected}")
  if own := [key for key in row if key in settings]:
    raise DataError(f"{where}: found the setting {own[0]!r}, which all prompts share; give --{own[0]}")
  if "prompt" in row:
    if not isinstance(row["prompt"], str) or not row["prompt"]:
      raise DataError(f"{where}: found the prompt {row['prompt']!r}, {expected}")
    return Prompt(row["prompt"], source=where)
  messages = row["messages"]
  if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
    raise DataError(f"{where}: found the messages {str(messages)[:80]}, {expected}")
  return Prompt(messages=tuple(messages), source=where)


def _is_message(one: object) -> bool:
  return isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one


def _decoded(data: bytes, source: str) -> str:
  try:
    text = data.decode("utf-8-sig")  # some editors put a mark first
  except UnicodeDecodeError as e:
    raise DataError(f"{source}: not UTF-8 at byte {e.start} ({e.reason}); expected text") from None
  if not text:
    raise DataError(f"{source}: 0 bytes, expected a prompt")
  return text
