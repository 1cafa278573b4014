"""config.json, strictly read: what transformers writes is accepted, and all that is unknown or bad is an error by key."""

import dataclasses
import json
import math
import re

import family_rows_gpt
import pytest
from family_cases import FULL, ROWS, SLIDING, THEIRS, built, family_of, settings

from jaxllm.errors import ConfigError
from jaxllm.hf.families import FAMILIES, differences, ignored_settings, read_config, write_config
from jaxllm.hf.settings import IGNORED, Settings
from jaxllm.position import NoPE, Rope
from jaxllm.position.rope import YarnRope
from jaxllm.position.scalings import Llama3Rope, LongRope

each_row = pytest.mark.parametrize("row", ROWS)
each_of_theirs = pytest.mark.parametrize("row", THEIRS)
each_family = pytest.mark.parametrize("name", FAMILIES)
SIZES = {
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "intermediate_size",
  "model_type",
}
SIZES |= {"num_layers", "padded_vocab_size", "ffn_hidden_size", "ffn_dim"}
SIZES |= {"n_layer", "n_head", "n_layers", "n_heads", "d_model", "n_embd"}
"""What has to be there: a default would be another model's."""


def row_of(name):
  """The first row of a family."""
  return next(row for row in ROWS if row.split(",")[0] == name)


def plain_of(row):
  """All settings that we write for a row."""
  return write_config(built(row).cfg, row.split(",")[0], pinned=True)[1]


@each_row
def test_what_is_written_is_read_back(row):
  cfg, plain = built(row).cfg, plain_of(row)
  family, found = read_config(json.loads(json.dumps(plain)))
  assert (family.name, found) == (row.split(",")[0], cfg)


@each_of_theirs
def test_some_family_has_every_model(row):
  """Without a name it is the first that has it: a Mistral without a window is a Llama."""
  cfg = built(row).cfg
  family, plain = write_config(cfg, pinned=True)
  assert differences(cfg, read_config(plain)[1]) == []
  alone = ("llama", "bloom", "mpt", "gpt2", "gpt_neox", "gemma", "olmo2", "qwen3", "ministral3", "starcoder2")
  alone += ("gpt_oss", "phi", "gptj", "falcon", "opt", "nemotron", "persimmon", "stablelm")
  if row.startswith(alone) and row != "persimmon, RoPE scaled":  # which is a GPT-NeoX, too
    assert family.model_type == row.split(",")[0]


def test_the_first_family_that_has_the_model():
  cfg = read_config(settings("mistral") | dict(sliding_window=None))[1]
  assert write_config(cfg)[0].model_type == "llama"
  # heads that do not divide the width: transformers' Llama refuses them, its Mistral does not
  assert write_config(dataclasses.replace(cfg, num_heads=10))[0].model_type == "mistral"


@each_of_theirs
def test_the_config_that_transformers_writes(row):
  theirs = pytest.importorskip("theirs")
  config = theirs.config(settings(row))
  for plain in (theirs.written(config), config.to_dict()):
    assert read_config(plain)[1] == built(row).cfg


@pytest.mark.parametrize("name", dict.fromkeys(map(family_of, THEIRS)))
def test_a_fresh_config_of_transformers(name):
  """With the sizes of the class, and every attribute it has."""
  theirs = pytest.importorskip("theirs")
  config = theirs.transformers.AutoConfig.for_model(name)
  family, cfg = read_config(theirs.written(config))
  assert family.model_type == name and cfg.vocab_size == config.vocab_size
  assert read_config(config.to_dict())[1] == cfg


@each_of_theirs
def test_missing_settings_have_the_defaults_of_transformers(row):
  """Each left out in turn: what transformers writes for the rest has the missing one at its default."""
  theirs = pytest.importorskip("theirs")
  plain, count = settings(row), 0
  full = theirs.config(plain).to_dict()
  for name in sorted(full.keys() - SIZES - IGNORED):
    rest = {key: value for key, value in full.items() if key != name}
    try:
      expected = theirs.config(rest).to_dict()
    except Exception:  # transformers itself cannot do without it: a name of the row's rope_type, say
      continue
    try:
      wanted = read_config(expected)[1]
      refused = (row, name) == (
        "phi3",
        "original_max_position_embeddings",
      )  # 4096, whatever the RoPE's object says
    except ConfigError:  # the default does not go with the rest
      refused = True
    if refused:
      with pytest.raises(ConfigError):
        read_config(rest)
      continue
    assert read_config(rest)[1] == wanted, name
    count += 1
  assert count >= 5


