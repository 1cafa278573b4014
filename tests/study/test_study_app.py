"""run_app as a user meets it: a script in its own process, judged by exit code and what it prints."""

import os
import pwd
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.errors import ConfigError
from jaxllm.study import compile_cache
from jaxllm.study.choices import choice_list, number_list, positive

ROOT = Path(__file__).parents[2]

SCRIPT = '''"""Measures how long a piece of string is.

Runs on any string.
"""
import errno, hashlib, os, sys, time
from absl import flags
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.study import run_app
from jaxllm.study.stop import StopFlag, Stopped

flags.DEFINE_string("out", None, "Directory of the results.", required=True)
flags.DEFINE_integer("steps", 100, "Training steps.", lower_bound=1)
flags.DEFINE_enum("kind", "plain", ["plain", "fancy"], "Kind of string.")
flags.DEFINE_float("rate", 1e-3, "Learning rate.")
flags.DEFINE_bool("smoke", False, "A short run.")

def check(flags):
  assert "jax" not in sys.modules
  if flags.steps == 13:
    raise ConfigError("--steps=13: unlucky, use 14")

def main(flags):
  BODY

if __name__ == "__main__":
  run_app(main, check)
'''


def start(tmp_path, body, *args, **kw):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT.replace("BODY", body.replace("\n", "\n  ")))
  env = {name: item for name, item in os.environ.items() if not name.startswith("JAX_")}
  env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), **kw.pop("env", {})}
  return subprocess.Popen(
    [sys.executable, script, *args], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw
  )


def run(tmp_path, body="pass", *args, **kw):
  process = start(tmp_path, body, *args, **kw)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize(
  "body, code, message",
  [
    ("pass", 0, r"^$"),
    ("return 0", 0, r"^$"),
    ("return 1", 1, r"^$"),
    ("return 'fine'", 1, r"Traceback.*main returned 'fine'"),
    ("raise ConfigError('--kind: no')", 2, r"^error: --kind: no\n$"),
    ("raise DataError('text.bin: empty')", 65, r"^error: text.bin: empty\n$"),
    ("raise CheckpointError('w.safetensors: cut')", 65, r"^error: w.safetensors: cut\n$"),
    ("open('/absent/file')", 74, r"^error: /absent/file: No such file or directory; check the path"),
    (
      "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'a.csv')",
      74,
      r"a.csv: No space left.*free some",
    ),
    (
      "raise OSError(errno.EROFS, os.strerror(errno.EROFS), 'a.csv')",
      74,
      r"a.csv: Read-only.*choose a place",
    ),
    ("raise Stopped('SIGTERM')", 75, r"run the same command again to continue"),
    ("raise KeyboardInterrupt", 75, r"run the same command again to continue"),
    ("1 / 0", 1, r"Traceback.*script.py.*ZeroDivisionError"),
  ],
)
def test_each_ending_has_its_code_and_words(tmp_path, body, code, message):
  found, _, err = run(tmp_path, body, "--out=x")
  assert found == code
  assert re.search(message, err, re.DOTALL), err
  assert ("Traceback" in err) == (code == 1 and body != "return 1")


@pytest.mark.parametrize(
  "args, message",
  [
    (["--stesp=3", "--out=x"], "there is no flag --stesp; did you mean --steps? (--help lists the flags)"),
    (["--out=x", "--nosmok"], "there is no flag --nosmok; did you mean --smoke? (--help lists the flags)"),
    (["--steps=abc", "--out=x"], "--steps=abc: found 'abc', expected a positive integer"),
    (["--steps=0", "--out=x"], "--steps=0: found '0', expected a positive integer"),
    (["--kind=odd", "--out=x"], "--kind=odd: found 'odd', expected one of plain, fancy"),
    (["--smoke=perhaps", "--out=x"], "--smoke=perhaps: found 'perhaps', expected true or false"),
    (["--rate=fast", "--out=x"], "--rate=fast: found 'fast', expected a number"),
    ([], "--out is required: Directory of the results."),
    (["--out=x", "more"], "'more' is not a flag; flags are written --name=value (--help lists them)"),
    (["--out=x", "--steps=13"], "--steps=13: unlucky, use 14"),
  ],
)
def test_bad_flags_are_one_line_and_end_with_2(tmp_path, args, message):
  code, out, err = run(tmp_path, "print('ran')", *args)
  assert (code, out, err) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--unknown", "--helpfull"]])
