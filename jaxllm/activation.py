"""Activations and the feed-forward layers built of them, as values; how a fused gate and up is split; width rules.

An activation returns the type of its input.  Those with an exponential are computed in float32 or wider: in float16 the
gradient of the tanh form at 6e4 would be 0 * inf.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError, check_choice, check_positive


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), with gradient 0 at 0.  Source: Nair and Hinton (2010)."""
  return jax.nn.relu(x)


def relu2(x: jax.Array) -> jax.Array:
  """max(x, 0)^2.  Source: So et al. (2021), Primer."""
  return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) by erf, as in the paper and torch's default (jax.nn.gelu's default is the tanh approximation, 4.7e-4 off).

  Source: Hendrycks and Gimpel (2016).
  """
  return jax.nn.gelu(_wide(x), approximate=False).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the approximation of GPT-2, T5 1.1 and Gemma ("gelu_new").

  Source: Hendrycks and Gimpel (2016).
  """
  wide = _wide(x)
  # (1 + tanh(z)) / 2 as sigmoid(2 z), which keeps its digits where tanh is near -1
  twice_z = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)
  return (wide * jax.nn.sigmoid(twice_z)).astype(x.dtype)


def gelu_sigmoid(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), up to 0.0203 from x Phi(x) ("quick gelu").  Source: Hendrycks and Gimpel (2016)."""
  return swish(x, 1.702)


def swish(x: jax.Array, beta: float = 1.0) -> jax.Array:
  """x sigmoid(beta x): x / 2 for beta 0, towards max(x, 0) as beta grows.  Source: Ramachandran et al. (2017)."""
  wide = _wide(x)
  return (wide * jax.nn.sigmoid(beta * wide)).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
  """x sigmoid(x), Swish with beta = 1.  Source: Elfwing et al. (2017); Ramachandran et al. (2017)."""
  return jax.nn.silu(_wide(x)).astype(x.dtype)


def sigmoid(x: jax.Array) -> jax.Array:
  """1 / (1 + exp(-x)), which makes Glu the first gated linear unit.  Source: Dauphin et al. (2016)."""
  return jax.nn.sigmoid(_wide(x)).astype(x.dtype)


def identity(x: jax.Array) -> jax.Array:
  """x, which makes Glu the bilinear layer.  Source: Mnih and Hinton (2007); Shazeer (2020)."""
  return x


ACTIVATIONS = {
  "relu": relu,
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "gelu_sigmoid": gelu_sigmoid,
  "silu": silu,
  "swish": swish,
  "relu2": relu2,
  "sigmoid": sigmoid,
  "identity": identity,
}


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Activated:
  """`activation` is a name of ACTIVATIONS; `beta` is swish's and only its own (None: 1).  Raises ConfigError otherwise."""

  activation: str
  beta: float | None = None

  def __post_init__(self):
    check_choice(self, "activation", ACTIVATIONS)
    if self.beta is not None:
      check_positive(self, beta=self.beta)
      if self.activation != "swish":
        raise ConfigError(
          f"{type(self).__name__}.beta: found {self.beta} with activation {self.activation!r}, expected None: "
          "only swish has a beta"
        )

  def params(self) -> dict:
    """{name: (shape, initializer)}"""
    return {}

  def _act(self, x: jax.Array) -> jax.Array:
    act = ACTIVATIONS[self.activation]
    return act(x) if self.beta is None else act(x, self.beta)


