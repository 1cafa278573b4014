"""Activations and the feed-forward layers built of them, as values."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.errors import ConfigError


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) by erf, as in the paper and torch's default (jax.nn.gelu's default is the tanh approximation, 4.7e-4 off).

  Source: Hendrycks and Gimpel (2016).
  """
  return jax.nn.gelu(x, approximate=False)


def silu(x: jax.Array) -> jax.Array:
  """x sigmoid(x), also called Swish with beta = 1.  Source: Elfwing et al. (2017); Ramachandran et al. (2017)."""
  return jax.nn.silu(x)


ACTIVATIONS = {"gelu": gelu, "silu": silu}


def _check_activation(owner) -> None:
  if owner.activation not in ACTIVATIONS:
    allowed = ", ".join(sorted(ACTIVATIONS))
    raise ConfigError(
      f"{type(owner).__name__}.activation: found {owner.activation!r}, expected one of {allowed}"
    )


@dataclasses.dataclass(frozen=True)
class Glu:
  """down(act(gate(x)) * up(x)): the gate is the activated half.  silu makes it SwiGLU.  Source: Shazeer (2020)."""

  activation: str = "silu"
  inputs = ("gate", "up")

  def __post_init__(self):
    _check_activation(self)

  def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its two projections."""
    return ACTIVATIONS[self.activation](gate) * up


@dataclasses.dataclass(frozen=True)
class Mlp:
  """down(act(up(x))).  Source: Vaswani et al. (2017), section 3.3, with the activation as a choice."""

  activation: str = "gelu"
  inputs = ("up",)

  def __post_init__(self):
    _check_activation(self)

  def __call__(self, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its projection."""
    return ACTIVATIONS[self.activation](up)


MLPS = {"glu": Glu, "mlp": Mlp}
