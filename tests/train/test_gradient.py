"""The gradient of a step: parts of a batch, labels that count, packed rows, z-loss, and what of a layer is computed again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from mesh_checks import gradient_error

from jaxllm import quant, tree
from jaxllm.experts import Moe
from jaxllm.nn import Context, Transformer
from jaxllm.nn.layers import REMATS
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train import data, lora, step
from jaxllm.train.batches import Batch
from jaxllm.train.precision import POLICIES
from jaxllm.train.trainable import trained, with_trained

MODEL = Transformer(train_cases.CFG)
B, T = 8, train_cases.LENGTH
TOKENS = data.batch(train_cases.TEXT, 3, 0, B, T)
COUNTED = (
  np.random.default_rng(0).random((B, T)) < np.linspace(0, 1, B)[:, None]
)  # row 0 has no label, row 7 has all


@functools.cache
def weights():
  return jax.device_get(jax.jit(MODEL.init)(jax.random.key(5), TOKENS[:, :-1])["params"])


def batch_of(tokens, counted, **context):
  return Batch(tokens[:, :-1], tokens[:, 1:], counted.astype(np.float32), Context(**context))


def gradient(batch, **kwargs):
  """(loss, its gradient) of a whole batch."""
  config = step.TrainConfig(1, len(jax.tree.leaves(batch)[0]), T, **kwargs)
  return jax.device_get(jax.jit(step.make_gradient(MODEL, config))(weights(), batch))


def log_softmax(logits):
  logits = np.float64(logits)
  wide = logits - logits.max(-1, keepdims=True)
  return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def logits_of(p, tokens):
  return MODEL.apply({"params": p}, tokens[:, :-1])[0]


@pytest.mark.core
def test_parts_of_a_batch_count_by_their_labels():
  """Rows 0 and 4, 1 and 5, and so on: the last part has twice the labels of the first."""
  batch = batch_of(TOKENS, COUNTED)
  log_p = np.take_along_axis(log_softmax(logits_of(weights(), TOKENS)), TOKENS[:, 1:, None], -1)[..., 0]
  expected_loss = -log_p[COUNTED].mean()

  def objective(p):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits_of(p, TOKENS)), TOKENS[:, 1:, None], -1)[..., 0]
    return -jnp.sum(jnp.where(COUNTED, log_p, 0)) / COUNTED.sum()

  expected = jax.device_get(jax.jit(jax.grad(objective))(weights()))
  for accumulate in (1, 4):
    loss, grads = gradient(batch, accumulate=accumulate)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradient_error(grads, expected) <= 1e-6, accumulate
  # the mean of the parts' means is another gradient
  halves = [gradient(jax.tree.map(lambda x, i=i: x[i::2], batch))[1] for i in range(2)]
  assert gradient_error(jax.tree.map(lambda a, b: (a + b) / 2, *halves), expected) > 0.03


def test_the_mean_is_by_weights_of_any_size():
  """A quarter of every weight is the same mean, and weights of 1 and 3 are those of rows that are there three times."""
  plain = batch_of(TOKENS, COUNTED)
  scaled = dataclasses.replace(plain, weights=plain.weights / 4)
  thrice = jax.tree.map(lambda x: x[[0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7]], plain)
  weighed = dataclasses.replace(plain, weights=plain.weights * np.float32([1, 1, 1, 3, 1, 1, 1, 3])[:, None])
  for one, other in ((plain, scaled), (thrice, weighed)):
    (loss, grads), (expected_loss, expected) = gradient(one), gradient(other)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradient_error(grads, expected) <= 1e-6


@pytest.mark.parametrize("label", [-100, 10**6])
def test_a_label_that_does_not_count_may_be_any_number(label):
  """Also one outside the vocabulary, whose own loss is NaN."""
  batch = batch_of(TOKENS, COUNTED)
  other = dataclasses.replace(batch, labels=np.where(COUNTED, batch.labels, np.int32(label)))
  for one, two in zip(*map(jax.tree.leaves, (gradient(batch), gradient(other))), strict=True):
    np.testing.assert_array_equal(one, two)


def test_without_a_label_there_is_no_gradient():
  loss, grads = gradient(batch_of(TOKENS, np.zeros((B, T))), accumulate=2)
  assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves(grads))


def test_packed_rows_give_the_gradient_of_separate_ones():
  """Two texts of four tokens in a row, with segments and positions of their own; the label across them does not count."""
  texts = TOKENS[:, : T // 2 + 1]
  packed = np.concatenate(
    [texts[:4, :-1], texts[4:]], axis=1
  )  # the last label of the first is not in the row
  segment = np.repeat([[0, 1]], T // 2, axis=1).repeat(4, axis=0)
  pos = np.tile(np.arange(T // 2, dtype=np.int32), (4, 2))
  counted = np.ones((4, T), bool)
  counted[:, T // 2 - 1] = False
  found = gradient(batch_of(packed, counted, segment=segment, pos=pos))
  separate = np.ones((B, T // 2), bool)
  separate[:4, -1] = False
  expected = gradient(batch_of(texts, separate))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  assert gradient_error(found[1], expected[1]) <= 1e-6
  joined = gradient(batch_of(packed, counted))
  assert gradient_error(joined[1], expected[1]) > 1e-3


@pytest.mark.parametrize("chunk", [8192, B * T // 4])
def test_z_loss_is_in_the_gradient_and_not_in_the_loss(chunk):
  rng = np.random.default_rng(1)
  hidden = rng.standard_normal((B, T, 16), np.float32)
  to_logits = lambda h: head(MODEL.cfg, weights())(h)

  def found(h, z_loss):
    return jnp.mean(cross_entropy(h, to_logits, TOKENS[:, 1:], chunk=chunk, z_loss=z_loss)[0])

  def objective(h, z_loss):
    logits = to_logits(h)
    z = jax.scipy.special.logsumexp(logits, axis=-1)
    return jnp.mean(z - jnp.take_along_axis(logits, TOKENS[:, 1:, None], -1)[..., 0] + z_loss * z**2)

  program = jax.jit(jax.value_and_grad(found), static_argnums=1)
  (plain, _), (loss, grads) = program(hidden, 0.0), program(hidden, 0.1)
  assert loss == plain
  expected = jax.jit(jax.grad(objective), static_argnums=1)
  np.testing.assert_allclose(grads, expected(hidden, 0.1), rtol=0, atol=1e-6 * np.abs(grads).max())
  assert np.abs(grads - expected(hidden, 0.0)).max() > 0.1 * np.abs(grads).max()


def test_a_step_passes_the_z_loss_on():
  (plain, without), (loss, grads) = (gradient(TOKENS, z_loss=z) for z in (0.0, 1e-2))
  assert loss == plain and gradient_error(grads, without) > 1e-2


@pytest.mark.parametrize(
  ("policy", "scan"),
  [("model", False), ("bf16", False), pytest.param("model", True, marks=pytest.mark.slow)],
  ids=["layers", "bfloat16", "scan"],
)
def test_what_is_computed_again_changes_no_gradient(policy, scan):
  """Products of the compiled program: with nothing kept, a layer's seven and attention's two, but the last, once more each."""
  model, found, products = Transformer(train_cases.CFG, scan=scan), {}, {}
  p = jax.jit(model.init)(jax.random.key(5), TOKENS[:, :-1])["params"]
  for remat in REMATS:
    config = step.TrainConfig(1, B, T, remat=remat, precision=POLICIES[policy])
    program = jax.jit(step.make_gradient(model, config)).lower(p, TOKENS)
    products[remat] = program.as_text().count("stablehlo.dot_general")
    found[remat] = jax.device_get(program.compile()(p, TOKENS))
  for remat in REMATS:
    assert gradient_error(found[remat][1], found["none"][1]) <= (1e-6 if policy == "model" else 3e-2)
  layers = 1 if scan else train_cases.CFG.num_layers
  again = {remat: (count - products["none"]) / layers for remat, count in products.items()}
  assert again["none"] == again["dots"] == 0 and again["full"] > again["dots_no_batch"] > 0, again


@pytest.mark.parametrize(
  ("form", "numbers"),
  [
    (
      "dense",
      2 * (2 * 16 + 2 * 8 + 2 * 24),
    ),  # queries and output, keys and values, gate and up, all of two bytes
    ("LoRA", 2 * (2 * 16 + 2 * 8 + 2 * 24)),
    ("int8 and LoRA", 2 * (2 * 16 + 2 * 8 + 2 * 24)),
    (
      "experts",
      2 * (2 * 16 + 2 * 8 + 2 * 2 * 24) + 2 * 4 * 16,
    ),  # of two experts, whose output is weighted in float32
  ],
)
def test_a_layer_keeps_its_products_once_and_in_the_type_they_go_on_in(form, numbers):
  """Bytes a token and layer that a gradient reads, with `dots_no_batch` beyond what it does with nothing kept."""
  mlp = {"mlp": Moe(num_experts=4, top_k=2)} if form == "experts" else {}
  cfg = dataclasses.replace(train_cases.CFG, dtype="bfloat16", **mlp)

  p = jax.jit(Transformer(cfg).init)(jax.random.key(0), TOKENS[:, :-1])["params"]
  if form == "int8 and LoRA":
    p = quant.apply(p, quant.SCHEMES["int8"]())
  if "LoRA" in form:
    p = lora.apply(p, rank=2, alpha=2.0, key=jax.random.key(1))

  def kept(remat):
    def loss(changed):
      params = with_trained(p, changed, None)
      return jnp.sum(Transformer(cfg, remat=remat).apply({"params": params}, TOKENS[:, :-1])[0])

    residuals = jax.eval_shape(lambda changed: jax.vjp(loss, changed)[1], trained(p, None))
    of_tokens = [
      x for x in jax.tree.leaves(residuals) if x.shape[:2] == (B, T) or x.shape[:1] == (2 * B * T,)
    ]
    return sum(x.size * x.dtype.itemsize for x in of_tokens)

  nothing, products = kept("full"), kept("dots_no_batch")
  assert (products - nothing) / (cfg.num_layers * B * T) == numbers


def test_rules_choose_what_a_step_changes():
  """Decay, master weights and moments are of that alone, and all else stays bit for bit."""
  rules = ((r".*/mlp/.+", True), (r".+", False))
  config = train_cases.config(2, learning_rate=0.02, warmup=0.0, trained=rules, precision=POLICIES["O2"])
  state = step.init_state(MODEL, config, 0, jax.tree.map(jnp.asarray, weights()))
  assert {path for path in tree.flatten(state["master"])} == {
    p for p in tree.flatten(weights()) if "/mlp/" in p
  }
  assert state["opt"][1][0].mu.keys() == state["master"].keys()
  new, _ = step.make_step(MODEL, config)(state, TOKENS)
  before, after = (tree.flatten(jax.device_get(x)) for x in (weights(), new["params"]))
  for path, x in after.items():
    assert x.dtype == ("float16" if "/mlp/" in path else "float32")
    assert np.array_equal(x, before[path].astype(x.dtype)) == ("/mlp/" not in path), path
