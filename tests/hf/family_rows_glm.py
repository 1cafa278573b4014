"""Rows of the table of families that transformers does not have: Baichuan, ChatGLM, GLM-130B.

The float64 decoder of tests/oracle.py is what they are held against.
"""

import numpy as np

from jaxllm.position import glm_positions

BAICHUAN = dict(vocab_size=199, hidden_size=72, intermediate_size=100, num_hidden_layers=3)
BAICHUAN |= dict(num_attention_heads=6, rms_norm_eps=1e-6, eos_token_id=[3, 7])
CHATGLM = dict(
  padded_vocab_size=199, hidden_size=72, ffn_hidden_size=100, num_layers=3, num_attention_heads=6
)
CHATGLM |= dict(
  kv_channels=20, seq_length=640, layernorm_epsilon=1e-5, original_rope=True, eos_token_id=[3, 7]
)
CHATGLM |= dict(multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, rmsnorm=True)
GLM = dict(vocab_size=199, hidden_size=72, inner_hidden_size=100, num_layers=3, num_attention_heads=6)
GLM |= dict(max_sequence_length=640, layernorm_epsilon=1e-5, eos_token_id=5)

ROWS = {
  "baichuan": BAICHUAN | dict(max_position_embeddings=640, norm_head=False),
  "baichuan, 13B form, normed head": BAICHUAN | dict(model_max_length=640, z_loss_weight=0),
  "chatglm-6b": GLM | dict(position_encoding_2d=True),
  "chatglm-6b, one position": GLM | dict(position_encoding_2d=False, tie_word_embeddings=False),
  "chatglm": CHATGLM | dict(rope_ratio=0.05),
  "chatglm, layer norms, residual after the norm": CHATGLM
  | dict(rmsnorm=False, apply_residual_connection_post_layernorm=True, add_bias_linear=True, kv_channels=16)
  | dict(multi_query_attention=False, original_rope=False),
  "chatglm, positions divided": CHATGLM | dict(_name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=16),
  "glm-130b": GLM,
}
START = 60
"""The index of the token after the context in what is given below."""


def positions(count, two):
  """Of a prompt of START tokens and of what follows it: with a [gMASK] at its end, or for one position a [MASK] within."""
  ids = np.full(count, 9)
  ids[START - 1 if two else START // 2], ids[START] = 6 if two else 4, 8
  return glm_positions(ids, bos=8, mask=4, gmask=6, two_dimensional=two)


CALLS = {
  "chatglm-6b": lambda count: dict(pos=positions(count, True), prefix=START),
  "chatglm-6b, one position": lambda count: dict(pos=positions(count, False), prefix=START),
  "glm-130b": lambda count: dict(pos=positions(count, False), prefix=START),
}
"""Positions and prefix of a call on so many tokens, where they are not the usual ones."""