@dataclasses.dataclass(frozen=True)
class Glu(_Activated):
  """down(act(gate(x)) * up(x)): the gate is the activated half.

  sigmoid makes it GLU, identity the bilinear layer, relu ReGLU, gelu GEGLU, silu SwiGLU.  Raises ConfigError for an unknown
  activation and for a beta without swish.  Source: Shazeer (2020), section 2.
  """

  activation: str = "silu"
  inputs = ("gate", "up")

  def __call__(self, p, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its two projections."""
    return self._act(gate) * up


@dataclasses.dataclass(frozen=True)
class Mlp(_Activated):
  """down(act(up(x))).  Raises ConfigError as Glu.

  Source: Vaswani et al. (2017), section 3.3, with the activation as a choice.
  """

  activation: str = "gelu"
  inputs = ("up",)

  def __call__(self, p, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its projection."""
    return self._act(up)


@dataclasses.dataclass(frozen=True)
class ClampedGlu:
  """down((u + 1) g sigmoid(alpha g)), g = min(gate(x), limit), u = up(x) clipped to +-limit.

  The gate has no lower limit.  Raises ConfigError for alpha or limit not above 0.  Source: OpenAI's gpt-oss.
  """

  alpha: float = 1.702
  limit: float = 7.0
  inputs = ("gate", "up")

  def __post_init__(self):
    check_positive(self, alpha=self.alpha, limit=self.limit)

  def params(self) -> dict:
    """{name: (shape, initializer)}"""
    return {}

  def __call__(self, p, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its two projections."""
    wide_gate = jnp.minimum(_wide(gate), self.limit)
    wide_up = jnp.clip(_wide(up), -self.limit, self.limit)
    return ((wide_up + 1) * swish(wide_gate, self.alpha)).astype(gate.dtype)


@dataclasses.dataclass(frozen=True)
class Xielu:
  """down(xielu(up(x))): a_p x^2 + beta x above 0, and a_n (expm1(min(x, eps)) - x) + beta x from 0 down.

  a_p = softplus(p["alpha_p"]) and a_n = beta + softplus(p["alpha_n"]) are learned, one of each a layer; the fields alpha_p and
  alpha_n are the values of a_p and a_n to start from.  As in Apertus, the gradient between eps and 0 lacks the exponential's.
  Raises ConfigError where alpha_p or beta is not above 0, alpha_n not above beta, or eps not below 0.
  Source: Huang and Schlag (2024), arXiv 2411.13010; Apertus (2025).
  """

  alpha_p: float = 0.8
  alpha_n: float = 0.8
  beta: float = 0.5
  eps: float = -1e-6
  inputs = ("up",)

  def __post_init__(self):
    check_positive(self, alpha_p=self.alpha_p, alpha_n=self.alpha_n, beta=self.beta)
    if self.alpha_n <= self.beta:
      raise ConfigError(f"Xielu.alpha_n: found {self.alpha_n}, expected more than beta = {self.beta}")
    if not isinstance(self.eps, float) or not -math.inf < self.eps < 0:
      raise ConfigError(f"Xielu.eps: found {self.eps!r}, expected a finite number below 0")

  def params(self) -> dict:
    """{name: (shape, initializer)}"""
    start = {"alpha_p": self.alpha_p, "alpha_n": self.alpha_n - self.beta}
    inverse_softplus = lambda value: math.log(math.expm1(value))
    return {
      name: ((1,), jax.nn.initializers.constant(inverse_softplus(value))) for name, value in start.items()
    }

  def __call__(self, p, up: jax.Array) -> jax.Array:
    """The hidden layer [..., F] from its projection."""
    x = _wide(up)
    a_p, a_n = (jax.nn.softplus(_wide(p[name][0])) for name in ("alpha_p", "alpha_n"))
    above = a_p * jnp.square(x)
    below = (self.beta + a_n) * (jnp.expm1(jnp.minimum(x, self.eps)) - x)
    return (jnp.where(x > 0, above, below) + self.beta * x).astype(up.dtype)


MLPS = {"glu": Glu, "mlp": Mlp, "clamped_glu": ClampedGlu, "xielu": Xielu}


def split_glu(
  fused: jax.Array, activated: str = "first", interleaved: bool = False
) -> tuple[jax.Array, jax.Array]:
  """(gate, up), each [..., F], of a fused projection, weight [D, 2F] or bias [2F]; gate is the activated one.

  activated: which part goes through the activation: "first" (Phi-3, GLM-4) or "second" (GLM-130B's SwissArmyTransformer:
  x1 * gelu(x2)).  interleaved: the parts are the even and the odd columns (GPT-OSS), not the first and the second half.

  Raises ConfigError for another `activated` or an odd number of columns.
  """
  _check_activated(activated)
  if fused.shape[-1] % 2:
    raise ConfigError(f"fused gate and up: found {fused.shape[-1]} columns, expected an even number")
  half = fused.shape[-1] // 2
  first, second = (
    (fused[..., ::2], fused[..., 1::2]) if interleaved else (fused[..., :half], fused[..., half:])
  )
  return (first, second) if activated == "first" else (second, first)


def join_glu(
  gate: jax.Array, up: jax.Array, activated: str = "first", interleaved: bool = False
) -> jax.Array:
  """The fused [..., 2F] that `split_glu` with the same arguments takes apart.  Raises ConfigError for another `activated`."""
  _check_activated(activated)
  parts = (gate, up) if activated == "first" else (up, gate)
  if interleaved:
    return jnp.stack(parts, axis=-1).reshape(*gate.shape[:-1], -1)
  return jnp.concatenate(parts, axis=-1)


def _check_activated(activated: str) -> None:
  if activated not in ("first", "second"):
    raise ConfigError(f"activated: found {activated!r}, expected one of first, second")


def equal_parameters_width(mlp_dim: int) -> int:
  """int(2 mlp_dim / 3): the width at which three matrices of a GLU have the parameters of an MLP's two.

  Source: Shazeer (2020), section 3.1: 3072 -> 2048.
  """
  return 2 * mlp_dim // 3


def glu_width(embed_dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
  """Llama's hidden width: int(multiplier * int(2 (4 D) / 3)), rounded up to a multiple of `multiple_of`.

  In this order: 4096 -> 11008; Llama 2 70B has multiple_of 4096 and multiplier 1.3, Llama 3 8B 1024 and 1.3.
  Source: Meta's llama, model.py.
  """
  width = int(multiplier * equal_parameters_width(4 * embed_dim))
  return multiple_of * math.ceil(width / multiple_of)
