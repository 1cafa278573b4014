"""Families that transformers does not have, beside their authors' formulas: reading, logits, decoding, gradients, files."""

import dataclasses
import functools
import json
import math

import definitions
import family_table
import jax
import numpy as np
import oracle
import pytest
from checkpoint_case import assert_equal_trees
from family_cases import REMOTE, T, built, call_of, family_of, from_tensors, settings, tokens, write
from family_checks import by_name, logits, program, tables, truth
from family_rows_glm import START
from model_checks import relative_error
from published_glm import PARAMETERS, PUBLISHED
from safetensors.numpy import load_file

from jaxllm import hf
from jaxllm.activation import Glu, Mlp
from jaxllm.errors import ConfigError
from jaxllm.hf.families import FAMILIES, ignored_settings, read_config, write_config
from jaxllm.nn import Context, Transformer, init_cache
from jaxllm.nn.shapes import expected_shapes

LENGTH = 96
BY_DEFAULT = ("baichuan, 13B form, normed head", "chatglm-6b")


def each_row(by_default=BY_DEFAULT, rows=REMOTE):
  """A parametrize mark over rows; those that are not `by_default` wait for the full counts."""
  slow = lambda row: row if row in by_default else pytest.param(row, marks=pytest.mark.slow)
  return pytest.mark.parametrize("row", list(map(slow, rows)))


@functools.cache
def base(row, length=LENGTH):
  """The authors' logits of a row."""
  return defined(row, length)


def defined(row, length=LENGTH, **changes):
  """The authors' logits of a row with some settings changed; None leaves a setting out."""
  return definitions.logits(
    changed(row, changes), built(row).tensors, tokens()[:, :length], **call_of(row, length)
  )


def changed(row, changes):
  return {name: value for name, value in (settings(row) | changes).items() if value is not None}


@each_row(REMOTE)
def test_what_is_read_is_what_the_authors_compute(row):
  """In float64, so that settings and layouts are all that could differ."""
  assert relative_error(truth(row, tokens()[:, :LENGTH]), base(row)) <= 1e-12


@pytest.mark.parametrize(("row", "mlp"), [("chatglm-6b", Mlp("gelu")), ("glm-130b", Glu("gelu_tanh"))])
def test_the_form_of_gelu_shows(row, mlp):
  """By 1e5 times what the two float64 forms differ by; beside residuals of sqrt(2 L) it is little in float32."""
  cfg = dataclasses.replace(built(row).cfg, mlp=mlp)
  assert relative_error(truth(row, tokens()[:, :LENGTH], cfg), base(row)) > 1e-7


@each_row(())
def test_live_logits(row, tmp_path):
  cfg, params = hf.load(write(tmp_path, row))
  assert cfg == built(row).cfg
  found, expected = logits(row, tokens(), params), defined(row, T)
  error = relative_error(found, expected)
  assert error <= 5e-6
  np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
  family_table.measured(row, "logits", error)


@each_row(("chatglm-6b",), [row for row in REMOTE if call_of(row, T)])
def test_decoding_goes_on_with_the_positions_of_a_prompt(row):
  """The context in one call, as it is seen in both directions, and then a token a call."""
  model, length = built(row), START + 6
  ids, call = tokens()[:, :length], call_of(row, length)
  run = jax.jit(lambda params, ids, context, cache: Transformer(model.cfg).apply(params, ids, context, cache))
  cache, found = init_cache(model.cfg, 1, length), []
  for start, stop in [(0, START), *((t, t + 1) for t in range(START, length))]:
    given = Context(pos=call["pos"][None, start:stop])
    if start == 0:
      given = Context(pos=given.pos, prefix=np.array([START], np.int32))
    out, cache = run({"params": model.params}, ids[:, start:stop], given, cache)
    found.append(out)
  error = relative_error(np.concatenate(found, axis=1), defined(row, length))
  assert error <= 1e-5
  family_table.measured(row, "decoding", error)


