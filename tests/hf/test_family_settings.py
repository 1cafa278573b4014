"""Each setting of each family moves the logits, theirs and ours alike: parity of a row is parity of all it has."""

import functools

import pytest
from family_cases import FULL, ROWS, SLIDING, YARN, built, from_tensors, tokens
from family_checks import program
from model_checks import relative_error

from jaxllm.hf.families import FAMILIES, ignored_settings, read_config, write_config

theirs = pytest.importorskip("theirs")

LENGTH = 160
# Sizes, which the shapes of tensors tell, and what other tests are of: tensors that are there or not, ids, types
APART = {"model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
APART |= {
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "n_embd",
  "n_head",
  "n_layer",
  "n_inner",
  "n_positions",
}
APART |= {
  "d_model",
  "n_heads",
  "n_layers",
  "max_seq_len",
  "tie_word_embeddings",
  "attention_bias",
  "mlp_bias",
}
APART |= {
  "num_local_experts",
  "num_experts",
  "moe_intermediate_size",
  "mlp_only_layers",
  "decoder_sparse_step",
}
APART |= {"eos_token_id", "torch_dtype", "max_position_embeddings"}  # the last computes dynamic NTK only

OTHER = dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "relu")
OTHER |= dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), 0.1)
OTHER |= dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), 50.0)
OTHER |= dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 1.0)
OTHER |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.75)
OTHER |= dict(attention_multiplier=0.5, embedding_multiplier=0.5, residual_multiplier=1.5, logits_scaling=2.0)
OTHER |= dict(sliding_window=20, max_window_layers=3, use_sliding_window=False, query_pre_attn_scalar=3)
OTHER |= dict(layer_types=[FULL, SLIDING, SLIDING], no_rope_layers=[0, 0, 1], use_parallel_residual=False)
OTHER |= dict(apply_residual_connection_post_layernorm=True, scale_attn_weights=False)
OTHER |= dict(num_experts_per_tok=1, norm_topk_prob=True, swiglu_alpha=4.0, swiglu_limit=0.2)
OTHER |= dict(rope_scaling={"rope_type": "linear", "factor": 3.0}, attn_config={"clip_qkv": 0.5})
SIX = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [5.0] * 6}
LISTS = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [5.0] * 4}
# of one family: what else has to change with a setting, None for a key that is left out
WITH = {
  ("qwen2", "layer_types"): {"layer_types": [FULL, FULL, SLIDING]},
  ("qwen2", "max_window_layers"): {"layer_types": None},
  ("qwen2", "use_sliding_window"): {"layer_types": None},
  ("qwen3", "max_window_layers"): {"layer_types": None},
  ("qwen3", "use_sliding_window"): {"layer_types": None},
  ("smollm3", "use_sliding_window"): {"layer_types": None},
  ("smollm3", "no_rope_layers"): {"layer_types": None},
  ("phi3", "rope_scaling"): {"rope_scaling": LISTS},
  ("phi3", "partial_rotary_factor"): {"partial_rotary_factor": 0.7, "rope_scaling": SIX},
  ("phi3", "original_max_position_embeddings"): {
    "original_max_position_embeddings": LENGTH + 40,
    "rope_scaling": LISTS,
  },
  ("ministral3", "rope_parameters"): {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.9}},
}


def row_of(name):
  return next(row for row in ROWS if row.split(",")[0] == name)


def plain_of(name):
  """All settings that we write for the first row of a family."""
  return write_config(built(row_of(name)).cfg, name, pinned=True)[1]


def cases():
  """(family, setting): all that is written but what is apart."""
  for name in FAMILIES:
    plain = plain_of(name)
    yield from sorted((name, key) for key in plain.keys() - APART - set(ignored_settings(plain)))


def changed(name, key):
  """The settings with another value of one of them."""
  changes = ({key: OTHER[key]} if key in OTHER else {}) | WITH.get((name, key), {})
  plain = plain_of(name) | changes
  return {one: value for one, value in plain.items() if one not in changes or value is not None}


@functools.cache
def base(name):
  """transformers' logits of what we write."""
  return theirs.logits(theirs.model(plain_of(name), built(row_of(name)).tensors), tokens()[:, :LENGTH])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_write_has_the_logits_of_the_row(name):
  expected = theirs.logits(theirs.row_model(row_of(name)), tokens()[:, :LENGTH])
  assert relative_error(base(name), expected) <= 1e-6


@pytest.mark.parametrize(("name", "key"), list(cases()))
def test_every_setting_moves_their_logits(name, key):
  moved = theirs.logits(theirs.model(changed(name, key), built(row_of(name)).tensors), tokens()[:, :LENGTH])
  assert relative_error(moved, base(name)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), list(cases()))
def test_every_setting_moves_ours_as_theirs(name, key):
  plain, tensors, ids = changed(name, key), built(row_of(name)).tensors, tokens()[:, :LENGTH]
  family, cfg = read_config(plain)
  rope = cfg.rope_tables(seq_len=LENGTH)
  found = program("forward", cfg)(from_tensors(family, cfg, tensors), ids, rope)
  error = relative_error(found, theirs.logits(theirs.model(plain, tensors), ids))
  assert error <= (5e-5 if name == "mpt" else 1e-5)
