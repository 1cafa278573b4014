"""A length-extrapolation sweep of seconds, run in this process."""

import signal

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import length_extrapolation
from jaxllm.study import run_app

TINY = (
  "--train_length=16",
  "--lengths=16,32",
  "--methods=none,pi,yarn,ntk,rerope",
  "--schemes=rope,alibi",
  "--steps=8",
  "--other_steps=4",
  "--learning_rate=3e-2",
  "--embed_dim=16",
  "--num_layers=1",
  "--mlp_dim=24",
  "--windows=2",
  "--batch_size=4",
)


def run(*args, script=length_extrapolation, check=length_extrapolation.read_settings):
  """The exit code of a script with these flags."""
  handler, values = signal.getsignal(signal.SIGTERM), getattr(script, "FLAGS", flags.FLAGS)
  saved = flagsaver.save_flag_values(values)
  try:
    with pytest.raises(SystemExit) as e:
      run_app(script.main, check=check, argv=[script.__name__, *args], values=values)
  finally:
    flagsaver.restore_flag_values(saved, values)
    signal.signal(signal.SIGTERM, handler)
  return e.value.code


def settings_of(*args):
  """The sweep's settings with these flags."""
  with flagsaver.flagsaver():
    flags.FLAGS(["length_extrapolation", *args])
    return length_extrapolation.read_settings(flags.FLAGS)
