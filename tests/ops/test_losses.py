"""The chunked cross-entropy against float64, forward and gradient."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm.leaf import Matrix, dense
from jaxllm.ops.head import Head
from jaxllm.ops.losses import _label_and_sum, cross_entropy

B, T, D, V = 3, 7, 16, 29
RNG = np.random.default_rng(0)
HIDDEN, HEAD = (
  RNG.standard_normal((B, T, D)).astype(np.float32),
  RNG.standard_normal((D, V)).astype(np.float32),
)
LABELS = RNG.integers(0, V, (B, T), np.int32)


def truth():
  logits = HIDDEN.astype(np.float64) @ HEAD.astype(np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return (
    -np.take_along_axis(log_probs, LABELS[..., None], -1)[..., 0],
    logits.argmax(-1) == LABELS,
    np.exp(log_probs),
  )


@pytest.mark.parametrize("chunk", [7, pytest.param(8, marks=pytest.mark.core), 1000])
def test_every_chunk_gives_the_same(chunk):
  def total(hidden, head, weights):
    nll, correct = cross_entropy(hidden, Head(head), LABELS, chunk)
    return jnp.sum(nll * weights), (nll, correct)

  nll, correct, probs = truth()
  weights = RNG.standard_normal((B, T)).astype(np.float32)
  grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  (d_hidden, d_head), (found, found_correct) = grad(HIDDEN, HEAD, weights)
  np.testing.assert_allclose(found, nll, rtol=0, atol=5e-6)
  np.testing.assert_array_equal(found_correct, correct)
  d_logits = (probs - np.eye(V)[LABELS]) * weights[..., None]
  np.testing.assert_allclose(d_hidden, d_logits @ HEAD.T, rtol=0, atol=2e-5)
  np.testing.assert_allclose(d_head, np.einsum("btd,btv->dv", HIDDEN, d_logits), rtol=0, atol=2e-5)


def test_bfloat16_hidden_states_are_scored_in_float32():
  hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
  nll, _ = jax.jit(cross_entropy)(hidden, Head(HEAD), LABELS)
  assert nll.dtype == jnp.float32
  logits = np.asarray(hidden, np.float64) @ np.asarray(jnp.asarray(HEAD, jnp.bfloat16), np.float64)
  expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, LABELS[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, expected, rtol=0, atol=5e-6)


def test_logits_far_from_zero():
  head = Head(jnp.array([[100.0, -100.0, 99.0]]))
  nll, correct = cross_entropy(jnp.ones((1, 1, 1)), head, jnp.array([[2]]))
  np.testing.assert_allclose(nll[0, 0], np.log1p(np.exp(1.0)), rtol=0, atol=1e-5)  # one unit of 100 is 7.6e-6
  assert not correct[0, 0]


@pytest.mark.component("norm_head")
@pytest.mark.parametrize("stored", ["io", "oi"])
def test_a_normed_head_is_that_of_rows_of_length_one(stored):
  """A bias and a soft cap come after; a token of no weight at all has the bias for its logit, and a gradient."""
  w = HEAD * np.geomspace(1e-3, 1e3, V, dtype=np.float32)
  w[:, 2] = 0
  bias = RNG.standard_normal(V).astype(np.float32)
  long = w.astype(np.float64)
  unit = long / np.maximum(np.linalg.norm(long, axis=0), 1e-12)
  leaf = Matrix(jnp.asarray(w.T)) if stored == "oi" else jnp.asarray(w)
  logits = jax.jit(lambda w: Head(w, bias, 3.0, normed=True)(HIDDEN))
  error = relative_error(logits(leaf), 3 * np.tanh((HIDDEN.astype(np.float64) @ unit + bias) / 3))
  assert error <= 1e-6
  components.measured("norm_head", "float64", error)
  assert relative_error(Head(leaf, bias, 3.0)(HIDDEN), logits(leaf)) > 0.1
  assert np.isfinite(dense(jax.grad(lambda w: jnp.sum(logits(w)))(leaf))).all()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_bias_and_soft_cap_of_the_head(chunk):
  bias = RNG.standard_normal(V).astype(np.float32)
  nll, correct = jax.jit(cross_entropy, static_argnums=3)(HIDDEN, Head(HEAD, bias, 3.0), LABELS, chunk)
  logits = 3 * np.tanh((HIDDEN.astype(np.float64) @ HEAD + bias) / 3)
  expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, LABELS[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, expected, rtol=0, atol=5e-6)
  np.testing.assert_array_equal(correct, logits.argmax(-1) == LABELS)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_head_of_two_matrices(chunk):
  """Hidden states through [D, E] and [E, V], against float64; gradients reach both."""
  inner = RNG.standard_normal((D, 3)).astype(np.float32)
  w = RNG.standard_normal((3, V)).astype(np.float32)

  def loss(inner, w):
    return jnp.sum(cross_entropy(HIDDEN, Head(w, inner=inner), LABELS, chunk)[0])

  found, (d_inner, d_w) = jax.jit(jax.value_and_grad(loss, (0, 1)))(inner, w)
  narrow = HIDDEN.astype(np.float64) @ inner
  logits = narrow @ w
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  d_logits = probs - np.eye(V)[LABELS]
  np.testing.assert_allclose(found, -np.log((probs * np.eye(V)[LABELS]).sum(-1)).sum(), rtol=1e-6)
  np.testing.assert_allclose(d_w, np.einsum("bte,btv->ev", narrow, d_logits), rtol=0, atol=5e-5)
  np.testing.assert_allclose(
    d_inner, np.einsum("btd,btv,ev->de", HIDDEN, d_logits, w, optimize=True), rtol=0, atol=5e-5
  )
  stored = Head(Matrix(w.T.copy()), inner=Matrix(inner.T.copy()))
  np.testing.assert_allclose(stored(HIDDEN), logits, rtol=0, atol=1e-5)


def test_a_padded_vocabulary_has_no_part_in_anything():
  """Columns and biases beyond the vocabulary, whatever they hold, change no loss and get no gradient."""
  bias = RNG.standard_normal(V).astype(np.float32)
  junk = 50 * RNG.standard_normal((D, 3)).astype(np.float32)

  def run(w, bias, **kwargs):
    head = lambda w, bias: Head(w, bias, 3.0, 0.5, **kwargs)
    loss = lambda w, bias: jnp.sum(cross_entropy(HIDDEN, head(w, bias), LABELS)[0])
    return head(w, bias)(HIDDEN), *jax.jit(jax.value_and_grad(loss, (0, 1)))(w, bias)

  padded = np.concatenate([HEAD, junk], axis=1), np.concatenate([bias, [9, 9, 9]]).astype(np.float32)
  expected, loss, gradients = run(HEAD, bias)
  for w in (padded[0], Matrix(padded[0].T.copy())):
    logits, found, found_gradients = run(w, padded[1], vocab_size=V)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    for one, other in zip(map(dense, found_gradients), gradients, strict=True):
      np.testing.assert_allclose(one[..., :V], other, rtol=0, atol=1e-5)
      np.testing.assert_array_equal(one[..., V:], 0)


def test_the_gradient_of_scores_is_that_of_jaxs_own_rules():
  """The same numbers in the same order: to the last bit, eagerly, where XLA adds what it has multiplied and rounded."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(4 * rng.standard_normal((7, 50)), jnp.float32).at[3, 9].set(60.0)
  labels = jnp.asarray(rng.integers(0, 50, 7), jnp.int32).at[3].set(9)
  by = tuple(jnp.asarray(rng.standard_normal(7), jnp.float32) for _ in range(2))

  def plain(logits):
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0], jax.nn.logsumexp(logits, axis=-1)

  found, back = jax.vjp(lambda x: _label_and_sum(x, labels), logits)
  expected, true_back = jax.vjp(plain, logits)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(back(by)[0], true_back(by)[0])


def test_an_infinite_logit_is_an_infinite_loss():
  logits = jnp.zeros((2, 5)).at[0, 1].set(jnp.inf)
  np.testing.assert_array_equal(_label_and_sum(logits, jnp.array([0, 0]))[1], [np.inf, np.log(np.float32(5))])


def test_a_negative_label_counts_from_the_end_in_the_gradient_too():
  """As arrays are indexed: its loss is that of the last token, and so is its gradient."""
  head = Head(jax.random.normal(jax.random.key(0), (4, 7)))
  hidden = jax.random.normal(jax.random.key(1), (2, 3, 4))
  of = lambda label: jax.grad(lambda x: jnp.sum(cross_entropy(x, head, jnp.full((2, 3), label))[0]))(hidden)
  np.testing.assert_array_equal(of(-1), of(6))
  assert np.any(of(-1) != of(5))
