"""How a block joins attention A, feed-forward F and normalisations N to the residual stream, as values.

A wiring is called as wiring(x, norm, attention, feed_forward), where norm(name, h) normalises with the parameters of that
name.  `norms` are those names, and `final_norm` says whether the last block's output is normalised once more before the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from jax.nn import initializers

from jaxllm.errors import ConfigError, check_positive

Apply = Callable[[jax.Array], jax.Array]
NormBy = Callable[[str, jax.Array], jax.Array]

TOPOLOGIES = ("decoder", "encoder", "encoder_decoder")
OPTIMIZERS = ("paper", "sgd", "adam", "lamb")


@dataclasses.dataclass(frozen=True)
class Wiring:
  """What all wirings share: h = x + A(...), then y = h + F(...), and the initialisation of the matrices."""

  norms: ClassVar[tuple[str, ...]] = ("attn_norm", "mlp_norm")
  final_norm: ClassVar[bool] = True

  def init(self, name: str, num_layers: int) -> initializers.Initializer:
    """The initializer of the matrix `name` [in, out]: N(0, 1 / in), for those that end in the residual N(0, 1 / (2 L in)).

    Source: Radford et al. (2019), section 2.3 (residual matrices by 1 / sqrt of their number).
    """
    scale = 1 / (2 * num_layers) if name in ("o", "down") else 1.0
    return initializers.variance_scaling(scale, "fan_in", "normal")

  def __call__(self, x: jax.Array, norm: NormBy, attention: Apply, feed_forward: Apply) -> jax.Array:
    """The block's output [B, T, D]."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Pre(Wiring):
  """h = x + c A(N1 x), y = h + c F(N2 h), c = branch_scale, and a norm after the last block.

  Source: Xiong et al. (2020); GPT-2, Llama.  Source of the branch scale: transformers' `residual_multiplier` (Granite).
  """

  branch_scale: float = 1.0

  def __post_init__(self):
    check_positive(self, branch_scale=self.branch_scale)

  def __call__(self, x, norm, attention, feed_forward):
    h = x + self._scaled(attention(norm("attn_norm", x)))
    return h + self._scaled(feed_forward(norm("mlp_norm", h)))

  def _scaled(self, branch: jax.Array) -> jax.Array:
    return branch if self.branch_scale == 1 else branch * self.branch_scale


@dataclasses.dataclass(frozen=True)
class Post(Wiring):
  """h = N1(x + A(x)), y = N2(h + F(h)).  Source: Vaswani et al. (2017); OPT-350m."""

  final_norm: ClassVar[bool] = False

  def __call__(self, x, norm, attention, feed_forward):
    h = norm("attn_norm", x + attention(x))
    return norm("mlp_norm", h + feed_forward(h))


@dataclasses.dataclass(frozen=True)
class PostOnly(Wiring):
  """h = x + N1(A(x)), y = h + N2(F(h)): only what is added is normalised.  Source: OLMo 2; EXAONE 4."""

  def __call__(self, x, norm, attention, feed_forward):
    h = x + norm("attn_norm", attention(x))
    return h + norm("mlp_norm", feed_forward(h))


@dataclasses.dataclass(frozen=True)
class Sandwich(Wiring):
  """h = x + N2(A(N1 x)), y = h + N4(F(N3 h)).  Source: Ding et al. (2021), CogView; Gemma 2, GLM-4-0414."""

  norms: ClassVar[tuple[str, ...]] = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")

  def __call__(self, x, norm, attention, feed_forward):
    h = x + norm("attn_post_norm", attention(norm("attn_norm", x)))
    return h + norm("mlp_post_norm", feed_forward(norm("mlp_norm", h)))


@dataclasses.dataclass(frozen=True)
class Parallel(Wiring):
  """y = x + A(N x) + F(N x) with one norm.  Source: Wang and Komatsuzaki (2021), GPT-J; Phi, Falcon-7B, Cohere."""

  norms: ClassVar[tuple[str, ...]] = ("attn_norm",)

  def __call__(self, x, norm, attention, feed_forward):
    h = norm("attn_norm", x)
    return x + attention(h) + feed_forward(h)


@dataclasses.dataclass(frozen=True)
class ParallelTwoNorms(Wiring):
  """y = x + A(N1 x) + F(N2 x).  Source: Black et al. (2022), GPT-NeoX; Falcon-40B."""

  def __call__(self, x, norm, attention, feed_forward):
    return x + attention(norm("attn_norm", x)) + feed_forward(norm("mlp_norm", x))


