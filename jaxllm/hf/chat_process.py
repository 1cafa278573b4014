"""The process that `chat.render` starts: one request on standard input, one answer on standard output, little memory.

It is run as a file, by itself, and imports nothing of this package: {path, template, values, characters, memory} to
{text} or {error}, in JSON.
"""

import datetime
import json
import sys


def main() -> None:
  """Answer the request."""
  request = json.load(sys.stdin)
  sys.path[:] = request["path"]
  _limit_memory(request["memory"])
  try:
    answer = {"text": render(request["template"], request["values"], request["characters"])}
  except Exception as e:  # the template is somebody's program
    answer = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
  json.dump(answer, sys.stdout)


def render(template: str, values: dict, characters: int) -> str:
  """The text of a template, in an ImmutableSandboxedEnvironment; raises whatever it raises."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

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
  pieces, length = [], 0
  for piece in environment.from_string(template).generate(**values):
    pieces.append(piece)
    length += len(piece)
    if length > characters:
      refuse(f"stopped after {length:,} characters; expected at most {characters:,}")
  return "".join(pieces)


def _json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """As text, where Jinja's own filter would escape it for HTML."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _limit_memory(size: int) -> None:
  """Where the system has such limits; elsewhere time and output are limited only."""
  try:
    import resource
  except ImportError:
    return
  resource.setrlimit(resource.RLIMIT_AS, (size, size))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file grows


if __name__ == "__main__":
  main()
