"""Live parity with the installed transformers: other fields than the golden rows, and the rotation itself."""

import components
import numpy as np
import pytest

from jaxllm.position import POSITIONS, alibi_slopes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

HEADS, HEAD_DIM, LENGTH = 2, 32, 96

LISTS = dict(short_factor=[1.0, 1.25] * 8, long_factor=[1.0 + i for i in range(16)])
# (method, rope_type, fields they share, trained length); every row's rotation is compared on LENGTH positions
CASES = [
  ("rope", "default", dict(), 32),
  ("rope", "default", dict(base=500000.0), 32),
  ("pi", "linear", dict(factor=3.0), 32),
  ("dynamic_ntk", "dynamic", dict(factor=2.0), 32),
  ("dynamic_ntk", "dynamic", dict(factor=2.0), LENGTH),
  ("yarn", "yarn", dict(factor=6.0), 32),
  ("yarn", "yarn", dict(factor=6.0, attention_factor=0.75, beta_fast=8.0, beta_slow=0.5), 64),
  ("yarn", "yarn", dict(factor=6.0, mscale=1.2, mscale_all_dim=0.6, truncate=False), 64),
  ("llama3", "llama3", dict(factor=6.0, low_freq_factor=0.5, high_freq_factor=3.0), 32),
  ("longrope", "longrope", dict(factor=6.0, **LISTS), 32),
  ("longrope", "longrope", dict(factor=6.0, **LISTS), LENGTH),
  ("longrope", "longrope", dict(attention_factor=1.5, factor=6.0, **LISTS), LENGTH - 1),
]
TAKE_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")


@pytest.mark.parametrize(
  "name, rope_type, fields, trained",
  [pytest.param(*c, id=f"{c[0]}-{i}", marks=[pytest.mark.core] * (i == 5)) for i, c in enumerate(CASES)],
)
def test_rotated_queries_and_keys_of_llama(name, rope_type, fields, trained, table_of):
  """A full forward of LENGTH tokens: `dynamic` takes the one base of that length."""
  from transformers import LlamaConfig
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

  fields = dict(base=10000.0) | fields
  rope = {"rope_type": rope_type, "rope_theta": fields["base"]} | {
    k: v for k, v in fields.items() if k != "base"
  }
  if rope_type in TAKE_ORIGINAL_LENGTH:
    rope["original_max_position_embeddings"] = trained
  config = LlamaConfig(
    hidden_size=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    max_position_embeddings=trained,
    rope_parameters=rope,
  )
  generator = torch.Generator().manual_seed(0)
  q, k = (torch.randn((1, HEADS, LENGTH, HEAD_DIM), generator=generator) for _ in "qk")
  cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(LENGTH)[None])
  expected = [x.transpose(1, 2).numpy() for x in apply_rotary_pos_emb(q, k, cos, sin)]

  method = POSITIONS[name](**fields, **({} if name in ("rope", "pi") else dict(original_length=trained)))
  table = table_of(method, HEAD_DIM, LENGTH)
  pos = np.arange(LENGTH, dtype=np.int32)[None]
  found = [
    hook(x.transpose(1, 2).numpy(), pos, table) for hook, x in ((method.rotate_q, q), (method.rotate_k, k))
  ]
  # its float32 product position * frequency is off by up to half an ulp of 96, 3.8e-6, times |x| of about 4
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=3e-5)


def test_the_interleaved_layout_is_gpt_j(table_of):
  from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

  x = torch.randn((1, LENGTH, HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(1))
  sin, cos = create_sinusoidal_positions(LENGTH, HEAD_DIM)[None].chunk(2, dim=-1)
  method = POSITIONS["rope"](layout="interleaved")
  found = method.rotate_q(x.numpy(), np.arange(LENGTH, dtype=np.int32)[None], table_of(method, HEAD_DIM))
  np.testing.assert_allclose(found, apply_rotary_pos_emb(x, sin, cos).numpy(), rtol=0, atol=3e-5)


@pytest.mark.core
def test_alibi_of_bloom():
  """Its bias is slope * key position: our last row but for a constant a row, which softmax drops."""
  from transformers.models.bloom.modeling_bloom import build_alibi_tensor

  pos = np.arange(16, dtype=np.int32)[None]
  expected = {n: build_alibi_tensor(torch.ones(1, 16), n, torch.float32)[:, 0].numpy() for n in range(1, 129)}
  for n, alibi in expected.items():
    components.measured_close("alibi", "transformers' BLOOM", alibi_slopes(n), alibi[:, 1], rtol=1e-6)
  for n in (8, 12, 40):
    found = np.asarray(POSITIONS["alibi"]().bias({}, pos[:, -1:], pos, n, 1))[0, :, 0]
    np.testing.assert_allclose(found - found[:, :1], expected[n], rtol=1e-6, atol=2e-6)
