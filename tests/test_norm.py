"""Norms against float64, their invariances, and the edges of their types."""

import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxllm.errors import ConfigError
from jaxllm.norm import NORMS, BatchNorm, L2Norm, LayerNorm, RMSNorm

D = 64
RNG = np.random.default_rng(0)
WEIGHTS = {
  "scale": (1 + 0.3 * RNG.standard_normal(D)).astype(np.float32),
  "bias": RNG.standard_normal(D).astype(np.float32),
}
UNIT = RNG.standard_normal((5, 7, D)).astype(np.float32)

KINDS = {
  "rms": RMSNorm(),
  "rms 1+w": RMSNorm(scale="1+w"),
  "rms cast, then w": RMSNorm(multiply_in="input"),
  "rms without w": RMSNorm(scale=None),
  "partial rms": RMSNorm(fraction=0.3),
  "layer": LayerNorm(),
  "layer 1+w": LayerNorm(scale="1+w"),
  "layer without bias": LayerNorm(bias=False),
  "layer without w and bias": LayerNorm(scale=None, bias=False),
  "l2": L2Norm(),
}
# name: input, absolute tolerance.  The output is of size 1: what float32 keeps of the input counts.
INPUTS = {
  "unit": (UNIT, 3e-6),
  "mean 1e4, std 1": (UNIT + np.float32(1e4), 3e-6),  # a mean of 64 numbers of 1e4 is held to 1e-3 only
  "small": (UNIT * np.float32(1e-3), 3e-6),
  "large": (UNIT * np.float32(1e15), 3e-6),
  "one row of 1e4": (np.where(np.arange(5)[:, None, None] == 2, np.float32(1e4), 1) * UNIT, 3e-6),
}
each_kind = pytest.mark.parametrize("name", KINDS)


def weights(kind):
  """Of WEIGHTS what the kind has."""
  return {name: WEIGHTS[name] for name in kind.params(D)}


@functools.partial(jax.jit, static_argnums=0)
def apply(kind, p, x):
  return kind(p, x)


def normed(kind, x):
  return np.asarray(apply(kind, weights(kind), x))


def expected(kind, x):
  return oracle.norm(kind, oracle.float64(weights(kind)), np.asarray(x, np.float64))


@each_kind
@pytest.mark.parametrize(
  "case", [pytest.param(c, marks=[pytest.mark.core] * (c == "mean 1e4, std 1")) for c in INPUTS]
)
def test_norm(name, case):
  x, tolerance = INPUTS[case]
  kind = KINDS[name]
  components.measured_close(kind, "float64", normed(kind, x), expected(kind, x), atol=tolerance)


def test_every_norm_is_tested():
  assert {type(kind) for kind in KINDS.values()} == set(NORMS.values())
  assert BatchNorm not in NORMS.values()


@each_kind
def test_norms_start_without_a_gain(name):
  """1 + w from w = 0 and w = 1 are the same function, that of no w."""
  kind = KINDS[name]
  start = {key: init(jax.random.key(0), shape, jnp.float32) for key, (shape, init) in kind.params(D).items()}
  bare = expected(kind, UNIT) if not start else None
  if bare is None:
    fields = {"fraction": kind.fraction} if isinstance(kind, RMSNorm) else {"bias": False}
    bare = expected(type(kind)(kind.eps, None, **fields), UNIT)
  np.testing.assert_allclose(apply(kind, start, UNIT), bare, rtol=0, atol=2e-6)


@each_kind
def test_norm_of_zero(name):
  """A finite value and a finite gradient: eps is inside the root."""
  kind = KINDS[name]
  value = lambda x: jnp.sum(kind(weights(kind), x) ** 2)
  value, gradient = jax.jit(jax.value_and_grad(value))(jnp.zeros((2, D)))
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_gradient_of_an_l2_norm_by_its_root_is_not_a_number_at_zero():
  """What the test above would find: the maximum taken of the length and not of its square."""
  wrong = lambda x: jnp.sum(x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12))
  assert np.all(np.isnan(jax.jit(jax.grad(wrong))(jnp.zeros((2, D)))))


