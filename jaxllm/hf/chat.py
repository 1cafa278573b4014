"""Chat templates, which are programs of the checkpoint's author, in Jinja's sandbox and nowhere else."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import TokenizerError
from jaxllm.hf import hub

CHARACTERS, SECONDS = 4_000_000, 5.0
"""No chat comes near: a template that writes more, or for longer, is stopped."""
SAFE_JINJA = (3, 1, 6)
"""Earlier sandboxes have known ways out."""


def render(template: str, values: Mapping[str, Any], source: str) -> str:
  """The text that a template writes for its variables, as transformers would render it.

  In an ImmutableSandboxedEnvironment, with plain JSON values: no attribute that leads out of them, no change to them, no files,
  no imports.  Raises TokenizerError for whatever goes wrong, what the template itself refuses included.
  """
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError:
    raise TokenizerError(
      f"{source}: the package jinja2 renders its chat template; install the extra `hub` ({hub.INSTALL})"
    ) from None
  if tuple(map(int, re.findall(r"[0-9]+", jinja2.__version__)[:3])) < SAFE_JINJA:
    raise TokenizerError(
      f"{source}: its chat template is not rendered by jinja2 {jinja2.__version__}, whose sandbox has holes; "
      f"pip install -U 'jinja2>={'.'.join(map(str, SAFE_JINJA))}'"
    )
  try:
    plain = json.loads(json.dumps(dict(values)))
  except (TypeError, ValueError) as e:
    raise TokenizerError(
      f"messages: {e}; expected lists, objects, texts and numbers only, as JSON has them"
    ) from None

  class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what training learns from, and writes what is in it."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      return jinja2.nodes.Scope(body, lineno=line)

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _json
  environment.globals |= {
    "raise_exception": refuse,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
  }
  del environment.globals["lipsum"]
  pieces, length, end = [], 0, time.monotonic() + SECONDS
  try:
    for piece in environment.from_string(template).generate(**plain):
      pieces.append(piece)
      length += len(piece)
      if length > CHARACTERS or time.monotonic() > end:
        refuse(f"stopped after {length:,} characters; expected at most {CHARACTERS:,} in {SECONDS:g} s")
  except Exception as e:  # the template is somebody's program
    raise TokenizerError(f"{source}: the chat template failed ({type(e).__name__}: {str(e)[:300]})") from None
  return "".join(pieces)


def _json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """As text, where Jinja's own filter would escape it for HTML."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
