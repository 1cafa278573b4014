"""What the compiled program sends between devices: nothing that the rule set does not have to."""

import collections
import dataclasses
import math
import re

import jax
import pytest
from mesh_cases import CASES, MATRIX, params
from mesh_checks import B, T, make_mesh, tokens

from jaxllm import parallel
from jaxllm.nn import Transformer, init_cache
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy

COLLECTIVE = re.compile(
  r"= (?P<shapes>\(.*?\)|\S+) (?P<name>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)


def collectives(text):
  """[(name, shapes of the results)] of a compiled program."""
  shapes = lambda text: tuple(
    tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", text)
  )
  return [(m["name"], shapes(m["shapes"])) for m in map(COLLECTIVE.search, text.splitlines()) if m]


def compiled(name, rules, axes, call, **fields):
  """The collectives of call(cfg, params, ids) on the mesh, for a case with other fields."""
  cfg, mesh = dataclasses.replace(CASES[name], **fields), make_mesh(axes)
  with jax.set_mesh(mesh):
    placed = parallel.shard(params(cfg, name in MATRIX), mesh, parallel.RULES[rules], cfg)
    ids = parallel.shard_batch(tokens(cfg), mesh)
    program = jax.jit(lambda params, ids: call(cfg, params, ids)).lower(placed, ids).compile()
  return collectives(program.as_text())


def hidden(cfg, params, ids):
  return Transformer(cfg).apply({"params": params}, ids[:, :-1], logits=None)[0]


def loss(cfg, params, ids):
  return cross_entropy(hidden(cfg, params, ids), head(cfg, params), ids[:, 1:], chunk=B * T // 2)


def decode(cfg, params, ids):
  return Transformer(cfg).apply({"params": params}, ids[:, :4], cache=init_cache(cfg, B, T))


def test_the_pattern_reads_what_xla_writes():
  text = """
  %all-reduce.1 = f32[96,32]{1,0} all-reduce(%dot.1), channel_id=1
  %ar = (f32[8,12]{1,0}, f32[8,12]{1,0}) all-reduce-start(%a, %b), channel_id=2
  %done = f32[8,12]{1,0} all-reduce-done(%ar)
  ROOT %g = bf16[64,4]{0,1} all-gather(%p), dimensions={1}
  %fusion = f32[2]{0} fusion(%all-reduce.1), calls=%c
  """
  expected = [("all-reduce", ((96, 32),)), ("all-reduce", ((8, 12), (8, 12))), ("all-gather", ((64, 4),))]
  assert collectives(text) == expected


SLOW = [("data=2,tensor=4", name) for name in ("gemma2", "granite", "gpt2", "bloom", "mpt", "odd gemma2")]
SLOW += [("tensor=8", name) for name in ("llama", "qwen3", "qwen3_moe", "phi3", "smollm3")] + [
  ("tensor=4", "llama")
]


@pytest.mark.core
@pytest.mark.parametrize(
  ("axes", "name"),
  [
    ("tensor=4", "odd llama"),
    ("tensor=4", "gpt_oss"),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW),
  ],
)
def test_two_all_reduces_a_layer(axes, name):
  """Each the size of the residual stream; one for the embedding; and nothing else, so no weight is gathered."""
  count = lambda layers: collections.Counter(compiled(name, "tensor", axes, hidden, num_layers=layers))
  two, four = count(2), count(4)
  rows = B // (2 if "data" in axes else 1)
  stream = {("all-reduce", ((rows * T, 32),)), ("all-reduce", ((rows, T, 32),))}
  assert set(two) <= stream and set(four) <= stream, (two, four)
  assert four.total() - two.total() == 2 * 2
  assert two.total() == 2 * 2 + 1


@pytest.mark.slow
def test_a_norm_over_all_heads_adds_its_sums():
  """OLMo 2: one more all-reduce a layer, of a number a token for queries and for keys."""
  count = lambda layers: collections.Counter(
    compiled("olmo2", "tensor", "tensor=4", hidden, num_layers=layers)
  )
  added = list((count(4) - count(2)).elements())
  sums = [shape for _, shapes in added for shape in shapes if shape == (B, T)]
  stream = [shape for _, shapes in added for shape in shapes if shape == (B * T, 32)]
  assert len(sums) == len(stream) == 2 * 2 and {name for name, _ in added} == {"all-reduce"}
  assert sum(len(shapes) for _, shapes in added) == len(sums) + len(stream)


@pytest.mark.parametrize("call", [loss, decode])
def test_copies_of_the_model_send_nothing_forward(call):
  """Rows stay on their devices: in the chunks of the loss, and in the cache."""
  assert compiled("llama", "data", "data=8", call) == []


def test_logits_are_never_gathered():
  """The loss over a split vocabulary, padded too, sends a few numbers a token: of a maximum, a sum and an argmax a shard."""
  found = compiled("odd llama", "tensor", "tensor=4", loss)
  stream = [((B * T, 32),), ((B, T, 32),)]
  widths = [
    math.prod(shape) / (B * T // 2) for _, shapes in found if shapes not in stream for shape in shapes
  ]
  assert widths and max(widths) <= 4


def test_fsdp_gathers_weights_and_no_activations():
  """Each matrix of the layers once, and the tokens; of the embedding, the rows that were looked up change devices."""
  found = compiled("llama", "fsdp", "fsdp=8", hidden)
  canonical = lambda shape: tuple(sorted(shape))  # of a matrix held as [out, in] either order may be gathered
  matrices = [
    leaf.shape for leaf in jax.tree.leaves(params(CASES["llama"])["layers"]) if len(leaf.shape) == 2
  ]
  gathered = [shapes[0] for name, shapes in found if name == "all-gather"]
  small = [shape for shape in gathered if math.prod(shape) <= B * T]
  large = collections.Counter(canonical(shape) for shape in gathered if shape not in small)
  assert large == collections.Counter(map(canonical, matrices))
  assert {name for name, _ in found} <= {"all-gather", "all-to-all"}
