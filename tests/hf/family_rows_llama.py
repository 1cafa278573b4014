"""Rows of Llama's later relatives; see family_cases.py for what a row is."""

from family_bases import BASE, FULL, LLAMA, LLAMA3, SLIDING, YARN

MIXED = dict(sliding_window=90, layer_types=[SLIDING, FULL, SLIDING])
GLM = dict(rope_parameters=BASE | dict(partial_rotary_factor=0.7), **LLAMA)

ROWS = {
  "glm": GLM,
  "glm4": GLM | dict(attention_bias=False),
  "cohere": dict(rope_parameters=BASE, use_qk_norm=True, attention_bias=True, logit_scale=0.4, **LLAMA),
  # without biases: where there are no positions that of the keys shifts all scores of a query, and its gradient is 0
  "cohere2": dict(rope_parameters=BASE, logit_scale=0.4, **MIXED, **LLAMA),
  "olmo": dict(rope_parameters=BASE, attention_bias=True, clip_qkv=0.8, **LLAMA),
  "olmo3": dict(
    rope_parameters={FULL: YARN, SLIDING: dict(rope_type="default", rope_theta=4000.0)},
    attention_bias=True,
    **MIXED,
    **LLAMA,
  ),
  "exaone4": dict(rope_parameters=LLAMA3, **MIXED, **LLAMA),
  "exaone4, no window": dict(rope_parameters=BASE, sliding_window=None, layer_types=[FULL] * 3, **LLAMA),
  "seed_oss": dict(rope_parameters=BASE, attention_out_bias=True, mlp_bias=True, **LLAMA),
  "arcee": dict(rope_parameters=YARN | dict(mscale=1.0), attention_bias=True, mlp_bias=True, **LLAMA),
  "hunyuan_v1_dense": dict(
    rope_parameters=dict(rope_type="dynamic", alpha=30.0, factor=1.0, **BASE), attention_bias=True, **LLAMA
  ),
  "apertus": dict(rope_parameters=LLAMA3, attention_bias=True, **LLAMA),
}
