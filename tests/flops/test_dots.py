"""The formulas and the programs of the real model: every product that XLA is given, and those that it compiles."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from model_cases import BLOCKS, MODELS, WINDOW, model

from jaxllm import flops
from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import DataError
from jaxllm.nn import Transformer, transformer
from jaxllm.nn.transformer import head
from jaxllm.ops import grouped
from jaxllm.ops.attention import Plain, Side, allowed
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.device import Device
from jaxllm.ops.losses import cross_entropy
from jaxllm.position import Rope
from jaxllm.position.window import StreamingRope

B, T = 2, 13  # a prime that is no other size of the models, so that no two terms can stand for each other
TWICE = ("rerope", "leaky_rerope", "inv_leaky_rerope", "self_extend", "streaming", "longrope")
"""Methods that score a pair twice and keep one of the two."""
TIED = dict(tie_embeddings=True, num_kv_heads=4)
FAMILIES = {
  name: MODELS[name] for name in ("nope", "learned", "t5", "alibi", "rope", "dynamic_ntk", "rerope")
}
FAMILIES |= {
  "yarn, and the rest otherwise": MODELS["yarn, and the rest otherwise"],
  "tied": model("rope", **TIED),
}
FAMILIES |= {name: MODELS[name] for name in BLOCKS if name != "experts"}
CORE = ("rope", "yarn, and the rest otherwise", "tied", "rerope", "deepnorm", "embedding of another width")
marked = [pytest.param(n, marks=[] if n in CORE else [pytest.mark.slow]) for n in FAMILIES]


def arguments(cfg, length=T, rows=B, dtype=None):
  """Shapes of parameters and tokens."""
  params = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), params)
  return params, jax.ShapeDtypeStruct((rows, length), jnp.int32)


def loss(cfg, length=T, chunk=8192):
  tables = cfg.rope_tables(seq_len=length)

  def of(params, ids):
    hidden, _ = Transformer(cfg).apply({"params": params}, ids, rope=tables, logits=None)
    return jnp.mean(cross_entropy(hidden, head(cfg, params), ids, chunk)[0])

  return of


def programs(cfg, length=T, **kwargs):
  """The lowered programs of a forward pass, and of that with its gradients."""
  of = loss(cfg, length)
  made = (jax.jit(f).trace(*arguments(cfg, length)) for f in (of, jax.value_and_grad(of)))
  return [one.lower(**kwargs) for one in made]


def total(cfg, length=T):
  return B * sum(flops.forward(cfg, length).values())


@pytest.mark.parametrize("name", marked)
def test_every_product_of_the_program_is_counted(name):
  """Forward, and three times that with the gradients, to the last one; window layers multiply all pairs in the plain core."""
  cfg = FAMILIES[name]
  more = 0
  if name in TWICE:  # one more product a pair than the model needs
    more = B * flops.forward(cfg, T)["attention"] // 2
  for program, times in zip(programs(cfg), (1, 3), strict=True):
    assert flops.dots(program.as_text("hlo")) == times * (total(cfg) + more)


@pytest.mark.parametrize(
  "name", ["yarn, and the rest otherwise", pytest.param("tied", marks=pytest.mark.slow)]
)
def test_nor_does_the_compiler_change_that(name):
  for program, times in zip(programs(FAMILIES[name]), (1, 3), strict=True):
    assert flops.dots(program.compile().as_text()) == times * total(FAMILIES[name])


def test_experts_by_the_program_of_a_tpu(monkeypatch):
  """Where rows of all experts are one ragged product; elsewhere they are loops as long as the router says."""
  cfg = MODELS["experts"]
  with pytest.raises(DataError, match="loop of unknown length"):
    flops.dots(programs(cfg)[0].as_text("hlo"))
  monkeypatch.setattr(grouped, "current_device", lambda: Device("tpu"))
  for program, times in zip(programs(cfg, lowering_platforms=("tpu",)), (1, 3), strict=True):
    assert flops.dots(program.as_text("hlo")) == times * total(cfg)


WRONG = {
  "keys and values of every head": dict(num_kv_heads=4),
  "two matrices for three": dict(mlp=Mlp("silu")),
  "a tied head that is free": dict(vocab_size=1),
  "heads of D / N": dict(head_dim=6),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_is_seen(name):
  cfg = model("rope", num_kv_heads=2, mlp=Glu())
  found = flops.dots(programs(cfg)[0].as_text("hlo"))
  assert found == total(cfg) != total(dataclasses.replace(cfg, **WRONG[name]))


def small(**kwargs):
  sizes = dict(
    vocab_size=61, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=20, mlp_dim=72
  )
  return ModelConfig(**sizes | kwargs)


def test_layers_computed_again(monkeypatch):
  """All of a forward pass but down, which nobody reads: nothing normalises it."""
  cfg, length = small(), 16
  parts = flops.forward(cfg, length)
  monkeypatch.setattr(transformer, "Block", nn.remat(transformer.Block, static_argnums=(3,)))
  found = flops.dots(programs(cfg, length)[1].as_text("hlo"))
  down = 2 * length * 2 * 48 * 72
  assert found == B * (3 * sum(parts.values()) + flops.recomputed(parts, "full") - down)


def test_logits_computed_again():
  """A chunk at a time, in a loop whose length the compiler says."""
  cfg, length = small(), 16
  parts = flops.forward(cfg, length)
  of = jax.value_and_grad(loss(cfg, length, chunk=8))
  text = jax.jit(of).lower(*arguments(cfg, length)).compile().as_text()
  assert flops.dots(text) == B * (
    3 * sum(parts.values()) + flops.recomputed(parts, "none", chunked_head=True)
  )


@pytest.mark.parametrize("times", [1, 3])
def test_the_compilers_own_count_is_near(times):
  """It has norms, softmax and rotations too: 5 % at most, of a width at which products are most."""
  cfg = small(vocab_size=512, embed_dim=256, head_dim=64, mlp_dim=1024)
  of = loss(cfg, 64) if times == 1 else jax.value_and_grad(loss(cfg, 64))
  found = jax.jit(of).lower(*arguments(cfg, 64)).cost_analysis()["flops"]
  assert 1 < found / (times * total(cfg, 64)) < 1.05


LAYERS = {
  "all": Layer(),
  "window": Layer(Rope(), WINDOW),
  "wide window": Layer(Rope(), 40),
  "sinks": Layer(StreamingRope(window=5, sinks=3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_pairs_are_those_that_the_mask_allows(name):
  layer, i = LAYERS[name], jnp.arange(T, dtype=jnp.int32)
  side = Side(i[None], i[None])
  mask = allowed(side, side, layer.window)[0]
  if layer.position.seen:
    sinks, window = layer.position.seen
    mask &= (i[None] < sinks) | (i[:, None] - i[None] < window)
  assert flops.pairs(layer, T, "causal") == int(mask.sum())
  assert flops.pairs(layer, T) == T * T


@pytest.mark.parametrize("window", [None, 4])
def test_tiles_of_one_pair_multiply_those(window):
  """What the blockwise core multiplies, tile by tile, where a tile is a query and a key."""
  i = jnp.arange(9, dtype=jnp.int32)[None]
  side, seen = Side(i, i, in_order=True), []

  def score(q, k, q_pos, k_pos):
    jax.debug.callback(lambda i, j: seen.append((int(i[0, 0]), int(j[0, 0]))), q_pos, k_pos)
    return jnp.zeros((1, 1, 1, 1, 1))

  x = jnp.ones((1, 9, 1, 2))
  Blockwise(1, 1)(x, x, x, side, side, window, score)
  jax.effects_barrier()
  assert len(set(seen)) == len(seen) == flops.pairs(Layer(Rope(), window), 9, "causal")


@pytest.mark.parametrize(
  ("core", "remat"), [(Plain(), "none"), pytest.param(Blockwise(), "selective", marks=pytest.mark.slow)]
)
def test_activations_beside_the_compilers(core, remat):
  """Bytes a layer of a compiled float32 step: never less than a fifth below the count, half as much again at most."""
  length = 512

  def held(layers):
    cfg = small(num_layers=layers, embed_dim=128, head_dim=32, mlp_dim=512, attention=core)
    program = jax.jit(jax.value_and_grad(loss(cfg, length))).lower(*arguments(cfg, length, 1))
    return program.compile().memory_analysis().temp_size_in_bytes

  cfg = small(embed_dim=128, head_dim=32, mlp_dim=512)
  counted = flops.layer_activations(cfg, cfg.layers[0], length, width=4, remat=remat)
  assert 0.8 < (held(4) - held(2)) / 2 / counted < 1.6


m, k, n = 3, 5, 7
SHAPES = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, k), (k, n))]


def loop(x, w):
  return jax.lax.fori_loop(0, 11, lambda _, y: jnp.tanh(y @ w) @ w.T, x)


def unknown(x, w):
  return jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: (y @ w) @ w.T, x)


READ = {  # what is compiled, and its FLOPs
  "one": (lambda x, w: x @ w, 2 * m * k * n),
  "two": (lambda x, w: jnp.tanh(x @ w) @ w.T, 4 * m * k * n),
  "batches": (lambda x, w: jnp.einsum("mk,kn->kmn", x, w) @ jnp.ones((k, n, 2)), 2 * k * m * n * 2),
  "a loop": (loop, 11 * 4 * m * k * n),
  "none": (lambda x, w: x.sum() + w.sum(), 0),
}


@pytest.mark.parametrize("name", READ)
def test_programs_are_read(name):
  f, expected = READ[name]
  assert flops.dots(jax.jit(f).lower(*SHAPES).compile().as_text()) == expected


def test_what_is_not_in_the_text_is_told():
  branch = lambda x, w: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: jnp.zeros((m, n)))
  for f, reason in ((unknown, "loop of unknown length"), (branch, "in a branch")):
    with pytest.raises(DataError, match=reason):
      flops.dots(jax.jit(f).lower(*SHAPES).compile().as_text())
  with pytest.raises(DataError, match="no ENTRY"):
    flops.dots("module {}")
  assert math.isfinite(
    flops.dots(jax.jit(branch).lower(*SHAPES[:1], SHAPES[1]).as_text("hlo").replace("dot(", "add("))
  )