@each_row(())
def test_gradients(row):
  """Along a random direction of each tensor, against a difference of the authors' loss in float64."""
  model, ids, step = built(row), tokens(1, (1, START // 2 + 1)), 1e-5

  def loss(tensors):
    out = definitions.logits(settings(row), tensors, ids[:, :-1])[0]
    out = out - out.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(out).sum(-1)) - out[np.arange(START // 2), ids[0, 1:]])

  found_loss, grads = program("gradient", model.cfg)(model.params, ids, tables(model.cfg, row, START // 2))
  np.testing.assert_allclose(found_loss, loss(model.tensors), rtol=1e-5)
  grads, rng, errors = by_name(row, grads), np.random.default_rng(0), []
  largest = max(np.linalg.norm(grad) for grad in grads.values())
  for name, grad in grads.items():
    way = np.where(rng.standard_normal(grad.shape) > 0, step, -step)
    there, back = (loss(model.tensors | {name: model.tensors[name] + sign * way}) for sign in (1, -1))
    slope = np.vdot(np.asarray(grad, np.float64), way)
    # a bias of keys has the gradient 0 but for rounding
    errors.append(abs((there - back) / 2 - slope) / step / max(np.linalg.norm(grad), 1e-2 * largest))
  assert max(errors) <= 1e-4
  family_table.measured(row, "gradients", max(errors))


@pytest.mark.parametrize("row", [row for row in REMOTE if call_of(row, T)])
def test_positions_and_prefix_of_a_prompt_matter(row):
  plain, call = settings(row), call_of(row, LENGTH)
  for left_out in call:
    given = {name: value for name, value in call.items() if name != left_out}
    other = definitions.logits(plain, built(row).tensors, tokens()[:, :LENGTH], **given)
    assert relative_error(other, base(row)) > 1e-2


@each_row((*BY_DEFAULT, "chatglm", "glm-130b"))
def test_saved_where_it_is_named(row, tmp_path):
  """The same tensors bit for bit under the same names, and the same settings when read again."""
  (tmp_path / "a").mkdir()
  cfg, params = hf.load(write(tmp_path / "a", row))
  hf.save(tmp_path / "b", cfg, params, family=family_of(row))
  found = load_file(tmp_path / "b" / "model.safetensors")
  assert found.keys() == built(row).tensors.keys()
  for name, tensor in built(row).tensors.items():
    np.testing.assert_array_equal(found[name], tensor)
  again, reloaded = hf.load(tmp_path / "b")
  assert again == cfg
  assert_equal_trees(reloaded, built(row).params)


@pytest.mark.parametrize("row", REMOTE)
def test_not_written_where_it_is_not_named(row):
  """Without a name a family of transformers' is taken, or none, and the error says which name would do."""
  cfg = built(row).cfg
  try:
    assert not write_config(cfg, pinned=True)[0].remote
  except ConfigError as error:
    assert f"family={family_of(row)!r}" in str(error) and "its authors' code only" in str(error)
  named, plain = write_config(cfg, family_of(row))
  assert named.remote and plain["model_type"] == named.model_type
  assert read_config(json.loads(json.dumps(plain)))[1] == cfg


def test_what_transformers_has_is_not_written_with_another_familys_name():
  """A 7B Baichuan is a Llama with fused matrices, and is written as one."""
  assert write_config(built("baichuan").cfg)[0].name == "llama"
  cfg = dataclasses.replace(built("baichuan").cfg, norm_head=True)
  with pytest.raises(
    ConfigError, match=r"norm_head would be False instead of True.*by name, family='baichuan'"
  ):
    write_config(cfg)
  with pytest.raises(ConfigError, match=r"^the family llama has no model .*norm_head would be False"):
    write_config(cfg, "llama")


# row, changes: each setting that is not a size
CHANGES = [
  ("baichuan", dict(hidden_act="relu")),
  ("baichuan", dict(rms_norm_eps=0.1)),
  ("baichuan", dict(max_position_embeddings=None, model_max_length=640)),
  ("baichuan", dict(norm_head=None, z_loss_weight=0)),
  ("baichuan, 13B form, normed head", dict(z_loss_weight=None, norm_head=False)),
  ("chatglm", dict(layernorm_epsilon=0.1)),
  ("chatglm", dict(rope_ratio=1.0)),
  ("chatglm", dict(original_rope=False)),
  ("chatglm", dict(apply_residual_connection_post_layernorm=True)),
  ("chatglm, positions divided", dict(rope_ratio=2.0)),
  ("chatglm, positions divided", dict(_name_or_path="THUDM/chatglm3-6b")),
  ("chatglm-6b", dict(layernorm_epsilon=0.1)),
  ("chatglm-6b, one position", dict(layernorm_epsilon=0.1)),
  ("glm-130b", dict(layernorm_epsilon=0.1)),
]
APART = {
  *("model_type", "architectures", "torch_dtype", "eos_token_id", "tie_word_embeddings", "vocab_size"),
  *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "padded_vocab_size"),
  *("ffn_hidden_size", "inner_hidden_size", "num_layers", "kv_channels", "seq_length", "max_sequence_length"),
  *("model_max_length", "rmsnorm", "post_layer_norm", "add_bias_linear", "add_qkv_bias"),
  *("multi_query_attention", "multi_query_group_num", "position_encoding_2d"),
}
"""Sizes, lengths that compute nothing, and what decides which tensors there are: rows differ in them."""


@pytest.mark.parametrize(("row", "changes"), CHANGES)
def test_every_setting_moves_the_logits_as_theirs(row, changes):
  plain, ids = changed(row, changes), tokens()[:, :LENGTH]
  family, cfg = read_config(plain)
  call = call_of(row, LENGTH)
  params = from_tensors(family, cfg, built(row).tensors)
  found = oracle.logits(cfg, params, ids, call.get("pos"), prefix=call.get("prefix", 0))
  expected = defined(row, **changes)
  assert relative_error(found, expected) <= 1e-12
  assert relative_error(expected, base(row)) > 1e-3


@pytest.mark.parametrize("row", REMOTE)
def test_no_setting_is_left_out(row):
  plain = write_config(built(row).cfg, family_of(row))[1]
  tried = {name for one, changes in CHANGES if family_of(one) == family_of(row) for name in changes}
  assert plain.keys() - APART - set(ignored_settings(plain)) <= tried


SHARED = dict(padded_vocab_size=65024, rope_ratio=50)
BAD = [
  ("baichuan", dict(num_key_value_heads=2), "num_key_value_heads: found 2, expected no such key"),
  ("baichuan", dict(rope_theta=5e5), "rope_theta: found 500000.0, expected 10000"),
  (
    "baichuan",
    dict(rope_scaling=dict(type="linear", factor=2.0)),
    "rope_scaling: found .*expected no such key",
  ),
  (
    "baichuan",
    dict(max_position_embeddings=None),
    "max_position_embeddings: found nothing.*model_max_length",
  ),
  (
    "baichuan",
    dict(norm_head=None),
    "norm_head: found nothing, expected true for a Baichuan 2.* 199 tells neither",
  ),
  (
    "baichuan",
    dict(norm_head=True, vocab_size=64000),
    "norm_head: found true, expected false, as vocab_size says",
  ),
  (
    "baichuan",
    dict(norm_head=False, z_loss_weight=0),
    "norm_head: found false, expected true, as z_loss_weight",
  ),
  (
    "baichuan, 13B form, normed head",
    dict(architectures=["BaiChuanForCausalLM"]),
    "max_position_embeddings: found nothing, expected an integer.*BaiChuanForCausalLM",
  ),
  ("chatglm", dict(post_layer_norm=False), "post_layer_norm: found false, expected true"),
  ("chatglm", dict(tie_word_embeddings=True), "tie_word_embeddings: found true, expected false"),
  ("chatglm", dict(quantization_bit=4), "quantization_bit: found 4, expected 0 .quantized"),
  ("chatglm", dict(pre_seq_len=128), "pre_seq_len: found 128, expected no such key"),
  ("chatglm", dict(multi_query_group_num=4), "multi_query_group_num: found 4, expected a divisor"),
  ("chatglm", dict(multi_query_group_num=6), "multi_query_group_num: found 6, expected .* and less"),
  ("chatglm", dict(kv_channels=18), "kv_channels: found 18, expected a multiple of 4"),
  ("chatglm", dict(rope_ratio=1e-5), "rope_ratio: found 1e-05, expected a number above 0.0001"),
  ("chatglm", dict(vocab_size=200), "vocab_size: found 200, expected 199 as in padded_vocab_size"),
  ("chatglm", SHARED, "_name_or_path: found nothing, expected one with chatglm2, .* rope_ratio is 50"),
  ("chatglm", SHARED | dict(_name_or_path="/models/x"), "_name_or_path: found '/models/x'"),
  (
    "chatglm",
    SHARED | dict(_name_or_path="chatglm2-to-chatglm3"),
    "_name_or_path: found 'chatglm2-to-chatglm3'",
  ),
  (
    "chatglm",
    SHARED | dict(_name_or_path="/chatglm2/x/"),
    "_name_or_path: found '/chatglm2/x/', expected one with",
  ),
  (
    "chatglm-6b",
    dict(num_attention_heads=5),
    "num_attention_heads: found 5, expected a divisor of hidden_size = 72",
  ),
  ("chatglm-6b", dict(num_attention_heads=12), "num_attention_heads: found 12, expected .* multiples of 4"),
  ("chatglm-6b", dict(quantization_bit=8), "quantization_bit: found 8"),
  ("chatglm-6b", dict(position_encoding_2d=1), "position_encoding_2d: found 1, expected true or false"),
  ("chatglm-6b", dict(multi_query_attention=True), "unknown settings.*multi_query_attention"),
  ("glm-130b", dict(tie_word_embeddings=False), "tie_word_embeddings: found false, expected true"),
  ("glm-130b", dict(position_encoding_2d=True), "unknown settings.*position_encoding_2d"),
]


@pytest.mark.parametrize(("row", "changes", "message"), BAD)
def test_bad_settings(row, changes, message):
  with pytest.raises(ConfigError, match=rf"^config.json: .*{message}"):
    read_config(changed(row, changes))


@pytest.mark.parametrize("base", [5e5, 1e6, 12345.678, 30000.1, 7.3e7])
def test_a_base_is_written_to_the_last_bit(base):
  plain = settings("chatglm") | dict(rope_ratio=base / 1e4)
  cfg = read_config(plain)[1]
  assert read_config(write_config(cfg, "chatglm")[1])[1] == cfg


def parameters(name):
  shapes = expected_shapes(read_config(PUBLISHED[name][0])[1])
  return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_published_models(name):
  assert parameters(name) == PARAMETERS[name]


def test_parameters_of_glm_130b():
  """L (4 D^2 + 4 D + 3 D F + 2 F + D + 4 D) + V D + 2 D: 128.70 billion, and the initial scales of 70 layers."""
  L, D, F, V = 70, 12288, 32768, 150528
  count = L * (4 * D**2 + 4 * D + 3 * D * F + 2 * F + D + 4 * D) + V * D + 2 * D
  assert parameters("GLM 130B") == count == pytest.approx(128.70e9, rel=1e-4)
  wiring = read_config(PUBLISHED["GLM 130B"][0])[1].wiring
  assert (wiring.alpha, wiring.beta) == pytest.approx((11.8322, 0.0845), rel=1e-3)


def test_names_and_types_of_one_model_type():
  """Two families are called chatglm in config.json; what sets the first apart are its settings."""
  assert {name: FAMILIES[name].model_type for name in ("chatglm", "chatglm-6b")} == dict.fromkeys(
    ("chatglm", "chatglm-6b"), "chatglm"
  )
  assert read_config(settings("chatglm"))[0].name == "chatglm"
  assert read_config(settings("chatglm-6b"))[0].name == "chatglm-6b"
  with pytest.raises(
    ConfigError, match=r"model_type: found 'chatglm-6b', expected one of .*chatglm, .*glm-130b"
  ):
    read_config(settings("chatglm-6b") | dict(model_type="chatglm-6b"))
