"""config.json of published models of the families of family_rows_gpt.py, from memory: keys as their authors wrote them."""

from jaxllm.position import Alibi, Rope
from jaxllm.position.absolute import Learned
from jaxllm.wiring import Parallel, ParallelTwoNorms, Post, Pre

STARCODER2 = dict(
  **dict(
    architectures=["Starcoder2ForCausalLM"], model_type="starcoder2", vocab_size=49152, hidden_size=3072
  ),
  **dict(intermediate_size=12288, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2),
  **dict(
    activation_function="gelu", hidden_act="gelu_pytorch_tanh", norm_type="layer_norm", norm_epsilon=1e-5
  ),
  **dict(layer_norm_epsilon=1e-5, mlp_type="default", use_bias=True, sliding_window=4096),
  **dict(max_position_embeddings=16384, rope_theta=999999.4420358813, scale_attn_weights=True),
  **dict(attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1, attention_softmax_in_fp32=True),
  **dict(scale_attention_softmax_in_fp32=True, bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16"),
  **dict(initializer_range=0.018042, use_cache=True, transformers_version="4.37.0.dev0"),
)
PHI2 = dict(
  **dict(architectures=["PhiForCausalLM"], model_type="phi", vocab_size=51200, hidden_size=2560),
  **dict(intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(hidden_act="gelu_new", layer_norm_eps=1e-5, max_position_embeddings=2048, rope_theta=10000.0),
  **dict(partial_rotary_factor=0.4, rope_scaling=None, qk_layernorm=False, tie_word_embeddings=False),
  **dict(attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.1, torch_dtype="float16", use_cache=True),
  **dict(bos_token_id=50256, eos_token_id=50256, _name_or_path="microsoft/phi-2", initializer_range=0.02),
)
GPT = dict(activation_function="gelu_new", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=True)
GPT |= dict(gradient_checkpointing=False, initializer_range=0.02, layer_norm_epsilon=1e-5, n_inner=None)
GPT |= dict(n_positions=2048, scale_attn_weights=True, summary_activation=None, summary_first_dropout=0.1)
GPT |= dict(summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True)
GPT |= dict(tie_word_embeddings=False, tokenizer_class="GPT2Tokenizer", eos_token_id=50256)
GPT |= dict(task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})
GPTJ = GPT | dict(
  **dict(architectures=["GPTJForCausalLM"], model_type="gptj", vocab_size=50400, n_embd=4096, n_head=16),
  **dict(n_layer=28, rotary=True, rotary_dim=64, bos_token_id=50256, transformers_version="4.18.0.dev0"),
)
CODEGEN = GPT | dict(
  **dict(architectures=["CodeGenForCausalLM"], model_type="codegen", vocab_size=51200, n_ctx=2048),
  **dict(n_embd=1024, n_head=16, n_layer=20, rotary_dim=32, bos_token_id=1, torch_dtype="float16"),
)
FALCON = dict(
  **dict(architectures=["FalconForCausalLM"], model_type="falcon", vocab_size=65024, hidden_size=4544),
  **dict(num_hidden_layers=32, num_attention_heads=71, alibi=False, bias=False, multi_query=True),
  **dict(new_decoder_architecture=False, parallel_attn=True, apply_residual_connection_post_layernorm=False),
  **dict(attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.02, layer_norm_epsilon=1e-5),
  **dict(bos_token_id=11, eos_token_id=11, torch_dtype="bfloat16", use_cache=True),
  **dict(auto_map={"AutoConfig": "configuration_falcon.FalconConfig"}, transformers_version="4.27.4"),
)
FALCON_40B = FALCON | dict(
  hidden_size=8192,
  num_hidden_layers=60,
  num_attention_heads=128,
  num_kv_heads=8,
  new_decoder_architecture=True,
)
FALCON_11B = FALCON_40B | dict(
  **dict(hidden_size=4096, num_attention_heads=32, ffn_hidden_size=16384, num_ln_in_parallel_attn=1),
  **dict(max_position_embeddings=8192, rope_theta=500042.0, rope_scaling=None, tie_word_embeddings=False),
)
FALCON_RW = FALCON | dict(
  **dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, alibi=True),
  **dict(bias=True, multi_query=False, parallel_attn=False, bos_token_id=1, eos_token_id=2),
)
OPT = dict(
  **dict(architectures=["OPTForCausalLM"], model_type="opt", vocab_size=50272, hidden_size=768, ffn_dim=3072),
  **dict(num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=2048, word_embed_proj_dim=768),
  **dict(activation_function="relu", do_layer_norm_before=True, _remove_final_layer_norm=False, dropout=0.1),
  **dict(activation_dropout=0.0, attention_dropout=0.0, layerdrop=0.0, init_std=0.02, prefix="</s>"),
  **dict(bos_token_id=2, eos_token_id=2, pad_token_id=1, torch_dtype="float16", use_cache=True),
)
OPT_350M = OPT | dict(
  **dict(hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16),
  **dict(word_embed_proj_dim=512, do_layer_norm_before=False),
)
STARCODER = GPT | dict(
  **dict(architectures=["GPTBigCodeForCausalLM"], model_type="gpt_bigcode", activation_function="gelu"),
  **dict(vocab_size=49152, n_embd=6144, n_head=48, n_inner=24576, n_layer=40, n_positions=8192),
  **dict(multi_query=True, attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True),
  **dict(inference_runner=0, max_batch_size=None, max_sequence_length=None, pad_key_length=True),
  **dict(pre_allocate_kv_cache=False, validate_runner_input=True, tie_word_embeddings=True, eos_token_id=0),
)
MINITRON = dict(
  **dict(architectures=["NemotronForCausalLM"], model_type="nemotron", vocab_size=256000, hidden_size=3072),
  **dict(intermediate_size=9216, num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8),
  **dict(head_dim=128, hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5, rope_theta=10000),
  **dict(max_position_embeddings=4096, attention_bias=False, mlp_bias=False, tie_word_embeddings=False),
  **dict(bos_token_id=2, eos_token_id=3, torch_dtype="bfloat16", initializer_range=0.0134),
)
PERSIMMON = dict(
  **dict(architectures=["PersimmonForCausalLM"], model_type="persimmon", vocab_size=262144, hidden_size=4096),
  **dict(intermediate_size=16384, num_hidden_layers=36, num_attention_heads=64, hidden_act="relu2"),
  **dict(layer_norm_eps=1e-5, max_position_embeddings=16384, partial_rotary_factor=0.5, rope_theta=25000.0),
  **dict(qk_layernorm=True, rope_scaling=None, tie_word_embeddings=False, bos_token_id=71013),
  **dict(eos_token_id=71013, attention_dropout=0.0, hidden_dropout=0.0, torch_dtype="bfloat16"),
)
STABLELM = dict(
  **dict(architectures=["StableLmForCausalLM"], model_type="stablelm", vocab_size=50304, hidden_size=2560),
  **dict(intermediate_size=6912, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
  **dict(hidden_act="silu", layer_norm_eps=1e-5, max_position_embeddings=4096, partial_rotary_factor=0.25),
  **dict(rope_theta=10000, use_qkv_bias=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0),
  **dict(torch_dtype="bfloat16", initializer_range=0.02, use_cache=True, transformers_version="4.38.0"),
)
STABLELM2 = STABLELM | dict(
  **dict(vocab_size=100352, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40),
  **dict(num_attention_heads=32, num_key_value_heads=8, use_parallel_residual=True, qk_layernorm=True),
)
# settings, position and window of the first layer, and other fields
PUBLISHED = {
  "StarCoder2 3B": (
    STARCODER2,
    Rope(999999.4420358813, original_length=16384),
    4096,
    dict(num_kv_heads=2, tie_embeddings=True, biases=("q", "k", "v", "o", "up", "down")),
  ),
  "Phi-2": (PHI2, Rope(rotary_dim=32, original_length=2048), None, dict(head_dim=80, wiring=Parallel())),
  "GPT-J 6B": (
    GPTJ,
    Rope(rotary_dim=64, layout="interleaved", original_length=2048),
    None,
    dict(mlp_dim=16384, head_dim=256, biases=("up", "down", "head")),
  ),
  "CodeGen 350M": (
    CODEGEN,
    Rope(rotary_dim=32, layout="interleaved", original_length=2048),
    None,
    dict(mlp_dim=4096, head_dim=64, eos_ids=(50256,)),
  ),
  "Falcon 7B": (
    FALCON,
    Rope(original_length=2048),
    None,
    dict(num_kv_heads=1, head_dim=64, mlp_dim=18176, wiring=Parallel(), tie_embeddings=True),
  ),
  "Falcon 40B": (
    FALCON_40B,
    Rope(original_length=2048),
    None,
    dict(num_kv_heads=8, wiring=ParallelTwoNorms(), biases=()),
  ),
  "Falcon 2 11B": (
    FALCON_11B,
    Rope(500042.0, original_length=8192),
    None,
    dict(num_kv_heads=8, wiring=Parallel(), mlp_dim=16384, tie_embeddings=False),
  ),
  "Falcon RW 1B": (
    FALCON_RW,
    Alibi(slope_dtype="bfloat16", placement="before"),
    None,
    dict(num_kv_heads=32, wiring=Pre(), eos_ids=(2,)),
  ),
  "OPT 125M": (OPT, Learned(2048, 2), None, dict(embed_width=None, wiring=Pre(), length_limit=2048)),
  "OPT 350M": (OPT_350M, Learned(2048, 2), None, dict(embed_width=512, wiring=Post(), dtype="float16")),
  "StarCoder": (STARCODER, Learned(8192), None, dict(num_kv_heads=1, head_dim=128, length_limit=8192)),
  "Minitron 4B": (
    MINITRON,
    Rope(rotary_dim=64, original_length=4096),
    None,
    dict(head_dim=128, num_kv_heads=8, biases=()),
  ),
  "Persimmon 8B": (PERSIMMON, Rope(25000.0, 32, original_length=16384), None, dict(eos_ids=(71013,))),
  "StableLM 3B": (
    STABLELM,
    Rope(rotary_dim=20, original_length=4096),
    None,
    dict(qk_norm=None, biases=(), wiring=Pre()),
  ),
  "StableLM 2 12B": (
    STABLELM2,
    Rope(rotary_dim=40, original_length=4096),
    None,
    dict(num_kv_heads=8, wiring=Parallel()),
  ),
}
