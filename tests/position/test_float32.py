"""The float32 angles of transformers: its frequencies bit for bit, cosines of large angles, and what tables of them do."""

import dataclasses
import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, position, tokens
from model_checks import full, relative_error

from jaxllm.position import POSITIONS, float32
from jaxllm.position.phase import cos_sin_of
from jaxllm.position.sleef import powf
from jaxllm.position.tables import Float32Table, RopeTable, make_table

pytestmark = pytest.mark.component("rope_precision")


def hf_table(method, rotary_dim, max_len=None, seq_len=None):
  frequencies = functools.partial(float32.frequencies, method)
  start, rows = method.rows(rotary_dim, max_len, seq_len, frequencies)
  return make_table(rows, start, precision="hf")


@pytest.mark.core
def test_frequencies_of_transformers_bit_for_bit(golden):
  for row in golden["float32"]["frequencies"]:
    method = POSITIONS[row["method"]](**row["kw"])
    found, scale = float32.frequencies(method, row["rotary_dim"], row["seq_len"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), row["bits"], err_msg=str(row["kw"]))
    assert scale == row["scale"]
    exact, _ = method.frequencies(row["rotary_dim"], row["seq_len"])
    np.testing.assert_allclose(found, exact, rtol=3e-6)
  components.measured("rope_precision", "transformers' inv_freq, bits", 0)


def test_frequencies_that_are_only_rounded_are_others(golden):
  """The negative control: in every row but a few some bits differ from the float64 frequencies, rounded once."""
  differ = [
    np.any(
      POSITIONS[row["method"]](**row["kw"])
      .frequencies(row["rotary_dim"], row["seq_len"])[0]
      .astype(np.float32)
      .view(np.int32)
      != row["bits"]
    )
    for row in golden["float32"]["frequencies"]
  ]
  assert np.mean(differ) > 0.8


def test_a_power_is_within_a_unit_of_the_truth_and_not_always_the_nearest():
  rng = np.random.default_rng(0)
  nearest = []
  for base in (1.5, 100.0, 1e4, 15e4, 1e6, 3.7e8):
    exponent = rng.uniform(0, 1, 1600).astype(np.float32)
    truth = np.float64(np.float32(base)) ** exponent.astype(np.float64)
    found = powf(base, exponent)
    np.testing.assert_allclose(found, truth, rtol=2.0**-23)
    nearest += [found == truth.astype(np.float32)]
  assert 0.97 < np.mean(nearest) < 0.995
  np.testing.assert_array_equal(powf(7.0, np.zeros(40, np.float32)), 1)


def test_live_torch_has_the_same_powers_and_frequencies():
  torch = pytest.importorskip("torch")
  if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
    pytest.skip("torch without vectors computes each power by the C library")
  exponent = np.random.default_rng(1).uniform(0, 1, 4096).astype(np.float32)
  for base in (1.5, 1e4, 15e4, 123456.789):
    np.testing.assert_array_equal(powf(base, exponent), base ** torch.tensor(exponent))


ANGLES = [0.0, 1e-42, 1e-20, 0.5, np.pi / 4, 3.0, 1e3, 131_072.0, 1e6, 2.0**24 - 1, 2.0**31, 1e12, 3e38]


def test_cosines_of_any_float32_angle():
  """float64's cosine of the same number; a plain reduction in float32 is off by 1 at 1e6."""
  many = np.random.default_rng(2).uniform(0, 2**31, 4096) ** np.linspace(0.1, 1, 4096)
  angle = np.concatenate([ANGLES, many]).astype(np.float32)
  wide = angle.astype(np.float64)
  for found, expected in zip(jax.jit(cos_sin_of)(angle), (np.cos(wide), np.sin(wide)), strict=True):
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= 1e-7
  reduced = angle - np.float32(2 * np.pi) * np.floor(angle / np.float32(2 * np.pi))
  assert np.abs(np.cos(reduced.astype(np.float64)) - np.cos(wide))[wide > 1e6].max() > 0.1


