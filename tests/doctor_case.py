"""The doctor, called in this process."""

import signal

import pytest
from absl.testing import flagsaver

from jaxllm import doctor
from jaxllm.study import run_app


def call(*args):
  """The exit code of doctor with these flags."""
  handler, saved = signal.getsignal(signal.SIGTERM), flagsaver.save_flag_values(doctor.FLAGS)
  try:
    with pytest.raises(SystemExit) as e:
      run_app(doctor.main, doctor.check, argv=["doctor", *args], values=doctor.FLAGS)
  finally:
    flagsaver.restore_flag_values(saved, doctor.FLAGS)
    signal.signal(signal.SIGTERM, handler)
  return e.value.code