@dataclasses.dataclass(frozen=True)
class DeepNorm(Wiring):
  """h = N1(alpha x + A(x)), y = N2(alpha h + F(h)): post-norm whose updates do not grow with the depth.

  The v, o and feed-forward matrices start as Xavier-normal with gain beta, q and k with gain 1.  alpha and beta are those of
  `deepnorm_coefficients`; 1 and 1 are Post.  Source: Wang et al. (2022), section 3.
  """

  alpha: float = 1.0
  beta: float = 1.0

  final_norm: ClassVar[bool] = False

  def __post_init__(self):
    check_positive(self, alpha=self.alpha, beta=self.beta)

  def init(self, name: str, num_layers: int) -> initializers.Initializer:
    gain = 1.0 if name in ("q", "k") else self.beta
    return initializers.variance_scaling(gain**2, "fan_avg", "normal")

  def __call__(self, x, norm, attention, feed_forward):
    h = norm("attn_norm", self.alpha * x + attention(x))
    return norm("mlp_norm", self.alpha * h + feed_forward(h))


@dataclasses.dataclass(frozen=True)
class GlmDeepNorm(DeepNorm):
  """a = N1 x, h = alpha a + A(a), m = N2 h, y = alpha m + F(m), and a norm after the last block.

  DeepNorm bracketed otherwise: the residual is what comes out of the norm, so the embeddings are normalised too.
  Source: Zeng et al. (2022), GLM-130B, section 2.1, and its code.
  """

  final_norm: ClassVar[bool] = True

  def __call__(self, x, norm, attention, feed_forward):
    a = norm("attn_norm", x)
    m = norm("mlp_norm", self.alpha * a + attention(a))
    return self.alpha * m + feed_forward(m)


def deepnorm_coefficients(
  num_layers: int,
  topology: str = "decoder",
  optimizer: str = "paper",
  decoder_layers: int | None = None,
) -> dict[str, tuple[float, float]]:
  """{"encoder" and / or "decoder": (alpha, beta)} of DeepNorm, with N encoder and M decoder layers.

  "paper": encoder (2N)^1/4, (8N)^-1/4; decoder (2M)^1/4, (8M)^-1/4; in an encoder-decoder, the encoder has
  0.81 (N^4 M)^1/16, 0.87 (N^4 M)^-1/16 and the decoder (3M)^1/4, (12M)^-1/4.  By the optimizer whose update is to be
  independent of the depth (of one stack): "sgd" (2N)^1/4, (2N)^-1/4; "adam" (2N)^1/2, (2N)^-1/2 (GLM-130B's choice);
  "lamb" 1, (2N)^-1/2.  `num_layers` is N, or M for a decoder; `decoder_layers` is M of an encoder-decoder.
  Source: Wang et al. (2022), table in figure 2; kexue.fm/archives/8978.
  """
  if topology not in TOPOLOGIES:
    raise ConfigError(f"topology: found {topology!r}, expected one of {', '.join(TOPOLOGIES)}")
  if optimizer not in OPTIMIZERS:
    raise ConfigError(f"optimizer: found {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
  both = topology == "encoder_decoder"
  depths = {"num_layers": num_layers} | ({"decoder_layers": decoder_layers} if both else {})
  for name, depth in depths.items():
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
      raise ConfigError(f"{name}: found {depth!r}, expected an integer of at least 1")
  if not both and decoder_layers is not None:
    raise ConfigError(f"decoder_layers: found {decoder_layers!r}, expected None for topology {topology!r}")
  N, M = num_layers, decoder_layers
  if both:
    if optimizer != "paper":
      raise ConfigError(f"optimizer: found {optimizer!r}, expected 'paper' for topology 'encoder_decoder'")
    return {
      "encoder": (0.81 * (N**4 * M) ** (1 / 16), 0.87 * (N**4 * M) ** (-1 / 16)),
      "decoder": ((3 * M) ** 0.25, (12 * M) ** -0.25),
    }
  alpha, beta = {
    "paper": ((2 * N) ** 0.25, (8 * N) ** -0.25),
    "sgd": ((2 * N) ** 0.25, (2 * N) ** -0.25),
    "adam": ((2 * N) ** 0.5, (2 * N) ** -0.5),
    "lamb": (1.0, (2 * N) ** -0.5),
  }[optimizer]
  return {topology: (alpha, beta)}


WIRINGS: dict[str, type[Wiring]] = {
  "pre": Pre,
  "post": Post,
  "post_only": PostOnly,
  "sandwich": Sandwich,
  "parallel": Parallel,
  "parallel_two_norms": ParallelTwoNorms,
  "deepnorm": DeepNorm,
  "deepnorm_glm": GlmDeepNorm,
}
