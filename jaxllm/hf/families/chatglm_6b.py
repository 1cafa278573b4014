"""ChatGLM-6B: GLM-130B's block with a plain feed-forward layer, and two positions a token.

transformers has no such family.  From the authors' published code, as remembered, and from the methods that this project keeps:
- query_key_value is [N, 3, H].  What is called GLU there is down(gelu_tanh(up(x))): it has no gate.
- The residual is alpha times what comes out of the norm, alpha = sqrt(2 num_layers).
- position_encoding_2d: the first half of a head is turned by the position, the second by the block position, each as halves and
  with the base 10,000; without it the whole head is turned by the position.  `position.glm_positions` has a prompt's.
- Context up to the start token is seen in both directions (`nn.Context.prefix`).
- The head is tied, as transformers ties it where nothing is said; files hold it once more.
The first release (vocabulary 150,528) is the same model with image tokens in front.
"""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf.families.chatglm import refuse_quantized
from jaxllm.hf.family import Family, Grouped, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position import Rope, Rope2d
from jaxllm.wiring import GlmDeepNorm, deepnorm_coefficients

BIASES = ("q", "k", "v", "o", "up", "down")
OWN = ("inner_hidden_size", "max_sequence_length", "position_encoding_2d")
"""Settings that the later models of the same model_type do not have."""
IGNORED = ("gmask_token_id", "quantization_embeddings", "prefix_projection")


def read(s: Settings) -> ModelConfig:
  """Every layer alike, biases everywhere but on the head."""
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  refuse_quantized(s)
  two = s.take("position_encoding_2d", FLAG, True)
  if D % N or D // N % (4 if two else 2):
    raise s.error(
      "num_attention_heads", f"a divisor of hidden_size = {D}, into multiples of {4 if two else 2}"
    )
  return block(
    s, Rope2d() if two else Rope(), s.take("inner_hidden_size", COUNT, 4 * D), Mlp("gelu_tanh"), BIASES
  )


def block(s: Settings, position: Rope, width: int, mlp, biases: tuple[str, ...]) -> ModelConfig:
  """What ChatGLM-6B and GLM-130B share: GLM's DeepNorm, layer norms, scores computed within a half type's range."""
  D, N, L = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT), s.take("num_layers", DEPTH)
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=L,
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=width,
    layers=(Layer(position),),
    norm=LayerNorm(float(s.take("layernorm_epsilon", POSITIVE, 1e-5))),
    mlp=mlp,
    wiring=GlmDeepNorm(*deepnorm_coefficients(L, optimizer="adam")["decoder"]),
    biases=biases,
    layer_scaling=True,
    context_length=s.take("max_sequence_length", COUNT, 2048),
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return sizes(cfg) | {"position_encoding_2d": isinstance(cfg.layers[0].position, Rope2d)}


def sizes(cfg: ModelConfig) -> dict:
  """The settings that `block` takes."""
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "inner_hidden_size": cfg.mlp_dim,
    "num_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "max_sequence_length": cfg.context_length or 2048,
    "layernorm_epsilon": cfg.norm.eps,
  }


def layer_keys(cfg: ModelConfig, hidden: list[Key]) -> list[Key]:
  """A layer's tensors and the norm after the last one; `hidden`: those of what enters the feed-forward layer."""
  at, ours = "transformer.layers.{i}.", "layers/{i}/"
  return [
    Key("transformer.word_embeddings.weight", ("embed",)),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linear(
      cfg, f"{at}attention.query_key_value", *(f"{ours}attn/{name}" for name in "qkv"), layout=Grouped()
    ),
    *linear(cfg, f"{at}attention.dense", f"{ours}attn/o"),
    *norm(cfg.norm, f"{at}post_attention_layernorm", f"{ours}mlp_norm"),
    *hidden,
    *linear(cfg, f"{at}mlp.dense_4h_to_h", f"{ours}mlp/down"),
    *norm(cfg.norm, "transformer.final_layernorm", "final_norm"),
  ]


def keys(cfg: ModelConfig) -> list[Key]:
  """Queries, keys and values a head."""
  up = linear(cfg, "transformer.layers.{i}.mlp.dense_h_to_4h", "layers/{i}/mlp/up")
  return layer_keys(cfg, up) + ([] if cfg.tie_embeddings else [Key("lm_head.weight", ("head",), "oi")])


ROTARY = (r"(transformer\.)?layers\.\d+\.attention\.rotary_emb\.inv_freq",)
CHATGLM_6B = Family(
  "chatglm",
  "ChatGLMModel",
  read,
  write,
  keys,
  tied=True,
  eos=130005,
  prefix="transformer.",
  ignored=IGNORED,
  unused=ROTARY,
  name="chatglm-6b",
  fits=lambda s: any(name in s.plain for name in OWN),
  remote=True,
  also=("ChatGLMForConditionalGeneration",),
)
