"""The number formats that policies choose from, as XLA computes in them, and what every kind of model computes in which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, params, tokens
from training_table import about, measured

from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.losses import cross_entropy
from jaxllm.train.precision import POLICIES

FORMATS = {  # bits of the exponent and of the fraction: IEEE 754 binary16 and binary32, and bfloat16
  "float16": (5, 10),
  "bfloat16": (8, 7),
  "float32": (8, 23),
}


@pytest.mark.parametrize("name", FORMATS)
def test_constants(name):
  """(2 - 2^-f) 2^b, 2^(1-b), 2^(1-b-f) and 2^-f of exponents of e and fractions of f bits, b = 2^(e-1) - 1, in sums of XLA.

  Source: IEEE 754 (2019), section 3.4; 65504, 6.1035e-5, 5.96e-8 and 9.77e-4 of binary16 are those of Micikevicius et al.
  (2017), section 3.
  """
  about("precision", f"{name}: constants")
  e, f = FORMATS[name]
  b = 2 ** (e - 1) - 1
  info = jnp.finfo(name)
  expected = [(2 - 2.0**-f) * 2.0**b, 2.0 ** (1 - b), 2.0 ** (1 - b - f), 2.0**-f]
  found = [float(x) for x in (info.max, info.smallest_normal, info.smallest_subnormal, info.eps)]
  assert found == expected
  if name == "float16":
    assert [float(f"{x:.5g}") for x in found] == [65504, 6.1035e-5, 5.9605e-8, 9.7656e-4]
  add = jax.jit(lambda x, y: x + y)
  number = lambda x: jnp.asarray(x, name)
  assert add(number(1), number(info.eps)) == 1 + expected[3] and add(number(1), number(info.eps / 2)) == 1
  step = number(
    expected[0] * 2.0 ** (-f - 1)
  )  # half the last place of the largest number, and what is below half
  assert np.isinf(add(number(info.max), step)) and add(number(info.max), step * 0.49) == info.max
  measured("precision", f"{name}: constants", compared=4, differ=0)


def test_small_numbers_are_swamped():
  """1 + 100 x 1e-4 is 1 and 2^-3 + 2^-14 is 2^-3 in float16, and a count by ones stays at 256 in bfloat16; not in float32."""

  def repeated(start, step, times, dtype):
    x = jax.lax.fori_loop(0, times, lambda _, x: x + jnp.asarray(step, dtype), jnp.asarray(start, dtype))
    return float(x)

  about("precision", "what is swamped")
  cases = (
    (1.0, 1e-4, 100, "float16", 1.0),
    (2.0**-3, 2.0**-14, 1, "float16", 2.0**-3),
    (0.0, 1.0, 1000, "bfloat16", 256.0),
  )
  for start, step, times, dtype, expected in cases:
    assert repeated(start, step, times, dtype) == expected
    assert repeated(start, step, times, "float32") == pytest.approx(
      start + times * step, rel=times * 2.0**-24
    )
  assert repeated(2.0**-3, 2.0**-13, 1, "float16") == 2.0**-3 + 2.0**-13
  measured("precision", "what is swamped", compared=3, differ=0)


WIDE = (
  "exp",
  "exp2",
  "log",
  "log1p",
  "rsqrt",
  "sqrt",
  "reduce_sum",
  "reduce_max",
  "logistic",
  "tanh",
  "erf",
  "cumsum",
)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
        yield from equations(inner)


@pytest.mark.parametrize("policy", ["O1", "bf16"])
@pytest.mark.parametrize(
  "name", ["yarn, and the rest otherwise", "post_only", "soft caps", "qk_norm", "t5", "experts", "blockwise"]
)
def test_reductions_are_float32_in_every_kind_of_model(name, policy):
  """Softmax, norms, activations and the loss: LayerNorm and GELU, caps, biases of positions, routers, and tiles."""
  cfg = MODELS["alibi" if name == "blockwise" else name]
  if name == "blockwise":
    cfg = dataclasses.replace(cfg, attention=Blockwise(8, 8))
  rules = POLICIES[policy]
  model, ids = rules.model(Transformer(cfg)), tokens()

  def loss(p):
    hidden, _ = model.apply({"params": p}, ids[:, :-1], logits=None)
    return jnp.mean(cross_entropy(hidden, rules.logits(head(model.cfg, p)), ids[:, 1:])[0])

  found = [
    (str(eqn.primitive), {str(x.aval.dtype) for x in eqn.invars})
    for eqn in equations(jax.make_jaxpr(loss)(rules.stored(params(cfg))).jaxpr)
  ]
  seen = [(kind, dtypes) for kind, dtypes in found if kind in WIDE]
  assert len(seen) > 20 and {"exp", "log", "reduce_sum"} <= {kind for kind, _ in seen}
  assert all(dtypes <= {"float32", "int32", "bool"} for _, dtypes in seen), seen
  assert {rules.compute} in [dtypes for kind, dtypes in found if kind == "dot_general"]
