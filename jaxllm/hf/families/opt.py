"""OPT: learned positions after two rows of none, ReLU, biases; and 350m's post-norm with a narrower embedding."""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf.families.relative import ACTIVATION, ACTIVATIONS, activation_name
from jaxllm.hf.family import Family, Key, linears, lm_head, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position.absolute import Learned
from jaxllm.wiring import Post, Pre

OFFSET = 2
BIASES = ("q", "k", "v", "o", "up", "down")
NAMES = {f"attn/{name}": f"self_attn.{name}_proj" for name in "qkv"}
NAMES |= {"attn/o": "self_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2"}
IGNORED = ("dropout", "activation_dropout", "layerdrop", "init_std")


def read(s: Settings) -> ModelConfig:
  """do_layer_norm_before is false in 350m alone, which has no norm after the last block, and word_embed_proj_dim 512."""
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  if D % N:
    raise s.error("num_attention_heads", f"a divisor of hidden_size = {D}")
  before = s.take("do_layer_norm_before", FLAG, True)
  if before:
    s.settle("_remove_final_layer_norm", False, why="blocks with a norm first end in one here")
  s.ignore("_remove_final_layer_norm")  # of blocks with a norm last, which have none
  length, width = (
    s.take("max_position_embeddings", COUNT, 2048),
    s.take("word_embed_proj_dim", COUNT, D),
  )
  affine = s.take("layer_norm_elementwise_affine", FLAG, True)
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    embed_width=None if width == D else width,
    num_layers=s.take("num_hidden_layers", DEPTH),
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=s.take("ffn_dim", COUNT),
    layers=(Layer(Learned(length, OFFSET)),),
    norm=LayerNorm(scale="w" if affine else None, bias=affine),
    mlp=Mlp(ACTIVATIONS[s.take("activation_function", ACTIVATION, "relu")]),
    wiring=Pre() if before else Post(),
    biases=BIASES if s.take("enable_bias", FLAG, True) else (),
    context_length=length,
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  if not isinstance(learned := cfg.layers[0].position, Learned):
    raise ConfigError(f"layers: found {type(learned).__name__}, expected Learned, which this family has")
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "word_embed_proj_dim": cfg.token_width,
    "ffn_dim": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "max_position_embeddings": learned.max_length,
    "activation_function": activation_name(cfg.mlp),
    "do_layer_norm_before": isinstance(cfg.wiring, Pre),
    "enable_bias": "q" in cfg.biases,
    "layer_norm_elementwise_affine": getattr(cfg.norm, "scale", None) is not None,
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """A block's final_layer_norm is the one of its feed-forward layer."""
  at, ours = "model.decoder.layers.{i}.", "layers/{i}/"
  keys = [
    Key("model.decoder.embed_tokens.weight", ("embed",)),
    Key("model.decoder.embed_positions.weight", ("positions/0/table",)),
    *linears(cfg, at, NAMES),
    *norm(cfg.norm, f"{at}self_attn_layer_norm", f"{ours}attn_norm"),
    *norm(cfg.norm, f"{at}final_layer_norm", f"{ours}mlp_norm"),
    *lm_head(cfg),
  ]
  if cfg.wiring.final_norm:
    keys += norm(cfg.norm, "model.decoder.final_layer_norm", "final_norm")
  if cfg.embed_width is not None:
    keys += [Key(f"model.decoder.project_{end}.weight", (f"embed_{end}",), "oi") for end in ("in", "out")]
  return keys


OPT = Family("opt", "OPTForCausalLM", read, write, keys, tied=True, eos=2, ignored=IGNORED)