@each_family
def test_sizes_have_no_default(name):
  plain = plain_of(row_of(name))
  # Falcon's is four times the width, as in all of its models
  has_one = {"ffn_hidden_size"} if name == "falcon" else set()
  for key in plain.keys() & SIZES - {"model_type"} - has_one:
    with pytest.raises(ConfigError, match=rf"config.json: {key}: found nothing.*expected an integer"):
      read_config({one: value for one, value in plain.items() if one != key})


@each_family
def test_unknown_settings_are_refused(name):
  plain = plain_of(row_of(name))
  with pytest.raises(
    ConfigError, match=r"unknown settings.*tie_word_embedings = true \(nearest: tie_word_embeddings\)"
  ):
    read_config(plain | dict(tie_word_embedings=True))
  with pytest.raises(ConfigError, match=r"unknown settings.*rotary_sharpness = 2"):
    read_config(plain | dict(rotary_sharpness=2))


BAD_VALUES = [None, True, -1, 0, 1, 0.5, "x", "", [], {}, [1], math.nan, math.inf, 10**400, 2**40, {"a": 1}]


@each_family
def test_any_value_of_any_setting_is_read_or_refused_by_its_key(name):
  plain = plain_of(row_of(name))
  taken = [key for key in plain if key not in ignored_settings(plain)]
  for key in taken:
    for value in BAD_VALUES:
      try:
        cfg = read_config(plain | {key: value})[1]
      except ConfigError as error:
        assert mentions(str(error), key), f"{key} = {value!r}: {error}"
      else:
        assert cfg.num_layers <= 10_000


BAD_NUMBERS = [
  True,
  False,
  "12",
  "",
  [],
  [1],
  {},
  -1,
  0,
  0.5,
  -0.5,
  2**31,
  2**64,
  10**400,
  math.nan,
  math.inf,
]


def numbers_read(plain):
  """{path of a setting: its kind} of all that may be a number among what a family takes while it reads these settings."""
  kinds, take = {}, Settings.take

  def recorded(self, name, kind, *args, **kwargs):
    kinds[(*filter(None, self.path.split(".")), name)] = kind
    return take(self, name, kind, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Settings, "take", recorded)
    read_config(plain)
  return {path: kind for path, kind in kinds.items() if any(map(kind.fits, (1, 2, 64, 1.5)))}


@each_row
def test_every_number_that_a_family_reads(row):
  """Whether the settings say it or not, inside rope_parameters too: what it may not be is an error by its key."""
  plain = json.loads(json.dumps(plain_of(row)))
  kinds = numbers_read(plain)
  assert len(kinds) >= 6
  for (*above, key), kind in kinds.items():
    for value in BAD_NUMBERS:
      changed = json.loads(json.dumps(plain))
      group = changed
      for name in above:
        group[name] = group = group.get(name) or {}  # from left to right
      group[key] = value
      try:
        cfg = read_config(changed)[1]
      except ConfigError as error:
        named = mentions(str(error), key) or any(name in str(error) for name in above)
        assert named, f"{above} {key} = {value!r}: {error}"
      else:
        assert kind.fits(value), f"{key} = {value!r}"
        assert cfg.num_layers <= 10_000


ROPES = [
  dict(rope_type="linear", factor=2.0, rope_theta=500.0),
  dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
  )
  | dict(mscale_all_dim=1.0, attention_factor=1.0, truncate=True, rope_theta=500.0),
  dict(
    rope_type="longrope", short_factor=[1.0] * 10, long_factor=[2.0] * 10, factor=4.0, attention_factor=1.0
  )
  | dict(original_max_position_embeddings=64, rope_theta=500.0),
  dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0)
  | dict(high_freq_factor=4.0, rope_theta=500.0),
  dict(rope_type="proportional", factor=2.0, partial_rotary_factor=0.5, rope_theta=500.0),
]