@pytest.mark.parametrize("length", [1000, pytest.param(1_000_000, marks=pytest.mark.core)])
def test_cos_and_sin_of_transformers(length):
  """YaRN, whose scale is on both; the exact ones are apart by what float32 loses."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from transformers import LlamaConfig
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
  config = LlamaConfig(
    hidden_size=256, num_attention_heads=2, max_position_embeddings=2**20, rope_parameters=rope
  )
  pos = np.arange(length - 64, length, dtype=np.int32)
  theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(pos)[None])
  method = POSITIONS["yarn"](base=1e6, factor=4.0, original_length=32768)
  found, exact = (
    make(method, 128).cos_sin(jnp.asarray(pos))
    for make in (hf_table, lambda m, R: make_table([m.frequencies(R)]))
  )
  apart = lambda ours: max(
    np.abs(np.asarray(x)[None] - y[..., :64].numpy()).max() for x, y in zip(ours, theirs, strict=True)
  )
  assert apart(found) <= 2e-7
  assert apart(exact) > (1e-2 if length == 1_000_000 else 1e-5)
  components.measured("rope_precision", "transformers' cos and sin", apart(found))


def test_far_positions_move_the_logits():
  """What one unit of float32 angles does a million positions on, and not at the start."""
  for offset, least, most in ((0, 0, 1e-5), (1_000_000, 1e-2, 1)):
    moved = relative_error(full(MODELS["rope, hf"], tokens(), offset), full(MODELS["rope"], tokens(), offset))
    assert least <= moved <= most, (offset, moved)


@pytest.mark.parametrize(("precision", "kind"), [("exact", RopeTable), ("hf", Float32Table)])
def test_tables_of_fixed_frequencies_have_one_structure(precision, kind):
  """Exact tables the one they had, and float32 ones another: a compiled program each, whatever the method."""
  cfg = dataclasses.replace(MODELS["rope"], layers=MODELS["rope"].layers[:1], rope_precision=precision)
  fields = dict(pi=dict(factor=2.0), ntk=dict(factor=2.0), yarn=dict(factor=2.0), llama3=dict(factor=2.0))
  tables = [cfg.rope_tables(), *(cfg.with_position(name, **kw).rope_tables() for name, kw in fields.items())]
  assert len({jax.tree.structure(table) for table in tables}) == 1
  assert all(type(table.ropes[0]) is kind for table in tables)


@pytest.mark.parametrize("name", ["dynamic_ntk", "longrope"])
def test_rows_of_lengths(name):
  """Each query turns itself and its keys by the frequencies of its own length: those of a table of that length alone."""
  method, T = position(name), 14
  rng = np.random.default_rng(3)
  q, k = (rng.standard_normal((1, T, heads, 16)).astype(np.float32) for heads in (4, 2))
  pos = np.arange(T, dtype=np.int32)[None]
  run = jax.jit(lambda q, k, q_pos, table: method.scores(q, k, q_pos, pos, table, {}))
  found = run(q, k, pos, hf_table(method, 16, max_len=T))
  for i in (0, 7, 8, 13):
    alone = run(q[:, i : i + 1], k, pos[:, i : i + 1], hf_table(method, 16, seq_len=i + 1))
    np.testing.assert_allclose(found[..., i : i + 1, :], alone, rtol=0, atol=3e-6)


def test_a_method_that_transformers_does_not_have_is_rounded_once():
  method = POSITIONS["ntk_fixed"](factor=3.0)
  found, scale = float32.frequencies(method, 64)
  np.testing.assert_array_equal(found, method.frequencies(64)[0].astype(np.float32))
  assert found.dtype == np.float32 and scale == 1.0
  rerope = float32.frequencies(POSITIONS["rerope"](window=8), 64)[0]
  np.testing.assert_array_equal(rerope, float32.frequencies(POSITIONS["rope"](), 64)[0])
