"""Position methods that are added to the token embeddings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError, check_positive
from jaxllm.ops.lookup import lookup
from jaxllm.position import phase
from jaxllm.position.base import Params, Position
from jaxllm.position.rope import base_power


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Position):
  """Sinusoidal embedding: PE[pos, 2i] = sin(pos base^(-2i/D)), PE[pos, 2i + 1] = cos(pos base^(-2i/D)), i from 0.

  Added to the (scaled) token embeddings; the angles are exact at every position, as those of RoPE.  Raises ConfigError
  for an odd D = embed_dim.  Source: Vaswani et al. (2017), section 3.5.
  """

  base: float = 10000.0

  def __post_init__(self):
    check_positive(self, base=self.base)
    if self.base <= 1:
      raise ConfigError(f"Sinusoidal.base: found {self.base!r}, expected a number above 1")

  def embed(self, x_BTD: jax.Array, pos_BT: jax.Array, p: Params) -> jax.Array:
    D = x_BTD.shape[-1]
    if D % 2:
      raise ConfigError(
        f"embed_dim: found {D}, expected an even number, as Sinusoidal adds a sine and a cosine"
      )
    cos, sin = phase.cos_sin(pos_BT, *phase.words(base_power(self.base, D)))  # [B or 1, T, D/2]
    return x_BTD + jnp.stack([sin, cos], axis=-1).reshape(*pos_BT.shape, D)


@dataclasses.dataclass(frozen=True)
class Learned(Position):
  """Learned embedding: x + table[offset + pos], one row for each of `max_length` positions (GPT-2, BERT).

  offset: how many rows of the table come before that of position 0, as OPT's two, which nothing reads.
  The table [offset + max_length, D] starts at a standard deviation of 0.02.  A position at or beyond max_length is a
  ConfigError wherever the length is known on the host (`ModelConfig.check_length`), and NaN where only the device knows it:
  never the row of another position.  Source: Gehring et al. (2017); Radford et al. (2019) for the initial scale.
  """

  max_length: int | None = None
  offset: int = 0

  def __post_init__(self):
    length = self.max_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
      raise ConfigError(f"Learned.max_length: found {length!r}, expected an integer of at least 1")
    if not isinstance(self.offset, int) or isinstance(self.offset, bool) or self.offset < 0:
      raise ConfigError(f"Learned.offset: found {self.offset!r}, expected an integer of at least 0")

  @property
  def length_limit(self) -> int | None:
    return self.max_length

  def params(self, cfg):
    return {"table": ((self.offset + self.max_length, cfg.embed_dim), jax.nn.initializers.normal(0.02))}

  def embed(self, x_BTD: jax.Array, pos_BT: jax.Array, p: Params) -> jax.Array:
    rows_BTD = lookup(p["table"], self.offset + pos_BT, fill=jnp.nan)
    return x_BTD + rows_BTD.astype(x_BTD.dtype)