@pytest.mark.parametrize("rope", ROPES)
def test_any_value_of_any_rope_setting_is_read_or_refused_by_its_key(rope):
  for key in rope:
    for value in BAD_VALUES:
      try:
        cfg = read_config(settings("llama") | dict(rope_parameters=rope | {key: value}))[1]
      except ConfigError as error:
        assert mentions(str(error), key), f"{key} = {value!r}: {error}"
      else:
        frequencies, scale = cfg.ropes[0].frequencies(cfg.head_dim, 100)
        assert frequencies.min() >= 0 and frequencies.max() < math.inf and 0 < scale < math.inf


RELATED = {
  "rope_scaling": "rope_",
  "rope_parameters": "rope_",
  "rope_theta": "rope_",
  "rope_type": "factor|unknown",
  "rotary_pct": "rotary",
  "partial_rotary_factor": "short_factor",
  "beta_slow": "beta_fast",
  "low_freq_factor": "high_freq_factor",
  "head_dim": "rotary|heads|short_factor|partial",
  "layer_types": "sliding_window",
  "use_sliding_window": "sliding",
  "num_hidden_layers": "layer",
  "hidden_size": "heads|n_head|inner|head_dim|rotary|partial",
  "num_attention_heads": "heads|short_factor|rotary|partial",
  "n_embd": "n_head",
  "d_model": "n_heads",
}
"""Where an error may name another key than the one that was changed: the pattern of its name."""


def mentions(message, key):
  """Whether an error names the key, or the one it goes with."""
  return key in message or re.search(RELATED.get(key, key), message)


