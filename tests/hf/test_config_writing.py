"""A ModelConfig as a config.json: position methods as transformers has them, what it has not refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from family_cases import THEIRS, built, settings

from jaxllm.activation import Glu, Mlp, Xielu
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf.families import FAMILIES, as_transformers, differences, read_config, write_config
from jaxllm.hf.rope import part_of
from jaxllm.norm import L2Norm, LayerNorm, QkNorm, RMSNorm
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position import POSITIONS, LogN, Rope
from jaxllm.position.scalings import LongRope
from jaxllm.wiring import Parallel, Post

SIZES = dict(vocab_size=61, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=80)
CFG = ModelConfig(**SIZES, layers=(Layer(Rope(5000.0, original_length=32)),), norm=RMSNorm(1e-5))
FACTORS = dict(short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), long_factor=tuple(range(1, 9)))
FIELDS = dict(factor=4.0, proportion=0.5, **FACTORS)
FIXED = (
  "rope",
  "pi",
  "ntk_old",
  "ntk",
  "ntk_fixed",
  "ntk_mixed",
  "ntk_by_parts",
  "yarn",
  "llama3",
  "proportional",
)
BY_LENGTH = ("dynamic_ntk", "longrope")
NEVER = (
  "t5",
  "sinusoidal",
  "xpos",
  "rerope",
  "leaky_rerope",
  "inv_leaky_rerope",
  "self_extend",
  "streaming",
  "rope_2d",
)
ELSEWHERE = {"alibi": ("bloom", "mpt"), "learned": ("gpt2",), "nope": ("smollm3",)}


def with_position(name, **fields):
  known = {field.name for field in dataclasses.fields(POSITIONS[name])}
  return CFG.with_position(name, **{key: value for key, value in (FIELDS | fields).items() if key in known})


def test_every_method_is_in_one_of_the_lists():
  assert {*FIXED, *BY_LENGTH, *NEVER, *ELSEWHERE} == POSITIONS.keys()


@pytest.mark.parametrize("name", FIXED)
def test_fixed_frequencies_are_written(name):
  """And are the same to a few units in the last place of a float64 when read back."""
  cfg = with_position(name)
  family, plain = write_config(cfg)
  assert family.model_type == "llama"
  found = read_config(json.loads(json.dumps(plain)))[1]
  want, have = cfg.ropes[0].frequencies(16), found.ropes[0].frequencies(16, 10**6)
  np.testing.assert_allclose(have[0], want[0], rtol=1e-14)
  assert have[1] == want[1]
  exported = name.startswith("ntk")
  assert isinstance(found.ropes[0], LongRope if exported else type(cfg.ropes[0]))


@pytest.mark.parametrize("name", [*FIXED, *BY_LENGTH])
def test_transformers_computes_these_frequencies(name):
  """From our config.json; to a few units in the last place of a float32."""
  theirs = pytest.importorskip("theirs")
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  cfg = with_position(name)
  plain = write_config(cfg, "llama", pinned=True)[1]
  for length in (32, 33, 200):
    rotary = LlamaRotaryEmbedding(theirs.config(plain))
    rotary(theirs.torch.zeros(1), theirs.torch.arange(length)[None])
    want, scale = cfg.ropes[0].frequencies(16, length)
    np.testing.assert_allclose(rotary.inv_freq.numpy(), want, rtol=2e-6)
    assert rotary.attention_scaling == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_frequencies_by_length_only_where_pinned(name):
  with pytest.raises(
    ConfigError, match=rf"^{name}: found frequencies by the length of each query.*pinned=True"
  ):
    write_config(with_position(name))
  cfg = with_position(name)
  assert differences(cfg, read_config(write_config(cfg, pinned=True)[1])[1]) == []
  one_list = with_position("longrope", long_factor=FACTORS["short_factor"])
  assert write_config(one_list)[0].model_type == "llama"


@pytest.mark.parametrize("name", NEVER)
def test_what_is_no_set_of_frequencies_is_refused_by_name(name):
  cfg = (
    with_position(name) if name != "rope_2d" else dataclasses.replace(CFG, layers=(Layer(POSITIONS[name]()),))
  )
  with pytest.raises(ConfigError, match=rf"^{name}: transformers has no such position method"):
    write_config(cfg, pinned=True)


def test_log_n_is_refused():
  with pytest.raises(ConfigError, match=r"^query_scale: found LogN"):
    write_config(dataclasses.replace(CFG, query_scale=LogN(32)))


def test_a_llama_of_interleaved_pairs_is_a_glm():
  cfg = with_position("yarn", layout="interleaved")
  assert write_config(cfg)[0].model_type == "glm"
  with pytest.raises(ConfigError, match=r"layout: found 'interleaved', expected 'half'"):
    write_config(cfg, "llama")


def test_frequencies_of_zero_have_no_factor():
  with pytest.raises(ConfigError, match=r"^proportional: found frequencies of 0"):
    write_config(with_position("proportional", rotary_dim=12))


# what no family has, or the one that is asked for has not
REFUSED = [
  (dict(wiring=Post()), None, "wiring would be Pre"),
  (dict(wiring=Parallel()), None, "wiring would be"),
  (dict(attention_sinks=True), None, "attention_sinks would be False instead of True"),
  (dict(norm=L2Norm(), qk_norm=QkNorm(LayerNorm(), "each")), None, "would be"),
  (dict(mlp=Xielu()), None, "the nearest, apertus: qk_norm would be"),
  (dict(mlp=Xielu()), "llama", "mlp: found Xielu"),
  (dict(mlp=Xielu(beta=0.4), qk_norm=QkNorm()), "apertus", "mlp would be Xielu"),
  (dict(mlp=Glu("swish", 2.0)), None, "mlp: found Glu"),
  (dict(biases=("head",)), None, "biases would be"),
  (dict(biases=("q",)), "qwen2", r"biases would be \('k', 'q', 'v'\)"),
  (dict(clip_qkv=3.0), None, "clip_qkv would be None instead of 3.0"),
  (dict(embed_scale=2.0), "llama", "embed_scale would be 1.0 instead of 2.0"),
  (dict(qk_norm=QkNorm()), "llama", "qk_norm would be None"),
  (dict(mlp=Mlp("gelu")), "llama", "mlp would be Glu"),
  (dict(), "gpt2", "layers: found Rope, expected Learned"),
  (dict(), "bloom", "layers would be"),
  (dict(), "phi4", "family: found 'phi4', expected one of .* nearest: phi"),
  (dict(layers=(Layer(Rope(), 5),)), "llama", "layers would be"),
  (dict(layers=(Layer(Rope(), 5), Layer(Rope(), 6))), None, "layers would be"),
  (dict(layers=(Layer(Rope(), 5), Layer(Rope()))), "mistral", "layers would be"),
  (dict(attention_scale=0.3), "gemma2", "attention_scale would be 0.30"),
]


@pytest.mark.parametrize(("changes", "family", "message"), REFUSED)
def test_what_no_family_says_is_refused(changes, family, message):
  with pytest.raises(ConfigError, match=message):
    write_config(dataclasses.replace(CFG, **changes), family)


# what is no other model: its logits are the same but for rounding
SAME = [
  dict(attention=Blockwise()),
  dict(norm=RMSNorm(1e-5, multiply_in="input")),
  dict(embed_gradient=0.1),
  dict(layer_scaling=True),
  dict(rope_precision="hf"),
  dict(attention_scale=16**-0.5),
  dict(layers=(Layer(Rope(5000.0)),) * 2),
  dict(layers=(Layer(Rope(5000.0, rotary_dim=16)),)),
  dict(context_length=4096),
]


@pytest.mark.parametrize("changes", SAME)
def test_what_changes_no_logit_is_written(changes):
  family, plain = write_config(dataclasses.replace(CFG, **changes))
  assert family.model_type == "llama"
  assert differences(CFG, read_config(plain)[1]) == []


@pytest.mark.parametrize(
  ("changes", "family"),
  [
    (dict(biases=("q", "k", "v")), "qwen2"),
    (dict(qk_norm=QkNorm(RMSNorm(1e-5))), "qwen3"),
    (dict(layers=(Layer(Rope(), 5),)), "mistral"),
    (dict(layers=(Layer(Rope()), Layer(Rope(), 5))), "qwen2"),
    (dict(layers=(Layer(Rope()), Layer(POSITIONS["nope"]()))), "smollm3"),
    (dict(layers=(Layer(Rope(rotary_dim=8)),)), "phi3"),
    (dict(embed_scale=2.0), "granite"),
    (dict(logit_scale=0.3), "granite"),
    (dict(layers=(Layer(Rope(layout="interleaved", rotary_dim=8)),)), "glm"),
    (dict(norm=LayerNorm(scale=None, bias=False), clip_qkv=3.0), "olmo"),
    (dict(mlp=Mlp("relu2"), biases=("up", "down")), "arcee"),
    (
      dict(layers=(Layer(POSITIONS["ntk"](factor=8.0)),), qk_norm=QkNorm(RMSNorm(1e-5), place="after")),
      "hunyuan_v1_dense",
    ),
    (dict(mlp=Xielu(2.0, 1.5), qk_norm=QkNorm(RMSNorm(1e-5))), "apertus"),
  ],
)
def test_the_family_that_has_it(changes, family):
  cfg = dataclasses.replace(CFG, **changes)
  if family in ("qwen2", "smollm3") and "layers" in changes:
    cfg = dataclasses.replace(cfg, biases=("q", "k", "v") if family == "qwen2" else ())
  found, plain = write_config(cfg)
  assert found.model_type == family
  assert differences(cfg, read_config(plain)[1]) == []


def test_reciprocals_come_back():
  """A logit_scale that is no reciprocal is written to the last bit but one."""
  for scale in np.random.default_rng(0).uniform(0.01, 10, 100):
    cfg = dataclasses.replace(CFG, logit_scale=float(scale))
    found = read_config(write_config(cfg, "granite")[1])[1]
    assert found.logit_scale == pytest.approx(scale, rel=3e-16)
    assert read_config(write_config(found, "granite")[1])[1] == found


def test_shares_of_a_head_come_back():
  for head_dim in range(2, 260, 2):
    for rotary_dim in range(2, head_dim + 1, 2):
      assert int(head_dim * part_of(rotary_dim, head_dim)) == rotary_dim


def test_what_is_written_says_all_that_transformers_would_guess():
  """Ids beyond a small vocabulary, another family's number of heads: no default is left to the class."""
  theirs = pytest.importorskip("theirs")
  for row in THEIRS:
    _, plain = write_config(built(row).cfg, row.split(",")[0], pinned=True)
    config = theirs.config(plain)
    assert config.pad_token_id is None and config.bos_token_id is None
    assert read_config(theirs.written(config))[1] == built(row).cfg


def test_as_transformers_keeps_what_it_has():
  for row in THEIRS:
    cfg = built(row).cfg
    assert as_transformers(cfg, pinned=True, own=FAMILIES[row.split(",")[0]].ropes) == cfg


def test_a_sweep_trained_model_is_a_llama():
  """Its head tied, its norm multiplied in float32."""
  cfg = dataclasses.replace(CFG, tie_embeddings=True, norm=RMSNorm())
  family, plain = write_config(cfg)
  assert family is FAMILIES["llama"] and plain["tie_word_embeddings"] and plain["rope_theta"] == 5000.0
  assert plain["max_position_embeddings"] == 32
  assert settings("llama")["model_type"] == plain["model_type"]