def test_help_is_the_docstring_and_the_scripts_flags_at_once(tmp_path, args):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  code, out, err = run(tmp_path, "print('ran')", *args)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # however busy the machine
  assert (code, err) == (0, "")
  assert out.startswith("Measures how long a piece of string is.\n\nRuns on any string.\n\nflags")
  assert "  --steps  (default 100)\n      Training steps.\n" in out
  assert "ran" not in out and "flagfile" not in out


def test_output_that_cannot_be_written_is_never_a_success(tmp_path):
  with open("/dev/full", "w") as full:
    process = start(tmp_path, "print('lost')", "--out=x")
    process.communicate()
    assert process.returncode == 0
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
      [sys.executable, tmp_path / "script.py", "--out=x"], stdout=full, stderr=subprocess.PIPE, env=env
    )
  assert done.returncode == 74 and b"No space left on device" in done.stderr


def test_the_compilation_cache_is_on_before_jax_and_the_users_settings_win(tmp_path):
  show = "print(*sorted(k + '=' + v for k, v in os.environ.items() if k.startswith('JAX_')), sep='\\n')"
  _, out, _ = run(tmp_path, show, "--out=x")
  assert re.search(rf"JAX_COMPILATION_CACHE_DIR={tmp_path}/cache/jaxllm/xla-[0-9a-f]{{8}}\n", out)
  assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1\n" in out
  assert "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1\n" in out
  _, out, _ = run(tmp_path, show, "--out=x", env={"JAX_COMPILATION_CACHE_DIR": "/mine"})
  assert "JAX_COMPILATION_CACHE_DIR=/mine\n" in out


def test_a_cache_that_cannot_be_made_is_only_a_warning(tmp_path):
  (tmp_path / "cache").write_text("a file in the way")
  code, out, err = run(tmp_path, "print('ran')", "--out=x")
  assert (code, out) == (0, "ran\n")
  assert err.startswith("warning: no compilation cache in ")


def test_a_cache_of_a_user_without_a_home_is_only_a_warning(monkeypatch, capsys):
  for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"):
    monkeypatch.setenv(name, "1")
  for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
  compile_cache.turn_on()
  assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
  assert re.fullmatch(r"warning: no compilation cache in ~/.*: .*home directory.*\n", capsys.readouterr().err)


STEPS = """
with StopFlag() as stop:
  for step in range(1000):
    print(step, flush=True)
    time.sleep(0.01)
    stop.check()
"""


def signalled(process, *signals, gap=0.4):
  process.stdout.readline()
  for i, number in enumerate(signals):
    time.sleep(gap if i else 0)
    process.send_signal(number)
  try:
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
  return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_loop_at_a_safe_point(tmp_path, number):
  code, _, err = signalled(start(tmp_path, STEPS, "--out=x"), number)
  assert code == 75
  assert f"{number.name}: stopping at the next safe point" in err
  assert err.endswith("stopped early: run the same command again to continue\n")


def test_one_request_delivered_twice_is_not_a_second_request(tmp_path):
  slow = STEPS.replace("0.01", "0.5")  # both come within a step, on a machine at work too
  code, _, err = signalled(start(tmp_path, slow, "--out=x"), signal.SIGTERM, signal.SIGTERM, gap=0.005)
  assert code == 75 and err.endswith("again to continue\n")


def test_a_second_signal_ends_even_a_long_compilation_at_once(tmp_path):
  # One C call that lets other threads run but returns to Python after minutes only, as a compilation does.
  body = "with StopFlag():\n  print('in', flush=True)\n  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
  process = start(tmp_path, body, "--out=x")
  code, _, err = signalled(process, signal.SIGINT, signal.SIGINT, gap=1.0)
  assert code == 75
  assert err.endswith("second signal: ending now\n")


