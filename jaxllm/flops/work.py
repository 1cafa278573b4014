"""How many floating-point operations the products of a model are, by formula, exactly."""

from __future__ import annotations

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe

ATTENTION = ("full", "causal")
"""Which pairs of a query and a key count: all T^2 of a sequence, or those that the layer's mask allows."""
REMAT = ("none", "selective", "full")
"""What the backward pass computes again: nothing, scores and their sums over values, or all of the layers."""


def check(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raise ConfigError for a convention that there is not."""
  if value not in allowed:
    raise ConfigError(f"{name}: found {value!r}, expected one of {', '.join(allowed)}")


def pairs(layer: Layer, length: int, attention: str = "full") -> int:
  """Pairs of a query and a key in a sequence of T tokens.

  full: T^2, windows or not, as Megatron and PaLM count and as the plain core computes.  causal: those that are allowed, query i
  seeing min(i + 1, w) keys of a window w; a method that sees the first s tokens too (`position.seen`) has min(s, i + 1 - w)
  more.  Without a window that is T (T + 1) / 2, half of T^2 and the diagonal.
  """
  check("attention", attention, ATTENTION)
  if attention == "full":
    return length**2
  sinks, window = layer.position.seen or (0, layer.window or length)
  return _steps(length, window) + _steps(length - window, sinks)


def _steps(count: int, most: int) -> int:
  """sum_{i=1}^{count} min(i, most)"""
  count, most = max(0, count), max(0, most)
  up = min(count, most)
  return up * (up + 1) // 2 + (count - up) * most


def forward(cfg: ModelConfig, length: int, attention: str = "full") -> dict[str, int]:
  """FLOPs of the products of one forward pass over one sequence of T tokens, by part; two a multiplication and addition.

  A token, in a layer: projections 2 D (N + 2 K) H + 2 N H D; attention 4 N H for each key it is paired with (`pairs`); mlp
  2 D F for each of its inputs and 2 F D; of experts the router's 2 D E, k times an expert's, 2 k D to add them up and 2 E D for
  biases of down.  head: 2 E V with the embedding's width E, tied or not, and the two matrices 2 D E where E is not D.  A lookup
  of embeddings is none; nor are norms, activations, softmax and rotations.  It is the model's work: methods that score a pair
  twice and keep one (ReRoPE and its like) are counted once.
  Source: Narayanan et al. (2021), Megatron-LM, appendix; Chowdhery et al. (2022), PaLM, appendix B.
  """
  if type(length) is not int or length < 1:
    raise ConfigError(f"length: found {length!r}, expected a whole number of at least 1")
  D, NH, KH = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  repeats = cfg.num_layers // len(cfg.layers)
  narrow = 0 if cfg.embed_width is None else 2 * 2 * D * cfg.embed_width
  return {
    "projections": cfg.num_layers * length * (2 * D * (NH + 2 * KH) + 2 * NH * D),
    "attention": repeats * sum(4 * NH * pairs(layer, length, attention) for layer in cfg.layers),
    "mlp": repeats * length * sum(_mlp(cfg, cfg.mlp_of(layer)) for layer in cfg.layers),
    "head": length * (2 * cfg.token_width * cfg.vocab_size + narrow),
  }


def _mlp(cfg: ModelConfig, mlp) -> int:
  """FLOPs a token of one feed-forward layer."""
  D = cfg.embed_dim
  if not isinstance(mlp, Moe):
    return 2 * D * cfg.mlp_dim * (len(mlp.inputs) + 1)
  expert = 2 * D * (mlp.mlp_dim or cfg.mlp_dim) * (len(mlp.expert.inputs) + 1)
  biases = 2 * mlp.num_experts * D if "down" in cfg.biases else 0
  return 2 * D * mlp.num_experts + mlp.top_k * (expert + 2 * D) + biases


def recomputed(parts: dict[str, int], remat: str = "none", chunked_head: bool = False) -> int:
  """FLOPs that the backward pass does once more, of those of `forward`.

  selective: the scores and their sums over values.  full: the layers, each from its input; a program leaves out what nobody
  reads, the last product of a layer (down) where no norm follows.  chunked_head: logits a chunk at a time
  (`ops.losses.cross_entropy` on more tokens than a chunk).  The attention cores of long sequences do what selective says.
  Source: Korthikanti et al. (2022), sections 4 and 5, whose 2.7 and 1.6 % are shares of a forward pass.
  """
  check("remat", remat, REMAT)
  layers = parts["projections"] + parts["attention"] + parts["mlp"]
  again = {"none": 0, "selective": parts["attention"], "full": layers}[remat]
  return again + (parts["head"] if chunked_head else 0)
