"""Directions of an update by name, before weight decay and the learning rate, which are the same for all."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxllm import tree

DECAYED = (
  (r"(embed|embed_in|embed_out|head|head_bias)(/[ab])?", False),
  (r"positions/\d+/\w+", False),
  (r".*/(scale|bias|sinks|alpha_p|alpha_n)", False),
  (r".*/w(/[ab])?", True),
)
"""Which parameters weight decay acts on: the matrices inside the layers, and what `train.lora` adds to them."""

ORTHOGONAL = (
  (r"(layers|blocks)/\d+/.*(?<!router)/w", True),
  (r".+", False),
)
"""Which parameters Muon turns: the matrices inside the layers but routers; embeddings, heads, norms and biases are Adam's."""


def chosen(rules, params: tree.Tree) -> dict[str, Any]:
  """The tree of the rules' values."""
  return tree.unflatten({path: tree.first_match(rules, path) for path in tree.flatten(params)})


class Optimizer(Protocol):
  """What makes an update of a gradient; its state is of the gradient's type."""

  def direction(self, beta1: float, beta2: float) -> optax.GradientTransformation:
    """The update before decay and rate.  The betas are those of the run; what else there is are fields."""


@dataclasses.dataclass(frozen=True)
class AdamW:
  """m / (sqrt(v) + eps), both without their bias.  Source: Kingma and Ba (2014); Loshchilov and Hutter (2017)."""

  eps: float = 1e-8

  def direction(self, beta1: float, beta2: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(beta1, beta2, self.eps)


@dataclasses.dataclass(frozen=True)
class Lion:
  """sign(beta1 m + (1 - beta1) g), m <- beta2 m + (1 - beta2) g.  Source: Chen et al. (2023), algorithm 2.

  Rates are a third to a tenth of AdamW's, and decay as much larger (section 5 there).
  """

  def direction(self, beta1: float, beta2: float) -> optax.GradientTransformation:
    return optax.scale_by_lion(beta1, beta2)


@dataclasses.dataclass(frozen=True)
class Adafactor:
  """g / sqrt(v), v from means of rows and columns; at most `clip` in root mean square, and relative to that of the weight.

  v <- b v + (1 - b) (g^2 + eps), b = 1 - s^-decay at step s from 1; matrices of less than `factored_from` rows or columns keep
  all of v.  No momentum: the run's betas mean nothing here.  Of stacked layers each has a root mean square of its own.
  Source: Shazeer and Stern (2018), algorithms 4 and 5, with their defaults (eps2 is 1e-3).
  """

  decay: float = 0.8
  eps: float = 1e-30
  clip: float = 1.0
  factored_from: int = 128

  def direction(self, beta1: float, beta2: float) -> optax.GradientTransformation:
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))

    def sized(path, u, w):
      of_one = lambda u, w: u / jnp.maximum(1, rms(u) / self.clip) * jnp.maximum(rms(w), 1e-3)
      return (jax.vmap(of_one) if path[0].key == "blocks" else of_one)(u, w)

    relative = optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, sized))
    factored = optax.scale_by_factored_rms(True, self.decay, 0, self.factored_from, self.eps)
    return optax.chain(factored, relative)


@dataclasses.dataclass(frozen=True)
class Muon:
  """rms sqrt(max(in, out)) orthogonal(Nesterov momentum of g) for matrices by the rules, and Adam's direction for all else.

  orthogonal: Newton-Schulz steps towards U V^T of U S V^T.  The factor gives an update of the root mean square of AdamW's, so
  that one rate and one decay serve both.  Source: Jordan et al. (2024), Muon; Liu et al. (2025), section 2.2 (rms, 0.2).
  """

  momentum: float = 0.95
  iterations: int = 5
  rms: float = 0.2
  eps: float = 1e-8
  rules: tuple[tuple[str, bool], ...] = ORTHOGONAL

  def direction(self, beta1: float, beta2: float) -> optax.GradientTransformation:
    def labels(params):
      return jax.tree.map(lambda turned: "muon" if turned else "adam", chosen(self.rules, params))

    muon = scale_by_muon(
      ns_steps=self.iterations, beta=self.momentum, eps=self.eps, weight_dimension_numbers=_matrices
    )
    width = lambda u: self.rms * math.sqrt(max(u.shape[-2:]))
    sized = optax.stateless(lambda updates, _: jax.tree.map(lambda u: width(u) * u, updates))
    adam = AdamW(self.eps).direction(beta1, beta2)
    return optax.partition({"muon": optax.chain(muon, sized), "adam": adam}, labels)


def _matrices(params):
  """The last two axes of each, [..., in, out]: stacked layers and experts are as many matrices."""
  return jax.tree.map(lambda w: MuonDimensionNumbers(w.ndim - 2, w.ndim - 1), params)


OPTIMIZERS: dict[str, type] = {"adamw": AdamW, "lion": Lion, "adafactor": Adafactor, "muon": Muon}
