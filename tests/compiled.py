"""Compilations, counted as JAX reports them; those that its cache on disk spares count too."""

import contextlib

import jax

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
