"""The entry of every script: flags first, then the work, and an exit code that says how it ended.

0 done (also --help), 1 a cell failed or a bug (with a traceback), 2 bad flag or configuration, 65 bad data,
74 disk or I/O, 75 stopped early (the same command continues).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.study import choices, compile_cache
from jaxllm.study.stop import STOPPED, Stopped

IO_ERROR = 74  # EX_IOERR
HELP = ("--help", "-help", "-h", "-?", "--helpfull", "-helpfull")


def run_app(
  main: Callable[[flags.FlagValues], int | None],
  check: Callable[[flags.FlagValues], None] | None = None,
  argv: list[str] | None = None,
  values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
  """Parses the flags, runs `check(flags)` and `main(flags)`, and exits with the code that fits.

  `check` is the script's own validation: it raises ConfigError, and imports nothing heavy. `main` returns an
  exit code, or None for 0. `argv` is `sys.argv` unless given (the program's name first). `--help` and errors
  in flags are answered before either is called. On the way jax's compilation cache is turned on.
  `values`: the script's flags, where they are not absl's global ones, so that scripts with flags of one name can be imported
  together.
  """
  code = _run(main, check, sys.argv if argv is None else argv, values)
  try:
    sys.stdout.flush()
  except OSError as e:  # a full disk or a closed pipe behind stdout: what was printed is lost
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
    e.filename = "standard output"
    code = code or _io_error(e)
  sys.exit(code)


def _run(main, check, argv, values) -> int:
  try:
    arguments = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if any(argument in HELP for argument in arguments):
      print(_help(main, values))
      return 0
    _parse(argv, values)
    # Outside of a StopFlag there is nothing to save: SIGTERM ends the run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    compile_cache.turn_on()
    if check is not None:
      check(values)
    code = main(values)
    assert code is None or isinstance(code, int), f"main returned {code!r}, not an exit code"
    return code or 0
  except JaxllmError as e:
    return _say(f"error: {e}", e.exit_code)
  except OSError as e:
    return _io_error(e)
  except (Stopped, KeyboardInterrupt):
    return _say("stopped early: run the same command again to continue", STOPPED)
  except Exception:
    return _say(traceback.format_exc().rstrip(), 1)


def _say(text: str, code: int) -> int:
  print(text, file=sys.stderr, flush=True)
  return code


def _io_error(e: OSError) -> int:
  if e.errno == errno.EPIPE:  # the reader has seen enough
    return IO_ERROR
  advice = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "move the file that stands where a directory is needed",
    errno.EEXIST: "move the file that stands where a directory is needed",
    errno.EISDIR: "move the directory that stands where a file is needed",
    errno.EIO: "check the disk",
  }.get(e.errno, "mend that")
  where = f"{e.filename}: " if e.filename is not None else ""
  return _say(f"error: {where}{e.strerror or e}; {advice}, then run the same command again", IO_ERROR)


def _parse(argv: list[str], values: flags.FlagValues) -> None:
  """Parses into `values`; raises a ConfigError of one line: the flag, the value and what is allowed."""
  try:
    rest = values([argv[0], *(_underscored(argument, values) for argument in argv[1:])])[1:]
  except flags.UnrecognizedFlagError as e:
    near = choices.nearest(e.flagname, list(values), prefix="--")
    raise ConfigError(f"there is no flag --{e.flagname}{near} (--help lists the flags)") from None
  except flags.Error as e:
    raise ConfigError(_flag_error(str(e), values)) from None
  if rest:
    raise ConfigError(f"{rest[0]!r} is not a flag; flags are written --name=value (--help lists them)")


def _underscored(argument: str, values: flags.FlagValues) -> str:
  """--top-k as --top_k, where there is such a flag."""
  name, *value = argument.split("=", 1)
  known = name.lstrip("-").replace("-", "_")
  if (
    not name.startswith("--")
    or "-" not in name.lstrip("-")
    or not {known, known.removeprefix("no")} & {*values}
  ):
    return argument
  return "=".join([f"--{known}", *value])


def _flag_error(message: str, values: flags.FlagValues) -> str:
  """absl's message, with what is allowed in place of the parser's own exception."""
  message = " ".join(message.split())
  match = re.match(r"flag --(\w+)=(.*?): (.*)", message)
  if match is None or match[1] not in values:
    return message
  name, value, reason = match.groups()
  flag = values[name]
  if value == "None":
    return f"--{name} is required: {_sentence(flag.help)}"
  if isinstance(flag, flags.EnumFlag):
    allowed = "one of " + ", ".join(flag.parser.enum_values)
  else:
    allowed = "true or false" if flag.boolean else flag.parser.syntactic_help
  problem = f"found {value!r}, expected {allowed}" if allowed else reason
  return f"--{name}={value}: {problem}"


def _sentence(text: str) -> str:
  return " ".join(text.split())


def _help(main: Callable, values: flags.FlagValues) -> str:
  """The docstring of the script, its flags, and jaxllm's."""
  script = sys.modules[main.__module__]
  own = sys.argv[0] if script.__name__ == "__main__" else script.__name__  # absl's name for the main module
  lines = [(script.__doc__ or "").strip(), "", "flags (--name=value; --name or --noname for yes or no):"]
  for module, defined in sorted(values.flags_by_module_dict().items(), key=lambda item: item[0] != own):
    if module == own or module.split(".")[0] == "jaxllm":
      lines += [text for flag in defined for text in _flag_help(flag)]
  return "\n".join(lines)


def _flag_help(flag: flags.Flag) -> list[str]:
  default = "no default" if flag.default is None else f"default {flag.default_as_str.strip(chr(39))}"
  margin = " " * 6
  about = textwrap.wrap(_sentence(flag.help or ""), 104, initial_indent=margin, subsequent_indent=margin)
  return [f"  --{flag.name}  ({default})", *about]
