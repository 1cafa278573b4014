"""Rows of the families with LayerNorm: StarCoder 2, Phi, GPT-J, CodeGen, Falcon, OPT, GPT-BigCode, Nemotron and the like.

And, for test_family_settings.py, what their settings are changed to there.
"""

SIZES = dict(vocab_size=199, hidden_size=72, num_hidden_layers=3, num_attention_heads=6, pad_token_id=None)
NARROW = SIZES | dict(intermediate_size=100, num_key_value_heads=2, max_position_embeddings=256)
WIDE = NARROW | dict(hidden_size=96)  # heads of 16, of which a quarter and a half are even
ROPE = dict(rope_parameters=dict(rope_theta=500.0))
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5)
YARN |= ROPE["rope_parameters"]
GPT = dict(vocab_size=199, n_positions=640, n_embd=72, n_layer=3, n_head=4, n_inner=100)
FALCON = SIZES | dict(ffn_hidden_size=100, max_position_embeddings=256)
FALCON_40B = FALCON | dict(hidden_size=96, new_decoder_architecture=True, num_kv_heads=2)
OPT = SIZES | dict(ffn_dim=100, max_position_embeddings=640)

ROWS = {
  "starcoder2": dict(sliding_window=90, head_dim=20, **ROPE, **NARROW),
  "starcoder2, no biases": dict(use_bias=False, tie_word_embeddings=False, head_dim=12, **ROPE, **NARROW),
  "phi": dict(head_dim=20, rope_parameters=YARN | dict(partial_rotary_factor=0.4), **NARROW),
  "phi, normed queries": dict(qk_layernorm=True, hidden_act="gelu", **ROPE, **NARROW),
  "gptj": dict(rotary_dim=8, **GPT),
  "codegen": dict(rotary_dim=8, tie_word_embeddings=True, **GPT),
  "falcon": FALCON | ROPE | dict(num_attention_heads=4),
  "falcon, 40B form": FALCON_40B | ROPE,
  "falcon, 11B form": FALCON_40B | ROPE | dict(num_ln_in_parallel_attn=1, tie_word_embeddings=False),
  "falcon, RW form": FALCON
  | dict(num_attention_heads=12, alibi=True, multi_query=False, parallel_attn=False, bias=True),
  "opt": OPT,
  "opt, 350m form": OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=40),
  "opt, no biases": OPT
  | dict(enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
  "gpt_bigcode": GPT,
  "gpt_bigcode, a key a query": GPT | dict(multi_query=False, scale_attn_weights=False),
  "nemotron": dict(head_dim=20, attention_bias=True, mlp_bias=True, **ROPE, **NARROW),
  "persimmon": {name: value for name, value in WIDE.items() if name != "num_key_value_heads"} | ROPE,
  "persimmon, RoPE scaled": dict(
    qk_layernorm=False,
    tie_word_embeddings=True,
    rope_parameters=YARN,
    **{name: value for name, value in WIDE.items() if name != "num_key_value_heads"},
  ),
  "stablelm": dict(
    rope_parameters=ROPE["rope_parameters"] | dict(partial_rotary_factor=0.5),
    **dict(use_qkv_bias=True, qk_layernorm=True),
    **WIDE,
  ),
  "stablelm, side by side": dict(
    rope_parameters=YARN | dict(partial_rotary_factor=0.5), use_parallel_residual=True, **WIDE
  ),
}
VARIANTS = tuple(row for row in ROWS if "," in row and row not in ("falcon, RW form", "opt, 350m form"))
"""Rows of which the default set has the kept logits alone."""

FLAGS = {
  "starcoder2": ("use_bias",),
  "phi": ("qk_layernorm",),
  "falcon": ("bias", "multi_query", "new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn"),
  "opt": ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "word_embed_proj_dim"),
  "gpt_bigcode": ("multi_query",),
  "persimmon": ("qk_layernorm",),
  "stablelm": ("qk_layernorm", "use_parallel_residual", "use_qkv_bias"),
}
"""Settings that say which tensors there are: rows of a family have several values of each."""
APART = {"ffn_dim", "ffn_hidden_size", "num_kv_heads", *(name for names in FLAGS.values() for name in names)}
OTHER = dict(activation="relu", norm_epsilon=0.1, norm_eps=0.1, rotary_dim=4, alibi=True)
WITH = {
  ("phi", "partial_rotary_factor"): {"partial_rotary_factor": 0.8},
  ("nemotron", "partial_rotary_factor"): {"partial_rotary_factor": 0.8},
  ("opt", "activation_function"): {"activation_function": "gelu"},
}
BAD = [
  ("starcoder2", dict(norm_type="rms_norm"), "norm_type: found 'rms_norm', expected 'layer_norm'"),
  ("starcoder2", dict(mlp_type="gated"), "mlp_type: found 'gated'"),
  ("starcoder2", dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon: found 1e-06, expected 1e-05"),
  (
    "phi, normed queries",
    dict(head_dim=20),
    "head_dim: found 20, expected hidden_size / num_attention_heads",
  ),
  ("phi", dict(partial_rotary_factor=0.5), "partial_rotary_factor: found 0.4, expected 0.5"),
  ("gptj", dict(rotary_dim=7), "rotary_dim: found 7, expected an even number up to 18"),
  ("gptj", dict(rotary_dim=20), "rotary_dim: found 20, expected an even number up to 18"),
  ("gptj", dict(rotary_dim=None), "rotary_dim: found null, .*without it, 64 are turned"),
  ("gptj", dict(rotary=False), "rotary: found false, expected true"),
  ("gptj", dict(rope_theta=1e6), "unknown settings.*rope_theta"),
  ("codegen", dict(n_embd=66, n_head=3), "n_embd: found 66, expected a multiple of 4"),
  ("falcon", dict(num_attention_heads=5), "num_attention_heads: found 5, expected a divisor of hidden_size"),
  (
    "falcon",
    dict(multi_query=False, num_kv_heads=2),
    "num_kv_heads: found 2, expected num_attention_heads = 4",
  ),
  ("falcon", dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn: found 2, expected 1"),
  (
    "falcon",
    dict(apply_residual_connection_post_layernorm=True),
    "post_layernorm: found true, expected false",
  ),
  ("falcon, 40B form", dict(num_kv_heads=4), "num_kv_heads: found 4, expected a divisor"),
  ("falcon, 40B form", dict(parallel_attn=False), "parallel_attn: found false, expected true"),
  (
    "falcon, 40B form",
    dict(num_ln_in_parallel_attn=3),
    "num_ln_in_parallel_attn: found 3, expected one of 1, 2",
  ),
  ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm: found true, expected false"),
  ("opt", dict(word_embed_proj_dim=0), "word_embed_proj_dim: found 0"),
  ("gpt_bigcode", dict(num_key_value_heads=4), "num_key_value_heads: found 4, expected 1"),
  ("gpt_bigcode", dict(add_cross_attention=True), "add_cross_attention: found true"),
  ("nemotron", dict(rms_norm_eps=1e-6), r"unknown settings.*rms_norm_eps"),
  ("persimmon", dict(num_key_value_heads=2), "num_key_value_heads: found 2, expected 6"),
  ("persimmon", dict(head_dim=20), "head_dim: found 20, expected 16"),
  ("stablelm", dict(head_dim=20), "head_dim: found 20, expected 16"),
  ("stablelm", dict(rope_pct=0.25), "unknown settings.*rope_pct"),
]
"""A row, changes of its settings, and what the error says."""
