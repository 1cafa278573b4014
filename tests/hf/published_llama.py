"""config.json of published checkpoints of Llama's later relatives, from memory but for the shapes of the objects in them.

What is tried is that all their keys are known, those of earlier versions included, and that they are read as meant.
"""

from jaxllm.activation import Mlp, Xielu
from jaxllm.norm import LayerNorm
from jaxllm.position import NoPE, NtkRope, Rope
from jaxllm.position.rope import YarnRope
from jaxllm.position.scalings import Llama3Rope
from jaxllm.wiring import Sandwich

USUAL = dict(attention_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True)
USUAL |= dict(
  hidden_act="silu", torch_dtype="bfloat16", tie_word_embeddings=False, transformers_version="4.5x"
)
GLM = USUAL | dict(
  **dict(
    architectures=["GlmForCausalLM"], model_type="glm", vocab_size=151552, hidden_size=4096, head_dim=128
  ),
  **dict(intermediate_size=13696, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=2),
  **dict(attention_bias=True, max_position_embeddings=131072, rms_norm_eps=1.5625e-07, rope_theta=10000.0),
  **dict(pad_token_id=151329, eos_token_id=[151329, 151336, 151338]),
)
GLM4 = USUAL | dict(
  **dict(
    architectures=["Glm4ForCausalLM"], model_type="glm4", vocab_size=151552, hidden_size=6144, head_dim=128
  ),
  **dict(intermediate_size=23040, num_hidden_layers=61, num_attention_heads=48, num_key_value_heads=2),
  **dict(max_position_embeddings=32768, rms_norm_eps=1e-05, rope_theta=10000.0, partial_rotary_factor=0.5),
  **dict(pad_token_id=151329, eos_token_id=[151329, 151336, 151338]),
)
COHERE = USUAL | dict(
  **dict(architectures=["CohereForCausalLM"], model_type="cohere", vocab_size=256000, hidden_size=12288),
  **dict(intermediate_size=33792, num_hidden_layers=64, num_attention_heads=96, num_key_value_heads=8),
  **dict(layer_norm_eps=1e-05, logit_scale=0.8333333333333334, max_position_embeddings=131072),
  **dict(rope_theta=75000000.0, use_qk_norm=True, model_max_length=131072, torch_dtype="float16"),
  **dict(bos_token_id=5, eos_token_id=255001, pad_token_id=0),
)
del COHERE["tie_word_embeddings"]  # which the first files lack
COHERE2 = USUAL | dict(
  **dict(architectures=["Cohere2ForCausalLM"], model_type="cohere2", vocab_size=256000, hidden_size=4096),
  **dict(
    intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
  ),
  **dict(layer_norm_eps=1e-05, logit_scale=0.25, max_position_embeddings=132096, rope_theta=50000),
  **dict(rope_scaling=None, rotary_pct=1.0, position_embedding_type="rope_gptj", use_qk_norm=False),
  **dict(
    use_embedding_sharing=True,
    use_gated_activation=True,
    use_parallel_block=True,
    use_parallel_embedding=True,
  ),
  **dict(order_of_interleaved_layers="local_attn_first", layer_switch=4, sliding_window=4096),
  **dict(sliding_window_pattern=4, cache_implementation="hybrid", eos_token_id=255001, pad_token_id=0),
)
del COHERE2["tie_word_embeddings"]
OLMO = USUAL | dict(
  **dict(architectures=["OlmoForCausalLM"], model_type="olmo", vocab_size=50304, hidden_size=4096),
  **dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(clip_qkv=8.0, max_position_embeddings=2048, rope_scaling=None, rope_theta=10000.0, pretraining_tp=1),
  **dict(torch_dtype="float32", eos_token_id=50279, pad_token_id=1),
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32, beta_slow=1)
YARN |= dict(attention_factor=1.2079441541679836)
OLMO3 = USUAL | dict(
  **dict(architectures=["Olmo3ForCausalLM"], model_type="olmo3", vocab_size=100278, hidden_size=4096),
  **dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(max_position_embeddings=65536, rms_norm_eps=1e-06, rope_theta=500000, rope_scaling=YARN),
  **dict(sliding_window=4096, layer_types=[*["sliding_attention"] * 3, "full_attention"] * 8),
  **dict(eos_token_id=100257, pad_token_id=100277),
)
EXAONE = USUAL | dict(
  **dict(architectures=["Exaone4ForCausalLM"], model_type="exaone4", vocab_size=102400, hidden_size=5120),
  **dict(
    intermediate_size=27392, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, head_dim=128
  ),
  **dict(max_position_embeddings=131072, rms_norm_eps=1e-05, rope_theta=1000000, sliding_window=4096),
  **dict(sliding_window_pattern="LLLG", layer_types=[*["sliding_attention"] * 3, "full_attention"] * 16),
  **dict(bos_token_id=1, eos_token_id=361, pad_token_id=0),
)
EXAONE["rope_scaling"] = dict(factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3")
EXAONE["rope_scaling"] |= dict(original_max_position_embeddings=8192)
SMALL_EXAONE = EXAONE | dict(
  **dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=30, num_attention_heads=32, head_dim=64),
  **dict(max_position_embeddings=65536, sliding_window=None, sliding_window_pattern=None),
  **dict(layer_types=["full_attention"] * 30, tie_word_embeddings=True),
)
SEED = USUAL | dict(
  **dict(architectures=["SeedOssForCausalLM"], model_type="seed_oss", vocab_size=155136, hidden_size=5120),
  **dict(
    intermediate_size=27648, num_hidden_layers=64, num_attention_heads=80, num_key_value_heads=8, head_dim=128
  ),
  **dict(
    attention_bias=True, attention_out_bias=False, attention_dropout=0.1, residual_dropout=0.1, mlp_bias=False
  ),
  **dict(max_position_embeddings=524288, rms_norm_eps=1e-06, rope_theta=10000000.0, pretraining_tp=1),
  **dict(rope_scaling={"rope_type": "default"}, bos_token_id=0, eos_token_id=2, pad_token_id=1),
)
ARCEE = USUAL | dict(
  **dict(
    architectures=["ArceeForCausalLM"], model_type="arcee", vocab_size=128005, hidden_size=2560, head_dim=128
  ),
  **dict(intermediate_size=18432, num_hidden_layers=36, num_attention_heads=20, num_key_value_heads=4),
  **dict(
    hidden_act="relu2", mlp_bias=False, max_position_embeddings=65536, rms_norm_eps=1e-05, rope_theta=10000.0
  ),
  **dict(bos_token_id=128000, eos_token_id=128001),
)
ARCEE["rope_scaling"] = dict(
  beta_fast=32.0, beta_slow=1.0, factor=20.0, mscale=1.0, rope_type="yarn", type="yarn"
)
ARCEE["rope_scaling"] |= dict(original_max_position_embeddings=4096)
HUNYUAN = USUAL | dict(
  **dict(architectures=["HunYuanDenseV1ForCausalLM"], model_type="hunyuan_v1_dense", vocab_size=128167),
  **dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128
  ),
  **dict(num_key_value_heads=8, max_position_embeddings=262144, rms_norm_eps=1e-05, rope_theta=10000.0),
  **dict(
    mlp_bias=False,
    norm_type="rms",
    use_qk_norm=True,
    use_cla=False,
    use_rotary_pos_emb=True,
    pretraining_tp=1,
  ),
  **dict(
    add_classification_head=False, class_num=0, pool_type="last", dense_list=[4096, 0], cla_share_factor=2
  ),
  **dict(attention_head_dim=128, org_vocab_size=128167, eod_token_id=127967, mask_init_id=12, pad_id=127961),
  **dict(im_start_id=5, im_end_id=6, im_newline_id=11, text_start_id=7, text_end_id=8, sep_token_id=127962),
  **dict(bos_token_id=127958, eos_token_id=127960, pad_token_id=127961, tie_word_embeddings=True),
)
HUNYUAN["rope_scaling"] = dict(
  alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, type="dynamic"
)
HUNYUAN["rope_scaling"] |= dict(mscale_all_dim=1.0)
APERTUS = USUAL | dict(
  **dict(architectures=["ApertusForCausalLM"], model_type="apertus", vocab_size=131072, hidden_size=4096),
  **dict(intermediate_size=21504, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
  **dict(hidden_act="xielu", mlp_bias=False, post_norm=False, qk_norm=True, rms_norm_eps=1e-05),
  **dict(max_position_embeddings=65536, rope_theta=12000000, eos_token_id=68, pad_token_id=3),
)
APERTUS["rope_scaling"] = dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3")
APERTUS["rope_scaling"] |= dict(original_max_position_embeddings=8192, type="llama3")

PAIRS = dict(rotary_dim=64, layout="interleaved")
# settings, position and window of the first layer, and other fields
PUBLISHED = {
  "GLM-4 9B": (
    GLM,
    Rope(original_length=131072, **PAIRS),
    None,
    dict(biases=("q", "k", "v"), eos_ids=(151329, 151336, 151338)),
  ),
  "GLM-4 32B 0414": (GLM4, Rope(original_length=32768, **PAIRS), None, dict(biases=(), wiring=Sandwich())),
  "Command R+": (
    COHERE,
    Rope(7.5e7, layout="interleaved", original_length=131072),
    None,
    dict(tie_embeddings=True, logit_scale=0.8333333333333334, head_dim=128),
  ),
  "Command R7B": (
    COHERE2,
    Rope(50000, layout="interleaved", original_length=132096),
    4096,
    dict(tie_embeddings=True, logit_scale=0.25, qk_norm=None),
  ),
  "OLMo 7B": (
    OLMO,
    Rope(original_length=2048),
    None,
    dict(clip_qkv=8.0, norm=LayerNorm(scale=None, bias=False)),
  ),
  "OLMo 3 7B": (OLMO3, Rope(500000, original_length=65536), 4096, dict(num_kv_heads=32)),
  "EXAONE 4 32B": (
    EXAONE,
    Llama3Rope(1000000, factor=16.0, original_length=8192),
    4096,
    dict(eos_ids=(361,)),
  ),
  "EXAONE 4 1.2B": (
    SMALL_EXAONE,
    Llama3Rope(1000000, factor=16.0, original_length=8192),
    None,
    dict(tie_embeddings=True),
  ),
  "Seed-OSS 36B": (SEED, Rope(1e7, original_length=524288), None, dict(biases=("q", "k", "v"), head_dim=128)),
  "AFM 4.5B": (
    ARCEE,
    YarnRope(factor=20.0, mscale=1.0, original_length=4096),
    None,
    dict(mlp=Mlp("relu2"), eos_ids=(128001,)),
  ),
  "Hunyuan 7B": (
    HUNYUAN,
    NtkRope(factor=1000.0, original_length=262144),
    None,
    dict(tie_embeddings=True, eos_ids=(127960,)),
  ),
  "Apertus 8B": (
    APERTUS,
    Llama3Rope(1.2e7, factor=8.0, original_length=8192),
    None,
    dict(mlp=Xielu(), eos_ids=(68,)),
  ),
}
# of those whose last layer is another: its position
LAST = {
  "Command R7B": NoPE(),
  "EXAONE 4 32B": NoPE(),
  "OLMo 3 7B": YarnRope(500000, factor=8.0, original_length=8192, attention_factor=YARN["attention_factor"]),
}