def test_an_l2_norm_with_the_smallest_eps():
  """Whose square is 0 in float32."""
  assert np.all(normed(L2Norm(1e-30), np.zeros((2, D), np.float32)) == 0)


@each_kind
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1e15), ("float16", 6e4)])
def test_norm_of_half_types_is_computed_in_float32(name, dtype, size):
  """One rounding, of the result: squares and sums overflow in float16, and have two digits in bfloat16."""
  x = jnp.asarray(np.where(UNIT > 0, size, -size), dtype)
  out = apply(KINDS[name], weights(KINDS[name]), x)
  assert out.dtype == dtype
  # cast, then w: of the norm, of w and of their product
  roundings = 3 if name == "rms cast, then w" else 1
  half_ulp = 2.0 ** -(8 if dtype == "bfloat16" else 11)
  np.testing.assert_allclose(
    np.asarray(out, np.float64), expected(KINDS[name], x), rtol=1.01 * roundings * half_ulp, atol=1e-6
  )


@each_kind
def test_norm_of_what_float32_cannot_square(name):
  """1e20 squared is infinite: the result is then 0 or the bias, and finite, and so is its gradient."""
  x = jnp.full((2, D), 1e20, jnp.bfloat16)
  kind = KINDS[name]
  value = lambda x: jnp.sum(kind(weights(kind), x).astype(jnp.float32))
  value, gradient = jax.jit(jax.value_and_grad(value))(x)
  assert np.isfinite(value) and np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_eps_is_inside_the_root():
  x = np.full((1, D), 1e-4, np.float32)
  out = apply(RMSNorm(eps=1e-5), {"scale": np.ones(D, np.float32)}, x)
  np.testing.assert_allclose(out, 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-6)  # 0.0316; outside it would be 0.909


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_order_of_cast_and_gain(dtype):
  """Compiled or not, "input" rounds the norm before it multiplies; "float32" does not.

  Small numbers, so that float16 has subnormal ones among them.
  """
  x = jnp.asarray(UNIT * np.where(np.arange(D) % 4, 1, 1e-4), dtype)
  w = jnp.asarray(WEIGHTS["scale"], dtype)
  bare = np.asarray(apply(RMSNorm(scale=None), {}, x))
  twice = np.asarray(bare.astype(np.float32) * np.asarray(w, np.float32)).astype(bare.dtype)
  kind = RMSNorm(multiply_in="input")
  atol = (
    0 if dtype == "bfloat16" else 2 * 2.0**-24
  )  # two of float16's subnormal steps, and nothing above them
  for out in (kind({"scale": w}, x), apply(kind, {"scale": w}, x)):
    np.testing.assert_allclose(np.asarray(out, np.float32), twice.astype(np.float32), rtol=0, atol=atol)
  assert np.mean(np.asarray(apply(RMSNorm(), {"scale": w}, x)) != twice) > 0.1


def test_a_partial_rms_norm_reads_the_first_coordinates():
  """int(0.3 * 64) = 19 of them; what the others are changes nothing but themselves."""
  other = UNIT.copy()
  other[..., 19:] *= 5
  out, changed = (normed(RMSNorm(fraction=0.3), x) for x in (UNIT, other))
  np.testing.assert_array_equal(out[..., :19], changed[..., :19])
  other[..., 18] *= 5
  assert np.abs(normed(RMSNorm(fraction=0.3), other)[..., :18] - out[..., :18]).max() > 0.1


def test_a_layer_norm_of_rows_without_mean_is_an_rms_norm():
  x = UNIT - UNIT.mean(-1, keepdims=True)
  layer, rms = normed(LayerNorm(1e-6, bias=False), x), normed(RMSNorm(1e-6), x)
  np.testing.assert_allclose(layer, rms, rtol=0, atol=2e-6)
  assert np.abs(normed(LayerNorm(1e-6, bias=False), x + 1) - normed(RMSNorm(1e-6), x + 1)).max() > 0.1


