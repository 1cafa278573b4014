"""GLM-130B, in the files of SwissArmyTransformer: a safetensors file a tensor-parallel rank, or one of all.

No config.json comes with that model; one of a few lines names the family and its sizes, those of the published model being

  {"model_type": "glm-130b", "vocab_size": 150528, "hidden_size": 12288, "inner_hidden_size": 32768, "num_layers": 70,
   "num_attention_heads": 96, "max_sequence_length": 2048, "layernorm_epsilon": 1e-5, "torch_dtype": "float16"}

From the authors' published code, as remembered, and from the methods that this project keeps:
- The block is ChatGLM-6B's but for its feed-forward layer, down(x1 * gelu(x2)), [x1; x2] = W x: the second half is the
  activated one, by erf.  query_key_value is [N, 3, H], RoPE turns whole heads, as halves, by one position; the head is tied.
- mp_rank_00_model_states, ... of eight or four ranks: each has the names below and its share of every split matrix, rows of the
  vocabulary, of query_key_value (whole heads) and of dense_h_to_4h (of x1 and of x2), columns of dense and dense_4h_to_h; norms
  and the biases of the last two are whole, and the same on every rank.  They are pickles as published (of {"module": {name:
  tensor}}), which are not read: each has to be written as mp_rank_00_model_states.safetensors, ... by who trusts them.
"""

from __future__ import annotations

from jaxllm.activation import Glu
from jaxllm.config import ModelConfig
from jaxllm.hf.families import chatglm_6b
from jaxllm.hf.families.relative import GATE_UP
from jaxllm.hf.family import Family, Key, Share, linear
from jaxllm.hf.settings import COUNT, Settings
from jaxllm.position import Rope

BIASES = ("q", "k", "v", "o", "gate", "up", "down")


def read(s: Settings) -> ModelConfig:
  """The block of ChatGLM-6B with GEGLU and one position."""
  s.settle("tie_word_embeddings", True, why="its head is the embedding")
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  if D % N or D // N % 2:
    raise s.error("num_attention_heads", f"a divisor of hidden_size = {D}, into even numbers")
  return chatglm_6b.block(s, Rope(), s.take("inner_hidden_size", COUNT), Glu("gelu"), BIASES)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return chatglm_6b.sizes(cfg)


def keys(cfg: ModelConfig) -> list[Key]:
  """The names of SwissArmyTransformer's `transformer`; the second half is the gate, which is the activated one."""
  mlp = ("layers/{i}/mlp/up", "layers/{i}/mlp/gate")
  hidden = linear(cfg, "transformer.layers.{i}.mlp.dense_h_to_4h", *mlp, layout=GATE_UP)
  return chatglm_6b.layer_keys(cfg, hidden)


_LAYER = r"transformer\.layers\.\d+\."
RANKS = (
  (r"transformer\.word_embeddings\.weight", Share(0)),
  (_LAYER + r"attention\.query_key_value\.(weight|bias)", Share(0)),
  (_LAYER + r"attention\.dense\.weight", Share(1)),
  (_LAYER + r"mlp\.dense_h_to_4h\.(weight|bias)", Share(0, blocks=2)),
  (_LAYER + r"mlp\.dense_4h_to_h\.weight", Share(1)),
)
GLM_130B = Family(
  "glm-130b",
  "GLM130B",
  read,
  write,
  keys,
  tied=True,
  prefix="",
  unused=(r"(transformer\.layers\.\d+\.attention|mixins\.rotary-embedding)\.rotary_emb\.inv_freq",),
  remote=True,
  ranks=RANKS,
)
