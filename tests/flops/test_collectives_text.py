"""Collectives and lengths of loops, read from texts that are written out here and from programs that are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import parallel
from jaxllm.errors import DataError
from jaxllm.flops.collectives import Collective, Sum, collectives, totals
from jaxllm.flops.compiled import Compiled, compiled
from jaxllm.flops.text import Program

KINDS = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %ar = f32[96,32]{1,0:T(8,128)} all-reduce(%dot.1), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/dot"}
  %ar2 = (f32[8,12]{1,0}, bf16[3]{0}) all-reduce-start(%a, %b), channel_id=2
  %done = (f32[8,12]{1,0}, bf16[3]{0}) all-reduce-done(%ar2)
  %ag = (bf16[4,4]{1,0:T(8,128)(2,1)S(1)}, bf16[64,4]{1,0}) all-gather-start(%p), dimensions={0}
  %agd = bf16[64,4]{1,0} all-gather-done(%ag)
  %cp = (s4[2,3]{1,0}, s4[2,3]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3
  %cpd = s4[2,3]{1,0} collective-permute-done(%cp)
  %aa = (f32[2]{0}, /*index=1*/f32[2]{0}) all-to-all(%x, %y)
  %async = ((f32[64]), f32[8], u32[]) async-start(%p), calls=%scattered
  %u = ((f32[64]), f32[8], u32[]) async-update(%async), calls=%scattered
  %f8 = f8e4m3fn[10] all-gather(%q), dimensions={0}
  %c = f32[2] conditional(%pred, %x, %y), branch_computations={%left, %right}
  ROOT %fusion = f32[2]{0} fusion(%ar), kind=kLoop, calls=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%scattered (p: f32[64]) -> f32[8] {
  ROOT %rs = f32[8] reduce-scatter(%p), to_apply=%add
}

%left (p: f32[2]) -> f32[2] {
  ROOT %all = f32[2] all-reduce(%p), to_apply=%add
}

%right (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2] parameter(0)
}
"""


def test_each_kind():
  f32, bf16 = (lambda *shape: ("f32", shape)), (lambda *shape: ("bf16", shape))
  assert collectives(KINDS) == [
    Collective("all-reduce", (f32(96, 32),), source="jit(f)/dot"),
    Collective("all-reduce", (f32(8, 12), bf16(3))),
    Collective("all-gather", (bf16(64, 4),)),
    Collective("collective-permute", (("s4", (2, 3)),)),
    Collective("all-to-all", (f32(2), f32(2))),
    Collective("reduce-scatter", (f32(8),)),
    Collective("all-gather", (("f8e4m3fn", (10,)),)),
    Collective("all-reduce", (f32(2),), once=True),
  ]
  assert totals(collectives(KINDS)) == {
    "all-reduce": Sum(3, 4 * 96 * 32 + 4 * 96 + 2 * 3 + 4 * 2),
    "all-gather": Sum(2, 2 * 64 * 4 + 10),
    "reduce-scatter": Sum(1, 32),
    "all-to-all": Sum(1, 16),
    "collective-permute": Sum(1, 3),  # six numbers of four bits
  }


TPU = """
%part.1 (a: f32[4], b: u32[]) -> f32[4] {
  %g = f32[64] all-gather(%a), channel_id=48, dimensions={0}
  ROOT %t = f32[4] tuple(%a)
}

%part.2 (a: f32[4]) -> f32[4] {
  %g2 = f32[64] all-gather(%a), channel_id=48, dimensions={0}
  ROOT %t2 = f32[4] tuple(%a)
}

%all-reduce-scatter.3 (a: f32[64]) -> f32[4] {
  %r = f32[64] all-reduce(%a), channel_id=49, to_apply=%add
  ROOT %ds = f32[4] dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

%inner (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[], f32[4]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %one = u32[]{:T(128)} constant(1)
  %i1 = u32[]{:T(128)} add(%i, %one)
  %i2 = u32[]{:T(128)} add(%i1, %one)
  %s = f32[4] collective-permute(%x), channel_id=7
  %y = f32[4] fusion(%s), kind=kOutput, calls=%part.2
  ROOT %t = (u32[], f32[4]) tuple(%i2, %y)
}

%inner_condition (p: (u32[], f32[4])) -> pred[] {
  %p = (u32[], f32[4]) parameter(0)
  %n = u32[] constant(9)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%next (i: s32[], n: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %sum = s32[] add(%n, %i)
}

%outer (p: (s32[], f32[4], s32[], u32[])) -> (s32[], f32[4], s32[], u32[]) {
  %p = (s32[], f32[4], s32[], /*index=3*/u32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %zero = u32[] get-tuple-element(%p), index=3
  %copy = u32[] copy(%zero)
  %t = (u32[], f32[4]) tuple(%copy, %x)
  %w = (u32[], f32[4]) while(%t), condition=%inner_condition, body=%inner
  %y = f32[4] get-tuple-element(%w), index=1
  %z = f32[4] fusion(%y), kind=kOutput, calls=%part.1
  %v = f32[4] fusion(%z), kind=kCustom, calls=%all-reduce-scatter.3
  %one = s32[] constant(1)
  %j = s32[] fusion(%i, %one), kind=kLoop, calls=%next
  ROOT %r = (s32[], f32[4], s32[], /*index=3*/u32[]) tuple(%j, %v, %n, %zero)
}

%outer_condition (p: (s32[], f32[4], s32[], u32[])) -> pred[] {
  %p = (s32[], f32[4], s32[], /*index=3*/u32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %gt = pred[] compare(%n, %i), direction=GT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %two = s32[] constant(2)
  %six = s32[] constant(6)
  %u = u32[] constant(1)
  %t = (s32[], f32[4], s32[], u32[]) tuple(%two, %a, %six, %u)
  %w = (s32[], f32[4], s32[], u32[]) while(%t), condition=%outer_condition, body=%outer
  ROOT %y = f32[4] get-tuple-element(%w), index=1
}
"""
"""Four rounds, from 2 to 6, of four, from 1 to 9 by 2: as XLA writes loops for TPUs, without their lengths."""


