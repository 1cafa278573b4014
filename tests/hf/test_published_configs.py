"""Settings as published checkpoints have them, legacy keys included: accepted, and read as their authors mean them."""

import published_glm
import published_gpt
import published_llama
import pytest

from jaxllm.activation import ClampedGlu, Glu
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe
from jaxllm.hf.families import ignored_settings, read_config
from jaxllm.norm import QkNorm, RMSNorm
from jaxllm.position import Alibi, Rope
from jaxllm.position.absolute import Learned
from jaxllm.position.rope import PiRope, YarnRope
from jaxllm.position.scalings import Llama3Rope, LongRope

LLAMA2 = dict(
  **dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=4096),
  **dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(
    hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-5, initializer_range=0.02, use_cache=True
  ),
  **dict(
    pretraining_tp=1, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16", bos_token_id=1
  ),
  **dict(eos_token_id=2, transformers_version="4.31.0.dev0", _name_or_path="meta-llama/Llama-2-7b-hf"),
)
LLAMA31 = LLAMA2 | dict(
  **dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072),
  **dict(
    rope_theta=500000.0, attention_bias=False, attention_dropout=0.0, mlp_bias=False, torch_dtype="bfloat16"
  ),
  **dict(bos_token_id=128000, eos_token_id=[128001, 128008, 128009], transformers_version="4.42.3"),
)
LLAMA31["rope_scaling"] = dict(
  **dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
  **dict(original_max_position_embeddings=8192, rope_type="llama3"),
)
MISTRAL = dict(
  **dict(architectures=["MistralForCausalLM"], model_type="mistral", vocab_size=32000, hidden_size=4096),
  **dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
  **dict(
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
  ),
  **dict(tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, use_cache=True),
)
GEMMA = dict(
  **dict(
    architectures=["GemmaForCausalLM"], model_type="gemma", vocab_size=256000, hidden_size=2048, head_dim=256
  ),
  **dict(intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1),
  **dict(
    hidden_act="gelu",
    hidden_activation=None,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
  ),
  **dict(
    attention_bias=False,
    attention_dropout=0.0,
    rope_scaling=None,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
  ),
  **dict(torch_dtype="bfloat16", transformers_version="4.38.0.dev0", use_cache=True),
)
GEMMA3 = dict(
  **dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", vocab_size=262144, hidden_size=1152),
  **dict(
    intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256
  ),
  **dict(hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=256),
  **dict(
    rms_norm_eps=1e-6, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None, sliding_window=512
  ),
  **dict(
    sliding_window_pattern=6,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    cache_implementation="hybrid",
  ),
  **dict(attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0),
)
PHI3 = dict(
  **dict(architectures=["Phi3ForCausalLM"], model_type="phi3", vocab_size=32064, hidden_size=3072),
  **dict(intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(
    hidden_act="silu",
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
  ),
  **dict(
    rope_theta=10000.0, sliding_window=262144, attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0
  ),
  **dict(resid_pdrop=0.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=32000, pad_token_id=32000),
  **dict(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, torch_dtype="bfloat16"),
)
PHI3["rope_scaling"] = dict(type="su", short_factor=[1.05] * 48, long_factor=[1.3 + i for i in range(48)])
PYTHIA = dict(
  **dict(architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", vocab_size=50304, hidden_size=512),
  **dict(
    intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, hidden_act="gelu", layer_norm_eps=1e-5
  ),
  **dict(max_position_embeddings=2048, rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True),
  **dict(tie_word_embeddings=False, torch_dtype="float16", bos_token_id=0, eos_token_id=0, use_cache=True),
)
BLOOM = dict(
  **dict(
    architectures=["BloomForCausalLM"], model_type="bloom", vocab_size=250880, n_embed=1024, hidden_size=1024
  ),
  **dict(n_layer=24, num_attention_heads=16, n_inner=None, layer_norm_epsilon=1e-5, seq_length=2048),
  **dict(
    apply_residual_connection_post_layernorm=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    pretraining_tp=1,
  ),
  **dict(
    attention_softmax_in_fp32=True, bias_dropout_fusion=True, masked_softmax_fusion=True, offset_alibi=100
  ),
  **dict(skip_bias_add=True, skip_bias_add_qkv=False, slow_but_exact=False, bos_token_id=1, eos_token_id=2),
  **dict(pad_token_id=3, unk_token_id=0, initializer_range=0.02, use_cache=True),
)
MPT = dict(
  **dict(
    architectures=["MPTForCausalLM"],
    model_type="mpt",
    vocab_size=50432,
    d_model=4096,
    n_heads=32,
    n_layers=32,
  ),
  **dict(
    expansion_ratio=4, max_seq_len=2048, learned_pos_emb=True, no_bias=True, logit_scale=None, emb_pdrop=0
  ),
  **dict(
    resid_pdrop=0, embedding_fraction=1.0, norm_type="low_precision_layernorm", init_device="cpu", verbose=0
  ),
  **dict(init_config=dict(name="kaiming_normal_"), tokenizer_name="EleutherAI/gpt-neox-20b", use_cache=False),
  **dict(auto_map={"AutoConfig": "configuration_mpt.MPTConfig"}, torch_dtype="bfloat16"),
)
MPT["attn_config"] = dict(
  **dict(alibi=True, alibi_bias_max=8, attn_impl="torch", attn_pdrop=0, attn_type="multihead_attention"),
  **dict(attn_uses_sequence_id=False, clip_qkv=None, prefix_lm=False, qk_ln=False, softmax_scale=None),
)
GPT2 = dict(
  **dict(
    architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=50257, n_ctx=1024, n_embd=768, n_head=12
  ),
  **dict(
    n_layer=12, n_positions=1024, activation_function="gelu_new", layer_norm_epsilon=1e-5, attn_pdrop=0.1
  ),
  **dict(
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    initializer_range=0.02,
    summary_activation=None,
    summary_first_dropout=0.1,
  ),
  **dict(summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, bos_token_id=50256),
  **dict(eos_token_id=50256, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
)
SMOLLM2 = LLAMA2 | dict(
  **dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9
  ),
  **dict(num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000, tie_word_embeddings=True),
  **{"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "eos_token_id": 0},
)
# Those with experts are from memory
MIXTRAL = MISTRAL | dict(
  **dict(architectures=["MixtralForCausalLM"], model_type="mixtral", max_position_embeddings=32768),
  **dict(num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, router_aux_loss_coef=0.02),
  **dict(rope_theta=1e6, sliding_window=None, attention_dropout=0.0, transformers_version="4.36.0.dev0"),
)
QWEN3_MOE = dict(
  **dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=151936, hidden_size=2048),
  **dict(intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4),
  **dict(
    head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True
  ),
  **dict(decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=False, router_aux_loss_coef=0.001),
  **dict(max_position_embeddings=40960, max_window_layers=48, rms_norm_eps=1e-6, rope_theta=1000000.0),
  **dict(rope_scaling=None, sliding_window=None, use_sliding_window=False, tie_word_embeddings=False),
  **dict(attention_bias=False, attention_dropout=0.0, hidden_act="silu", torch_dtype="bfloat16"),
  **dict(bos_token_id=151643, eos_token_id=151645, initializer_range=0.02, use_cache=True),
)
GPT_OSS = dict(
  **dict(architectures=["GptOssForCausalLM"], model_type="gpt_oss", vocab_size=201088, hidden_size=2880),
  **dict(intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8),
  **dict(head_dim=64, num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, hidden_act="silu"),
  **dict(attention_bias=True, attention_dropout=0.0, initial_context_length=4096, sliding_window=128),
  **dict(layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072),
  **dict(output_router_logits=False, router_aux_loss_coef=0.9, rms_norm_eps=1e-5, rope_theta=150000),
  **dict(
    swiglu_limit=7.0, tie_word_embeddings=False, eos_token_id=200002, pad_token_id=199999, use_cache=True
  ),
)
GPT_OSS["rope_scaling"] = dict(
  **dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096),
  **dict(rope_type="yarn", truncate=False),
)
# settings, position and window of the first layer, and other fields
PUBLISHED = {
  "Llama 2 7B": (LLAMA2, Rope(original_length=4096), None, dict(dtype="float16", eos_ids=(2,))),
  "Llama 3.1 8B": (
    LLAMA31,
    Llama3Rope(5e5, factor=8.0, original_length=8192),
    None,
    dict(num_kv_heads=8, eos_ids=(128001, 128008, 128009), context_length=131072),
  ),
  "LongChat 7B 16k": (
    LLAMA2 | dict(rope_scaling=dict(type="linear", factor=8.0), max_sequence_length=16384),
    PiRope(factor=8.0, original_length=4096),
    None,
    {},
  ),
  "SmolLM2 135M": (SMOLLM2, Rope(100000, original_length=8192), None, dict(head_dim=64, eos_ids=(0,))),
  "Mistral 7B": (MISTRAL, Rope(original_length=32768), 4096, dict(dtype="bfloat16")),
  "Gemma 2B": (GEMMA, Rope(original_length=8192), None, dict(embed_scale=2048**0.5, tie_embeddings=True)),
  "Gemma 3 1B": (
    GEMMA3,
    Rope(10000, original_length=32768),
    512,
    dict(attention_scale=None, logit_softcap=None),
  ),
  "Phi-3 mini 128k": (
    PHI3,
    LongRope(
      original_length=4096,
      factor=32.0,
      short_factor=(1.05,) * 48,
      long_factor=tuple(1.3 + i for i in range(48)),
    ),
    262144,
    dict(head_dim=96),
  ),
  "Pythia 70M": (PYTHIA, Rope(rotary_dim=16, original_length=2048), None, dict(eos_ids=(0,))),
  "BLOOM 560M": (BLOOM, Alibi(), None, dict(embed_norm=True, num_heads=16, context_length=2048)),
  "MPT 7B": (MPT, Alibi(), None, dict(clip_qkv=None, context_length=2048, mlp_dim=16384)),
  "Mixtral 8x7B": (
    MIXTRAL,
    Rope(1e6, original_length=32768),
    None,
    dict(mlp=Moe(Glu(), 8, 2), num_kv_heads=8, mlp_dim=14336),
  ),
  "Qwen3 30B-A3B": (
    QWEN3_MOE,
    Rope(1e6, original_length=40960),
    None,
    dict(mlp=Moe(Glu(), 128, 8, mlp_dim=768), qk_norm=QkNorm(RMSNorm(multiply_in="input")), biases=()),
  ),
  "gpt-oss 20B": (
    GPT_OSS,
    YarnRope(150000, original_length=4096, factor=32.0, truncate=False),
    128,
    dict(
      mlp=Moe(ClampedGlu(), 32, 4), attention_sinks=True, biases=(*"qkvo", "router", "gate", "up", "down")
    ),
  ),
  "GPT-2": (GPT2, Learned(1024), None, dict(mlp_dim=3072, length_limit=1024)),
}
PUBLISHED |= published_llama.PUBLISHED | published_glm.PUBLISHED

PUBLISHED |= published_gpt.PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
  plain, position, window, fields = PUBLISHED[name]
  cfg = read_config(plain)[1]
  assert (cfg.layers[0].position, cfg.layers[0].window) == (position, window)
  assert {field: getattr(cfg, field) for field in fields} == fields


def test_the_activation_of_the_first_gemma():
  """Its "gelu" is the tanh form."""
  assert read_config(GEMMA)[1].mlp.activation == "gelu_tanh"


def test_remote_code_is_among_the_ignored():
  assert "auto_map" in ignored_settings(PHI3) and "auto_map" in ignored_settings(MPT)


@pytest.mark.parametrize("name", published_llama.LAST)
def test_layers_without_a_window(name):
  cfg = read_config(PUBLISHED[name][0])[1]
  assert (cfg.layers[-1].position, cfg.layers[-1].window) == (published_llama.LAST[name], None)
  assert len(cfg.layers) == 4


def test_defaults_of_experts():
  """Settings that an older file leaves out are those of the class, and GPT-OSS's is a YaRN of its own."""
  shorter = {
    name: x for name, x in GPT_OSS.items() if name not in ("rope_scaling", "layer_types", "swiglu_limit")
  }
  assert read_config(shorter)[1] == read_config(GPT_OSS)[1]
  assert len(read_config(GPT_OSS)[1].layers) == 2


@pytest.mark.parametrize(
  ("plain", "message"),
  [
    (
      GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}},
      "quantization_config: .*quantized checkpoints",
    ),
    (GPT_OSS | {"experts_per_token": 2}, "experts_per_token: found 2, expected 4 .as num_experts_per_tok"),
    (GPT_OSS | {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
    (
      MIXTRAL | {"num_experts_per_tok": 9},
      "num_experts_per_tok: found 9, expected at most num_local_experts = 8",
    ),
    (MIXTRAL | {"num_experts": 4}, "num_experts: found 4, expected 8 as in num_local_experts"),
    (QWEN3_MOE | {"mlp_only_layers": [0] * 10_001}, "mlp_only_layers: .*at most 10,000 layers"),
    (QWEN3_MOE | {"mlp_only_layers": [-1]}, "mlp_only_layers: .*expected a list of the numbers of at most"),
    (QWEN3_MOE | {"norm_topk_prob": 1}, "norm_topk_prob: found 1, expected true or false"),
  ],
)
def test_bad_settings_of_experts(plain, message):
  with pytest.raises(ConfigError, match=message):
    read_config(plain)


def test_layers_of_gemma3():
  """Five with a window and one without, 26 in all, which six do not divide."""
  cfg = read_config(GEMMA3)[1]
  windows = [cfg.layer(i).window for i in range(26)]
  assert [i for i, window in enumerate(windows) if window is None] == [5, 11, 17, 23]
  assert cfg.layers[5].position == Rope(1000000, original_length=32768)
