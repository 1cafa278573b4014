"""Rows of the families with experts: five to seven, each chosen by some tokens, so that no number of them divides anything."""

from family_bases import BASE, FULL, LLAMA, SLIDING, YARN

MOE = LLAMA | dict(intermediate_size=44)
QWEN = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=28, rope_parameters=BASE, **LLAMA)
OSS_YARN = YARN | dict(truncate=False)

ROWS = {
  "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, rope_parameters=BASE, sliding_window=90, **MOE),
  "mixtral, four experts a token": dict(
    num_local_experts=5, num_experts_per_tok=4, rope_parameters=YARN, **MOE
  ),
  "qwen3_moe": dict(
    attention_bias=True,
    norm_topk_prob=False,
    mlp_only_layers=[1],
    use_sliding_window=True,
    sliding_window=90,
    **QWEN,
  ),
  "qwen3_moe, every second layer": dict(norm_topk_prob=True, decoder_sparse_step=2, **QWEN),
  "gpt_oss": dict(
    **dict(num_local_experts=6, num_experts_per_tok=3, rope_parameters=OSS_YARN, sliding_window=90),
    **dict(swiglu_limit=0.7, swiglu_alpha=1.3, layer_types=[FULL, SLIDING, FULL]),
    **MOE,
  ),
  "gpt_oss, no biases of attention": dict(
    num_local_experts=5, num_experts_per_tok=2, attention_bias=False, sliding_window=90, **MOE
  ),
}