# The table of Zhang and Sennrich (2019), as in their README: does y = norm(x W) stay as it is?
CHANGES = {
  "all weights times 3": (lambda x, w: (x, 3 * w), "BN LN RMS"),
  "all columns of the weights moved alike": (lambda x, w: (x, w + w[:, :1]), "LN"),
  "one column of the weights times 3": (lambda x, w: (x, w * np.where(np.arange(D) == 5, 3, 1)), "BN"),
  "all data times 3": (lambda x, w: (3 * x, w), "BN LN RMS"),
  "all data moved alike": (lambda x, w: (x + x[0, 0], w), "BN"),
  "one sample times 3": (lambda x, w: (x * np.where(np.arange(5) == 2, 3, 1)[:, None, None], w), "LN RMS"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm", ["BN", "LN", "RMS"])
def test_invariances(norm, change):
  """In float64, which the norms keep, and without eps to speak of: rounding of 1e-16 grown by sums of 24 terms."""
  kind = {"BN": BatchNorm, "LN": LayerNorm, "RMS": RMSNorm}[norm](eps=1e-30)
  rng = np.random.default_rng(1)
  x, w = rng.standard_normal((5, 7, 24)), rng.standard_normal((24, D))
  change, invariant = CHANGES[change]
  new_x, new_w = change(x, w)
  with jax.enable_x64(True):
    before, after = (apply(kind, oracle.float64(weights(kind)), x @ w) for x, w in ((x, w), (new_x, new_w)))
    assert before.dtype == np.float64
    moved = np.abs(np.asarray(after - before)).max()
  assert moved <= 1e-9 if norm in invariant.split() else moved > 0.1


@pytest.mark.parametrize("name", [*KINDS, "batch"])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_token_sees_another(name, axis):
  """Neither other rows of the batch, nor later tokens or padding; statistics over the batch would see all of them."""
  kind = KINDS.get(name, BatchNorm())
  other = UNIT.copy()
  if axis == 0:
    other[1:] = 9
  else:
    other[:, 4:] = 0
  kept = np.s_[:1] if axis == 0 else np.s_[:, :4]
  moved = np.abs(normed(kind, other)[kept] - normed(kind, UNIT)[kept]).max()
  assert moved > 0.1 if name == "batch" else moved == 0


@pytest.mark.component("batch")
def test_batch_norm():
  x = UNIT.astype(np.float64)
  standard = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
  np.testing.assert_allclose(
    normed(BatchNorm(), UNIT), standard * WEIGHTS["scale"] + WEIGHTS["bias"], rtol=0, atol=2e-6
  )


POSITIVE = ("a finite number above 0", 0.0, -1.0, float("nan"), float("inf"), "1e-5", True)
SCALE = ("one of w, 1+w, None", "w+1", "", 1, False)
BAD = [
  *((cls, "eps", POSITIVE) for cls in (*NORMS.values(), BatchNorm)),
  (RMSNorm, "scale", SCALE),
  (LayerNorm, "scale", SCALE),
  (LayerNorm, "bias", ("one of True, False", None, 1, "no")),
  (RMSNorm, "multiply_in", ("one of float32, input", "bfloat16", None)),
  (RMSNorm, "fraction", POSITIVE),
  (RMSNorm, "fraction", ("at most 1", 1.5)),
]


@pytest.mark.parametrize(("cls", "field", "case"), BAD)
def test_bad_fields_are_named(cls, field, case):
  wanted, *bads = case
  for bad in bads:
    with pytest.raises(ConfigError) as error:
      cls(**{field: bad})
    assert str(error.value) == f"{cls.__name__}.{field}: found {bad!r}, expected {wanted}"


def test_a_fraction_of_nothing_is_named():
  with pytest.raises(ConfigError, match=r"RMSNorm.fraction: found 0.01, which is less than one of 64 coord"):
    RMSNorm(fraction=0.01)(weights(RMSNorm()), UNIT)