LLAMA = dict(settings("llama"))
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  original_max_position_embeddings=64,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LISTS = dict(
  rope_type="longrope", short_factor=[1.0] * 10, long_factor=[2.0] * 10, original_max_position_embeddings=64
)
# what is put into a Llama's config.json, and what the error says
BAD = [
  (
    dict(model_type="lama"),
    r"model_type: found 'lama', expected one of .*\(by its spelling nearest: llama\)",
  ),
  (dict(model_type="qwen2_moe"), r"by its spelling nearest: qwen3_moe"),
  (dict(model_type="deepseek_v3"), r"found 'deepseek_v3', expected one of [\w, -]+$"),
  (dict(model_type=None), "model_type: found null, expected a string"),
  (dict(hidden_act="sliu"), "hidden_act: found 'sliu', expected one of silu"),
  (dict(architectures=["LlamaForSequenceClassification"]), "architectures: .*LlamaForCausalLM"),
  (dict(quantization_config=dict(quant_method="gptq")), "quantization_config: found .*quantized"),
  (dict(is_encoder_decoder=True), "is_encoder_decoder: found true, expected false"),
  (dict(pruned_heads={"0": [1]}), "pruned_heads"),
  (
    dict(torch_dtype="float8_e4m3fn"),
    "torch_dtype: found 'float8_e4m3fn', expected one of float32, bfloat16, float16",
  ),
  (
    dict(torch_dtype="bfloat16", dtype="float16"),
    "torch_dtype: found 'bfloat16', expected 'float16' as in dtype",
  ),
  (dict(num_attention_heads=0), "num_attention_heads: found 0, expected an integer from 1"),
  (
    dict(num_attention_heads=5),
    "num_key_value_heads: found 2, expected a divisor of num_attention_heads = 5",
  ),
  (dict(num_key_value_heads=4), "num_key_value_heads: found 4, expected a divisor"),
  (dict(num_attention_heads=10), "num_attention_heads: found 10, expected a divisor of hidden_size = 72"),
  (dict(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000, expected an integer from 1 to 10000"),
  (dict(num_hidden_layers=True), "num_hidden_layers: found true"),
  (dict(hidden_size=2**31), "hidden_size: found 2147483648, expected an integer from 1 to 2147483647"),
  (dict(hidden_size=72.0), r"hidden_size: found 72.0"),
  (dict(hidden_size="72"), "hidden_size: found '72'"),
  (dict(vocab_size=0), "vocab_size: found 0"),
  (dict(vocab_size=10**5000), "vocab_size: found a number of very many digits"),
  (dict(head_dim=17), "head_dim: found 17, expected an even number"),
  (dict(rms_norm_eps=0), "rms_norm_eps: found 0, expected a finite number above 0"),
  (dict(rms_norm_eps=-1e-6), "rms_norm_eps: found -1e-06"),
  (dict(rms_norm_eps=math.nan), "rms_norm_eps: found nan"),
  (dict(eos_token_id="</s>"), "eos_token_id: found '</s>'"),
  (dict(eos_token_id=[1, True]), r"eos_token_id: found \[1, True\]"),
  (dict(tie_word_embeddings=1), "tie_word_embeddings: found 1, expected true or false"),
  (dict(attention_bias="yes"), "attention_bias: found 'yes', expected true or false"),
  (dict(rope_theta=5.0), "rope_parameters.rope_theta: found 500.0, expected 5.0, as rope_theta says"),
  (
    dict(rope_scaling=dict(type="linear", factor=2.0)),
    "rope_scaling: .*expected no such key beside rope_parameters",
  ),
]
# the same of rope_parameters
BAD_ROPE = [
  (
    dict(rope_type="banana"),
    "rope_type: found 'banana', expected one of default, linear, dynamic, yarn, longrope, llama3",
  ),
  (dict(rope_type="llama4"), r"nearest: llama3"),
  (dict(rope_type=3), "rope_type: found 3, expected a string"),
  (
    dict(rope_type="linear", type="dynamic", factor=2.0),
    "type: found 'dynamic', expected linear, as rope_type says",
  ),
  (dict(rope_theta=1), "rope_theta: found 1, expected a finite number above 1"),
  (dict(rope_theta=0), "rope_theta: found 0"),
  (dict(rope_theta=math.nan), "rope_theta: found nan"),
  (dict(rope_theta="10000"), "rope_theta: found '10000'"),
  (dict(rope_type="linear"), "factor: found nothing, expected a finite number above 0"),
  (dict(rope_type="linear", facto=2.0), "factor: found nothing, but a facto, expected"),
  (dict(rope_type="linear", factor=0), "factor: found 0"),
  (dict(rope_type="linear", factor=-1.0), "factor: found -1.0"),
  (dict(rope_type="linear", factor=math.inf), "factor: found inf"),
  (dict(rope_type="linear", factor=None), "factor: found null"),
  (dict(rope_type="linear", factor=2.0, beta_fast=3.0), r"unknown settings.*rope_parameters.beta_fast = 3.0"),
  (dict(rope_type="default", factor=2.0), "unknown settings.*rope_parameters.factor = 2.0"),
  (dict(rope_type="dynamic", factor=2.0, alpha=1000), "unknown settings.*rope_parameters.alpha = 1000"),
  (YARN | dict(beta_fast=1.0, beta_slow=2.0), "beta_fast: found 1.0, expected more than beta_slow = 2.0"),
  (YARN | dict(beta_slow=32), "beta_fast: found 32.0, expected more than beta_slow = 32"),
  (YARN | dict(beta_fast=-1), "beta_fast: found -1"),
  (YARN | dict(attention_factor=0), "attention_factor: found 0"),
  (YARN | dict(attention_factor=-0.5), "attention_factor: found -0.5"),
  (YARN | dict(mscale=-1.0, mscale_all_dim=1.0), "mscale: found -1.0"),
  (YARN | dict(truncate="no"), "truncate: found 'no', expected true or false"),
  (YARN | dict(original_max_position_embeddings=0), "original_max_position_embeddings: found 0"),
  (YARN | dict(original_max_position_embeddings=64.0), "original_max_position_embeddings: found 64.0"),
  (YARN | dict(mrope_section=[16, 24, 24]), "unknown settings.*mrope_section"),
  (
    LLAMA3 | dict(low_freq_factor=4.0),
    "high_freq_factor: found 4.0, expected more than low_freq_factor = 4.0",
  ),
  (LLAMA3 | dict(low_freq_factor=0), "low_freq_factor: found 0"),
  (LLAMA3 | dict(high_freq_factor=None), "high_freq_factor: found null"),
  (LLAMA3 | dict(hi_freq_factor=4.0), r"hi_freq_factor = 4.0 \(nearest: high_freq_factor\)"),
  (LISTS | dict(short_factor=[1.0] * 9), "short_factor: found .*expected a list of 10, one a pair"),
  (LISTS | dict(long_factor=[1.0] * 9 + [0.0]), "long_factor: found .*expected a list of 10, .*above 0"),
  (LISTS | dict(long_factor=[1.0] * 9 + [True]), "long_factor"),
  (LISTS | dict(long_factor=None), "long_factor: found null"),
  (LISTS | dict(original_max_position_embeddings=1), "original_max_position_embeddings: found 1"),
  (dict(partial_rotary_factor=0.5), "partial_rotary_factor: found 0.5, expected 1.0"),
  (dict(partial_rotary_factor=2.0), "partial_rotary_factor: found 2.0"),
  (dict(rope_type="proportional", partial_rotary_factor=0.01), "partial_rotary_factor: found 0.01"),
  (dict(rope_type="proportional", partial_rotary_factor=1.5), "partial_rotary_factor: found 1.5"),
  (dict(full_attention={}), "unknown settings.*rope_parameters.full_attention"),
  ([1], r"rope_parameters: found \[1\], expected an object"),
]
# of other families: row, settings, error
BAD_ELSEWHERE = [
  ("mistral", dict(layer_types=[FULL] * 3), "layer_types: found .*sliding_window"),
  ("mistral", dict(attention_bias=True), "attention_bias: found true, expected false"),
  ("mistral", dict(sliding_window=0), "sliding_window: found 0"),
  ("qwen2", dict(layer_types=[FULL] * 2), "layer_types: found .*expected a list of 3, one a layer"),
  (
    "qwen2",
    dict(layer_types=[FULL, SLIDING, "chunked_attention"]),
    "layer_types: .*one of full_attention, sliding_attention",
  ),
  ("qwen2", dict(use_sliding_window=False, layer_types=[FULL, FULL, SLIDING]), "sliding_window"),
  ("qwen2", dict(sliding_window=None, layer_types=[FULL, FULL, SLIDING]), "sliding_window: found null"),
  ("qwen3", dict(max_window_layers=-1), "max_window_layers: found -1"),
  ("gemma", dict(hidden_activation="silu"), "hidden_activation: found 'silu'.*hidden_act"),
  ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention: found true"),
  ("gemma2", dict(attn_logit_softcapping=0.0), "attn_logit_softcapping: found 0.0"),
  ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar: found 0"),
  (
    "gemma3_text",
    dict(attn_logit_softcapping=50.0),
    "attn_logit_softcapping: found 50.0, expected no such key",
  ),
  (
    "gemma3_text",
    dict(rope_parameters={"rope_type": "linear", "factor": 8.0}),
    "unknown settings.*rope_parameters.rope_type",
  ),
  (
    "gemma3_text",
    dict(rope_parameters={FULL: {"rope_type": "linear"}}),
    r"rope_parameters.full_attention.factor: found nothing",
  ),
  (
    "phi3",
    dict(original_max_position_embeddings=32, rope_parameters=LISTS),
    "original_max_position_embeddings: found 64, expected 32",
  ),
  (
    "phi3",
    dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
    "rope_type: found 'linear', expected one of default, longrope",
  ),
  ("phi3", dict(lm_head_bias=True), "lm_head_bias: found true"),
  ("granite", dict(logits_scaling=0), "logits_scaling: found 0"),
  ("granite", dict(attention_multiplier=-0.1), "attention_multiplier: found -0.1"),
  ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers: found .* 3"),
  ("smollm3", dict(no_rope_layers=[1, 0, 2]), "no_rope_layers"),
  ("smollm3", dict(no_rope_layer_interval=0), "no_rope_layer_interval: found 0"),
  (
    "smollm3",
    dict(use_sliding_window=False, layer_types=[FULL, SLIDING, FULL]),
    "use_sliding_window: found false",
  ),
  (
    "ministral3",
    dict(rope_parameters=YARN | {"llama_4_scaling_beta": -0.1}),
    "llama_4_scaling_beta: found -0.1",
  ),
  ("ministral3", dict(rope_parameters=YARN), "llama_4_scaling_beta: found nothing"),
  (
    "gpt_neox",
    dict(num_attention_heads=5),
    "num_attention_heads: found 5, expected a divisor of hidden_size = 72",
  ),
  ("gpt_neox", dict(head_dim=20), "head_dim: found 20, expected 24"),
  (
    "gpt_neox",
    dict(rope_parameters=dict(partial_rotary_factor=0.3)),
    "partial_rotary_factor: found 0.3.*turns 7",
  ),
  ("bloom", dict(n_inner=100), "n_inner: found 100, expected 288"),
  ("bloom", dict(n_head=6, num_attention_heads=3), "num_attention_heads: found 3, expected 6 as in n_head"),
  ("mpt", dict(expansion_ratio=3), "expansion_ratio: found 3, expected 4"),
  ("mpt", dict(no_bias=False), "no_bias: found false, expected true"),
  (
    "mpt",
    dict(logit_scale="inv_sqrt_d_model"),
    "logit_scale: found 'inv_sqrt_d_model', expected no such key",
  ),
  ("mpt", dict(attn_config=dict(alibi=False)), "attn_config.alibi: found false"),
  ("mpt", dict(attn_config=dict(alibi_bias_max=16)), "attn_config.alibi_bias_max: found 16"),
  ("mpt", dict(norm_type="rmsnorm"), "norm_type: found 'rmsnorm', expected .*layernorm"),
  ("mpt", dict(ffn_config=dict(ffn_type="mptglu")), "ffn_config: found .*mptglu.*, expected the plain"),
  (
    "mpt",
    dict(attn_config=dict(attn_uses_sequence_id=True)),
    "attn_config.attn_uses_sequence_id: found true",
  ),
  ("mpt", dict(attn_config=dict(qk_ln=True)), "attn_config.qk_ln: found true"),
  ("mpt", dict(attn_config=dict(clip_qkv=-1)), "attn_config.clip_qkv: found -1"),
  ("mpt", dict(attn_config=dict(clip_kqv=6)), r"attn_config.clip_kqv = 6 \(nearest: clip_qkv\)"),
  ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx: found true"),
  ("gpt2", dict(add_cross_attention=True), "add_cross_attention: found true"),
  ("gpt2", dict(n_positions=0), "n_positions: found 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(changes, message):
  with pytest.raises(ConfigError, match=rf"^config.json: .*{message}"):
    read_config(LLAMA | changes)


@pytest.mark.parametrize(("parameters", "message"), BAD_ROPE)
def test_bad_rope_settings(parameters, message):
  with pytest.raises(ConfigError, match=rf"^config.json: .*{message}"):
    read_config(LLAMA | dict(rope_parameters=parameters))


BAD_ELSEWHERE += family_rows_gpt.BAD


@pytest.mark.parametrize(("row", "changes", "message"), BAD_ELSEWHERE)
def test_bad_settings_of_other_families(row, changes, message):
  with pytest.raises(ConfigError, match=rf"^config.json: .*{message}"):
    read_config(settings(row) | changes)


def test_the_source_is_the_file():
  with pytest.raises(ConfigError, match=r"^/models/x/config.json: vocab_size"):
    read_config(LLAMA | dict(vocab_size=0), "/models/x/config.json")


def rope_of(changes, row="llama"):
  plain = {key: value for key, value in settings(row).items() if key != "rope_parameters"}
  return read_config(plain | changes)[1].layers[0].position


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_old_and_new_forms_are_one(type_key):
  numbers = {**LLAMA3, "rope_theta": 5e5}
  new = rope_of(dict(rope_parameters=numbers))
  del numbers["rope_theta"]
  old = rope_of(dict(rope_theta=5e5, rope_scaling={type_key: numbers.pop("rope_type"), **numbers}))
  assert old == new == Llama3Rope(5e5, factor=8.0, original_length=64)


def test_what_the_types_make_of_their_settings():
  assert rope_of({}) == Rope(original_length=256)
  assert rope_of(dict(rope_scaling=None, rope_theta=7)) == Rope(7, original_length=256)
  yarn = rope_of(dict(rope_scaling=YARN | dict(factor=None, finetuned=True, mscale=0)))
  assert yarn == YarnRope(factor=256 / 64, original_length=64)
  dynamic = rope_of(dict(rope_scaling=dict(type="dynamic", factor=2.0, original_max_position_embeddings=64)))
  assert dynamic.original_length == 256  # max_position_embeddings, whatever else is said
  longrope = rope_of(dict(rope_scaling=LISTS | dict(rope_type="su")))
  assert longrope == LongRope(
    original_length=64, factor=4.0, short_factor=(1.0,) * 10, long_factor=(2.0,) * 10
  )


def test_phi3_calls_longrope_by_three_names():
  for name in ("su", "yarn", "longrope"):
    rope = dict(type=name, short_factor=[1.0] * 9, long_factor=[2.0] * 9)
    assert type(rope_of(dict(rope_scaling=rope), "phi3")) is LongRope
  # as version 5 leaves it behind
  assert type(rope_of(dict(rope_parameters=rope | dict(type="su", rope_type="longrope")), "phi3")) is LongRope


def test_gemma3_old_and_new():
  plain = settings("gemma3_text")
  old = {key: value for key, value in plain.items() if key not in ("rope_parameters", "layer_types")}
  old |= dict(
    rope_theta=4000.0, rope_local_base_freq=500.0, rope_scaling=dict(rope_type="linear", factor=4.0)
  )
  assert read_config(old | dict(layer_types=plain["layer_types"])) == read_config(plain)
  by_pattern = read_config(old | dict(sliding_window_pattern=2, num_hidden_layers=4))[1]
  assert [layer.window for layer in by_pattern.layers] == [90, None]


def test_truncate_of_a_layer_type_is_not_read():
  """transformers looks for it where it is not."""
  groups = {FULL: YARN | dict(truncate=False, rope_theta=1e4), SLIDING: {}}
  cfg = read_config(settings("gemma3_text") | dict(rope_parameters=groups))[1]
  assert next(layer.position for layer in cfg.layers if layer.window is None).truncate
  assert not rope_of(dict(rope_scaling=YARN | dict(truncate=False))).truncate


def test_old_names_of_gpt_neox():
  plain = {key: value for key, value in settings("gpt_neox").items() if key != "rope_parameters"}
  old = read_config(plain | dict(rotary_pct=0.5, rotary_emb_base=500))[1]
  assert old.layers[0].position == Rope(500, rotary_dim=12, original_length=256)
  with pytest.raises(ConfigError, match="rope_theta: found 600, expected 500 as in rotary_emb_base"):
    read_config(plain | dict(rotary_emb_base=500, rope_theta=600))


def test_the_pattern_of_layers_is_the_shortest():
  cfg = read_config(
    settings("smollm3") | dict(num_hidden_layers=8, no_rope_layers=None, use_sliding_window=False)
  )[1]
  assert [type(layer.position) for layer in cfg.layers] == [Rope, Rope, Rope, NoPE]
  assert len(built("llama").cfg.layers) == 1


def test_end_ids():
  assert read_config(LLAMA | dict(eos_token_id=5))[1].eos_ids == (5,)
  assert read_config(LLAMA | dict(eos_token_id=[5, 9]))[1].eos_ids == (5, 9)
  assert read_config(LLAMA | dict(eos_token_id=None))[1].eos_ids == ()
  assert read_config({key: value for key, value in LLAMA.items() if key != "eos_token_id"})[1].eos_ids == (2,)
  assert (
    read_config(LLAMA | dict(eos_token_id=32000))[1].eos_ids == ()
  )  # beyond the vocabulary, so that it never comes


def test_what_is_ignored_is_said():
  plain = LLAMA | dict(attention_dropout=0.1, auto_map={"AutoModel": "x.Y"}, use_cache=False)
  assert ignored_settings(plain) == ["pad_token_id", "attention_dropout", "auto_map", "use_cache"]
