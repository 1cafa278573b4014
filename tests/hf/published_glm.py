"""Settings of published Baichuan and ChatGLM models, which come with remote code; from memory, GLM-130B's from its scripts."""

from jaxllm.activation import Glu, Mlp
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.position import Alibi, Rope, Rope2d
from jaxllm.position.rope import PiRope

BAICHUAN_7B = dict(
  **dict(architectures=["BaiChuanForCausalLM"], model_type="baichuan", vocab_size=64000, hidden_size=4096),
  **dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu"),
  **dict(max_position_embeddings=4096, rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False),
  **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, torch_dtype="bfloat16", use_cache=True),
  **dict(auto_map={"AutoConfig": "configuration_baichuan.BaiChuanConfig"}, transformers_version="4.29.1"),
)
BAICHUAN2_7B = BAICHUAN_7B | dict(
  architectures=["BaichuanForCausalLM"],
  vocab_size=125696,
  model_max_length=4096,
  tokenizer_class="BaichuanTokenizer",
  _from_model_config=True,
)
BAICHUAN_13B = {
  name: value for name, value in BAICHUAN_7B.items() if name != "max_position_embeddings"
} | dict(
  **dict(
    architectures=["BaichuanForCausalLM"], hidden_size=5120, intermediate_size=13696, model_max_length=4096
  ),
  **dict(
    num_hidden_layers=40, num_attention_heads=40, gradient_checkpointing=[False], _from_model_config=True
  ),
)
CHATGLM2 = dict(
  **dict(architectures=["ChatGLMModel"], model_type="chatglm", _name_or_path="THUDM/chatglm2-6b"),
  **dict(auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig"}, add_bias_linear=False),
  **dict(
    add_qkv_bias=True, apply_query_key_layer_scaling=True, apply_residual_connection_post_layernorm=False
  ),
  **dict(attention_dropout=0.0, attention_softmax_in_fp32=True, bias_dropout_fusion=True, hidden_dropout=0.0),
  **dict(ffn_hidden_size=13696, fp32_residual_connection=False, hidden_size=4096, kv_channels=128),
  **dict(layernorm_epsilon=1e-5, multi_query_attention=True, multi_query_group_num=2, num_layers=28),
  **dict(
    num_attention_heads=32, original_rope=True, padded_vocab_size=65024, post_layer_norm=True, rmsnorm=True
  ),
  **dict(seq_length=32768, use_cache=True, torch_dtype="float16", transformers_version="4.27.1"),
  **dict(tie_word_embeddings=False, eos_token_id=2, pad_token_id=0),
)
CHATGLM3_32K = CHATGLM2 | dict(
  **dict(_name_or_path="THUDM/chatglm3-6b-base", rope_ratio=50, vocab_size=65024, classifier_dropout=None),
  **dict(quantization_bit=0, pre_seq_len=None, prefix_projection=False),
)
GLM4_9B = CHATGLM2 | dict(
  **dict(_name_or_path="THUDM/glm-4-9b-chat", num_layers=40, padded_vocab_size=151552, rope_ratio=500),
  **dict(layernorm_epsilon=1.5625e-7, seq_length=131072, torch_dtype="bfloat16", classifier_dropout=None),
  **dict(eos_token_id=[151329, 151336, 151338], pad_token_id=151329),
  architectures=["ChatGLMForConditionalGeneration"],
)
CHATGLM_6B = dict(
  **dict(architectures=["ChatGLMModel"], model_type="chatglm", _name_or_path="THUDM/chatglm-6b"),
  **dict(auto_map={"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, vocab_size=130528),
  **dict(
    bos_token_id=130004, eos_token_id=130005, mask_token_id=130000, gmask_token_id=130001, pad_token_id=3
  ),
  **dict(hidden_size=4096, inner_hidden_size=16384, layernorm_epsilon=1e-5, max_sequence_length=2048),
  **dict(num_attention_heads=32, num_layers=28, position_encoding_2d=True, torch_dtype="float16"),
  **dict(transformers_version="4.23.1", use_cache=True),
)
GLM_130B = dict(
  **dict(model_type="glm-130b", vocab_size=150528, hidden_size=12288, inner_hidden_size=32768, num_layers=70),
  **dict(num_attention_heads=96, max_sequence_length=2048, layernorm_epsilon=1e-5, torch_dtype="float16"),
)
HALF = dict(rotary_dim=64, layout="interleaved")
PUBLISHED = {
  "Baichuan 7B": (BAICHUAN_7B, Rope(original_length=4096), None, dict(norm_head=False, dtype="bfloat16")),
  "Baichuan 2 7B": (BAICHUAN2_7B, Rope(original_length=4096), None, dict(norm_head=True, head_dim=128)),
  "Baichuan 13B": (BAICHUAN_13B, Alibi(), None, dict(norm_head=False, context_length=4096, num_heads=40)),
  "Baichuan 2 13B": (BAICHUAN_13B | dict(vocab_size=125696), Alibi(), None, dict(norm_head=True)),
  "ChatGLM2 6B": (
    CHATGLM2,
    Rope(original_length=32768, **HALF),
    None,
    dict(num_kv_heads=2, biases=("q", "k", "v"), tie_embeddings=False, norm=RMSNorm(1e-5)),
  ),
  "ChatGLM2 6B 32k": (
    CHATGLM2 | dict(rope_ratio=16),
    PiRope(factor=16.0, original_length=32768, **HALF),
    None,
    {},
  ),
  "ChatGLM3 6B 32k": (CHATGLM3_32K, Rope(5e5, original_length=32768, **HALF), None, dict(mlp=Glu("silu"))),
  "GLM-4 9B": (
    GLM4_9B,
    Rope(5e6, original_length=131072, **HALF),
    None,
    dict(eos_ids=(151329, 151336, 151338), norm=RMSNorm(1.5625e-7), num_layers=40),
  ),
  "ChatGLM 6B": (
    CHATGLM_6B,
    Rope2d(),
    None,
    dict(eos_ids=(130005,), tie_embeddings=True, mlp=Mlp("gelu_tanh"), norm=LayerNorm(1e-5), head_dim=128),
  ),
  "GLM 130B": (GLM_130B, Rope(), None, dict(tie_embeddings=True, mlp=Glu("gelu"), layer_scaling=True)),
}
PARAMETERS = {
  "Baichuan 7B": 7_000_559_616,
  "Baichuan 2 7B": 7_505_973_248,
  "Baichuan 13B": 13_264_901_120,
  "Baichuan 2 13B": 13_896_668_160,
  "ChatGLM2 6B": 6_243_584_000,
  "GLM-4 9B": 9_399_951_360,
  "ChatGLM 6B": 6_173_286_400,
}
"""How many parameters they are known to have, from memory of what other programs print."""