def test_sigterm_outside_a_stop_flag_is_an_early_stop_too(tmp_path):
  body = "print(1, flush=True)\nfor _ in range(6000):\n  time.sleep(0.01)"
  code, _, err = signalled(start(tmp_path, body, "--out=x"), signal.SIGTERM)
  assert (code, err) == (75, "stopped early: run the same command again to continue\n")


def test_study_is_light_to_import():
  names = "app cells choices files findings interval plots progress report rows stop"
  code = f"import sys; from jaxllm.study import {', '.join(names.split())}; print(*sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert not {"jax", "flax", "matplotlib", "numpy", "rich"} & set(done.stdout.split())


ALLOWED = ["none", "ntk", "ntk_fixed", "yarn"]


def test_lists_of_names():
  assert choice_list("methods", "yarn,ntk", ALLOWED) == ("yarn", "ntk")
  assert choice_list("methods", "all", ALLOWED) == tuple(ALLOWED)
  for text, message in [
    (
      "yarm",
      "--methods=yarm: 'yarm' is not known; did you mean yarn?; allowed: all, none, ntk, ntk_fixed, yarn",
    ),
    ("yarn,ntk,yarn", "--methods=yarn,ntk,yarn: 'yarn' is there twice; give each once"),
    ("all,yarn", "--methods=all,yarn: 'all' is not known; allowed: all, none, ntk, ntk_fixed, yarn"),
    ("", "--methods=: an empty item; give values separated by commas, as in a,b,c"),
  ]:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
      choice_list("methods", text, ALLOWED)


def test_lists_of_numbers():
  assert number_list("lengths", "128, 256") == (128, 256)
  assert number_list("factors", "0.5,2", kind=float, minimum=None) == (0.5, 2.0)
  for text, kind, message in [
    ("128,abc", int, "--lengths=128,abc: found 'abc', expected a whole number of at least 1"),
    ("1.5", int, "--lengths=1.5: found '1.5', expected a whole number of at least 1"),
    ("0", int, "--lengths=0: found '0', expected a whole number of at least 1"),
    ("nan", float, "--lengths=nan: found 'nan', expected a number of at least 1"),
    ("inf", float, "--lengths=inf: found 'inf', expected a number of at least 1"),
    ("8,08", int, "--lengths=8,08: '08' is there twice; give each number once"),
  ]:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
      number_list("lengths", text, kind)


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf")])
def test_positive(value):
  assert positive("lr", 3e-4) == 3e-4
  with pytest.raises(ConfigError, match=r"^--lr=.*expected a number above 0$"):
    positive("lr", value)


COMPILE = """
import jax
jax.monitoring.register_event_listener(lambda name, **kw: print(name))
print(jax.jit(lambda x: sum(jax.numpy.sin(i * x) for i in range(40)))(1.0).shape)
"""


def test_a_torn_entry_of_the_cache_is_written_again(tmp_path):
  """jax itself would warn of it in every later run."""
  always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  assert run(tmp_path, COMPILE, "--out=x", env=always)[0] == 0
  entries = list((tmp_path / "cache").rglob("jit__lambda*-cache"))
  assert entries
  for entry in entries:
    entry.write_bytes(entry.read_bytes()[:100])
  code, _, err = run(tmp_path, COMPILE, "--out=x", env=always)
  assert code == 0 and "Error reading persistent compilation cache entry" in err
  code, out, err = run(tmp_path, COMPILE, "--out=x", env=always)
  assert code == 0 and "Error reading" not in err
  assert "/jax/compilation_cache/cache_hits" in out


def test_a_cache_that_grows_too_large_loses_what_was_not_used_for_longest(tmp_path):
  for i in range(10):
    entry = tmp_path / f"jit_f-{i}-cache"
    entry.write_bytes(b"x" * 10)
    os.utime(entry, ns=(10**9 * (20 - i), 10**9))
  compile_cache._bound(tmp_path, 100)
  assert len(list(tmp_path.iterdir())) == 10
  compile_cache._bound(tmp_path, 99)
  assert sorted(path.name for path in tmp_path.iterdir()) == [f"jit_f-{i}-cache" for i in range(4)]