def test_loops_and_fusions_of_a_tpu():
  """A gather that goes on in fusions in and after a loop is one; a scatter may be a fusion of a sum."""
  f32 = lambda n: (("f32", (n,)),)
  assert collectives(TPU) == [
    Collective("collective-permute", f32(4), 16),
    Collective("all-gather", f32(64), 4),
    Collective("reduce-scatter", f32(4), 4),
  ]


@pytest.mark.parametrize(
  ("old", "new"),
  [
    (
      "%six = s32[] constant(6)",
      "%six = s32[] get-tuple-element(%b), index=0",
    ),  # an end that comes from outside
    ("%two = s32[] constant(2)", "%two = s32[] rng(%b)"),  # a beginning
    ("ROOT %sum = s32[] add(%n, %i)", "ROOT %sum = s32[] multiply(%n, %i)"),  # steps that grow
    ("ROOT %gt = pred[] compare(%n, %i), direction=GT", "ROOT %gt = pred[] compare(%n, %i), direction=NE"),
    ("tuple(%j, %v, %n, %zero)", "tuple(%j, %v, %j, %zero)"),  # an end that moves
  ],
)
def test_a_loop_of_unknown_length_counts_once(old, new):
  found = collectives(TPU.replace(old, new))
  assert TPU.count(old) == 1
  assert [(one.count, one.once) for one in found] == [(4, True), (1, True), (1, True)]


def test_the_compiler_is_believed():
  text = TPU.replace("body=%outer\n", 'body=%outer, backend_config={"known_trip_count":{"n":"5"}}\n')
  assert [one.count for one in collectives(text)] == [20, 5, 5]
  none = TPU.replace("%six = s32[] constant(6)", "%six = s32[] constant(1)")
  assert collectives(none) == []


LOOPS = {
  "fori_loop": (lambda x: jax.lax.fori_loop(3, 10, lambda i, x: jnp.sin(x) * i, x), 7),
  "scan": (lambda x: jax.lax.scan(lambda c, y: (c + y, y), 0.0, x)[0], 12),
  "by three": (
    lambda x: jax.lax.while_loop(lambda c: c[0] < 20, lambda c: (c[0] + 3, jnp.sin(c[1])), (0, x))[1],
    7,
  ),
  "until it is small": (lambda x: jax.lax.while_loop(lambda x: x[0] > 1, lambda x: x / 2, x), None),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_as_they_are_traced(name):
  """Before the compiler has said how long they are."""
  f, expected = LOOPS[name]
  program = Program.of(jax.jit(f).lower(jax.ShapeDtypeStruct((12,), jnp.float32)).as_text("hlo"))
  loops = [
    (c, one) for c, all_of in program.computations.items() for one in all_of.values() if one.op == "while"
  ]
  assert [program.trips(c, one, {})[0] for c, one in loops] == [expected]


def test_what_is_no_program():
  with pytest.raises(DataError, match="no ENTRY"):
    collectives("module {}")


def test_a_compiled_program():
  """Bytes as they are by arithmetic: a matrix in quarters, gathered; a sum over the devices, three times."""
  mesh = parallel.make_mesh("fsdp=4", jax.devices()[:4])
  struct = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
  )

  def f(w, x):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
    step = lambda y, _: (jnp.tanh(jnp.einsum("cd,df->cf", jnp.sum(y, 0, keepdims=True) + y, w)), None)
    return jax.lax.scan(step, x, None, length=3)[0]

  found = compiled(jax.jit(f, donate_argnums=1), struct((64, 64), "fsdp"), struct((8, 64), "fsdp"))
  assert found.arguments == 4 * (64 * 64 + 8 * 64) // 4
  assert found.outputs == found.aliased == 4 * 8 * 64 // 4
  assert found.temporaries >= 4 * 64 * 64  # the whole matrix
  assert found.needed == found.arguments + found.temporaries
  assert found.products == 3 * 2 * 8 * 64 * 64
  assert found.flops < found.products / 4 * 1.5 / 2  # the loop once
  sums = totals(list(found.collectives))
  assert sums == {"all-reduce": Sum(3, 3 * 4 * 64), "all-gather": Sum(1, 4 * 64 * 64)}
  assert found.fits(None) is None and found.fits(found.needed) and found.fits(found.needed - 1) is None
  assert Compiled(1, None, 0.0, refused="no room").fits(1e12) is False
  np.testing.assert_equal(jax.config.jax_enable_compilation_cache, True)
