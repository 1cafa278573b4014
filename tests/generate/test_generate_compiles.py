"""What compiles: two programs, for prompts and for decoding; sampler parameters, ids and tables are data."""

import contextlib

import jax
import pytest

from jaxllm.generate.loop import generate
from jaxllm.sampling import TopK

core = pytest.mark.core
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
  """The compilations that happen inside: a list that grows."""
  seen = []

  def listener(event, duration, **_):
    if event == COMPILED:
      seen.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


@core
def test_what_differs_in_data_alone_does_not_compile_again(shallow):
  model, params = shallow
  usual = {
    "prompts": [[1, 2, 3], [4], [5, 6]],
    "sampler": TopK([0, 0, 0]),
    "key": jax.random.key(0),
    "max_new_tokens": 9,
    "stop_ids": (),
    "chunk": 5,  # a decoding program of this test alone
    "rope": model.cfg.rope_tables(),
  }
  with compilations() as seen:
    generate(model, params, **usual)
  assert seen
  others = [
    {"prompts": [[7] * 16, [8] * 2, [9]]},
    {"sampler": TopK([5, 1, 0])},
    {"key": jax.random.key(1)},
    {"max_new_tokens": 100},
    {"stop_ids": (5, 6, 7)},
    {"rope": model.cfg.with_position("yarn", factor=4.0).rope_tables()},
    {"rope": None},
  ]
  for other in others:
    with compilations() as seen:
      generate(model, params, **(usual | other))
    assert not seen, other
  with compilations() as seen:  # another bucket in a cache of the same capacity: the prompts' program alone
    generate(model, params, **(usual | {"prompts": [[9] * 64, [4], [5]]}))
  assert len(seen) == 1
