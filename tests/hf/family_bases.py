"""Settings that many rows of family_cases.py and of its modules share."""

LLAMA = dict(
  vocab_size=199, hidden_size=72, intermediate_size=100, num_hidden_layers=3, num_attention_heads=6
)
LLAMA |= dict(
  num_key_value_heads=2, head_dim=20, max_position_embeddings=256, eos_token_id=[3, 7], pad_token_id=None
)
BASE = {"rope_theta": 500.0}
YARN = dict(
  rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5, **BASE
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=64, **BASE)
LLAMA3 |= dict(low_freq_factor=0.5, high_freq_factor=3.0)
FULL, SLIDING = "full_attention", "sliding_attention"
