"""Attention a head at a time is the plain core, forward and gradient; `auto` takes it on CPUs where it is the faster one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import Plain, Score, Side
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.by_head import ByHead
from jaxllm.ops.call import Call, Device
from jaxllm.ops.choose import choose
from jaxllm.position.base import inner_products

B, T, N, K, H = 2, 20, 4, 2, 8
SCORE = Score(lambda q, k, *_: inner_products(q, k), "Rope")
INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
PACKED = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int32), [6, 9, 5]), (B, T))
REAL = np.array([[T], [13]]) > INDEX
NONE_IN_ROW_1 = np.array([[T - 2], [0]]) > INDEX
CASES = {
  "causal": ({}, None),
  "window": ({}, 5),
  "packed": ({"segment": PACKED}, None),
  "packed window": ({"segment": PACKED}, 3),
  "padded": ({"valid": REAL}, None),
  "packed and padded": ({"segment": PACKED, "valid": NONE_IN_ROW_1}, 7),
}


def side(**known):
  known = {name: jnp.asarray(x) for name, x in known.items()}
  return Side(jnp.asarray(INDEX[:1]), jnp.asarray(INDEX[:1]), **known, in_order=True)


@functools.cache
def arrays(dtype="float32"):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]


def attend(core, case, dtype="float32"):
  """[output, gradients of q, k and v]"""
  known, window = CASES[case]
  *qkv, cotangent = arrays(dtype)
  run = lambda *qkv: core(*qkv, side(**known), side(**known), window, SCORE)

  def both(*qkv):
    out, back = jax.vjp(run, *qkv)
    return [out, *back(cotangent)]

  return jax.jit(both)(*qkv)


@pytest.mark.parametrize("case", [pytest.param("causal", marks=pytest.mark.core), *list(CASES)[1:]])
def test_by_head_is_plain(case):
  expected = attend(Plain(), case)
  for block in (5, 8, 32):  # that divide, that do not, and all at once
    for found, true in zip(attend(ByHead(block), case), expected, strict=True):
      assert found.dtype == true.dtype and relative_error(found, true) <= 1e-5, block
  if "valid" in CASES[case][0] and "segment" in CASES[case][0]:
    assert not np.asarray(expected[0])[1].any()  # a row without keys


@pytest.mark.parametrize("block", [4, 32])
def test_in_bfloat16(block):
  """Compiled, as XLA must not merge transposes into its products; within what rounding scores and weights once does."""
  low, exact = attend(ByHead(block), "packed", "bfloat16"), attend(Plain(), "packed")
  for found, true in zip(low, exact, strict=True):
    assert found.dtype == jnp.bfloat16 and relative_error(found.astype("float32"), true) <= 2**-6


def test_with_a_map_over_it():
  q, k, v, _ = arrays()
  run = lambda core: jax.vmap(lambda scale: core(scale * q, k, v, side(), side(), None, SCORE))
  scales = jnp.array([0.5, 2.0])
  assert relative_error(run(ByHead(8))(scales), run(Plain())(scales)) <= 1e-5


CPU = Device("cpu")


def test_which_calls_a_cpu_takes_by_head():
  def core(device=CPU, **known):
    known = dict(dtype="float32", head_dim=64, keys=512, method="Rope") | known
    return type(choose(Call(device, **known)).core)

  assert [core(keys=n) for n in (128, 256, 384, 512, 1024)] == [Plain, Plain, ByHead, ByHead, ByHead]
  assert core(segments=True) == core(dtype="bfloat16") == ByHead
  others = [dict(keys=513), dict(keys=1152), dict(queries=8), dict(hooks="a bias"), dict(in_order=False)]
  others += [dict(softcap=5.0), dict(sinks=True), dict(prefix=True), dict(fixed_window=False)]
  others += [dict(device=Device("cpu", partitioned=True)), dict(device=Device("metal"))]
  for known in others:
    assert core(**known) == (Plain if known == dict(queries=8) else Blockwise), known


@pytest.mark.parametrize(
  ("more", "reason"), [({"softcap": 5.0}, "does not cap"), ({"sinks": True}, "no attention sinks")]
)
def test_what_it_refuses(more, reason):
  call = Call(CPU, "float32", 64, 512, "Rope", **more)
  with pytest.raises(ConfigError, match=f"'by_head' with Rope.*{reason}"):
    ByHead().check(call)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "8"])
def test_bad_blocks_of_queries(bad):
  with pytest.raises(ConfigError, match=f"ByHead.block: found {bad!r}, expected an integer of at least 1"):
    ByHead(bad)
