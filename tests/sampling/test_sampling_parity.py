"""Element by element against transformers' logits processors."""

import components
import generation_table
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import distribution

from jaxllm.sampling import Chain, Greedy, Temperature, TopK, TopP

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")

ROWS, V = 1000, 50
LOGITS = (3 * np.random.default_rng(0).normal(size=(ROWS, V))).astype(np.float32)
TIED = np.round(LOGITS)

CASES = [
  pytest.param(0.7, 0, 1.0, marks=pytest.mark.core),
  (2.0, 0, 1.0),
  (1.0, 1, 1.0),
  (1.0, 7, 1.0),
  (1.0, 49, 1.0),
  (1.0, 80, 1.0),
  (1.0, 0, 0.0),
  (1.0, 0, 0.3),
  pytest.param(1.0, 0, 0.9, marks=pytest.mark.core),
  (1.0, 0, 0.999),
  (0.8, 20, 0.95),
  (1.5, 50, 0.5),
  (0.3, 3, 0.7),
]


def theirs(logits, temperature, k, p):
  scores = torch.tensor(logits)
  steps = [process.TemperatureLogitsWarper(temperature)]
  steps += [process.TopKLogitsWarper(k)] if k else []
  steps += [process.TopPLogitsWarper(p)] if p < 1 else []  # as generate() does: 1.0 adds no processor
  for step in steps:
    scores = step(None, scores)
  return scores.numpy()


@pytest.mark.parametrize(("temperature", "k", "p"), CASES)
def test_the_filtered_logits_are_those_of_transformers(temperature, k, p):
  acting = [
    name for name, acts in (("temperature", temperature != 1), ("top_k", k), ("top_p", p < 1)) if acts
  ]
  generation_table.about("samplers", ", ".join(acting))
  sampler = Chain((Temperature(temperature), TopK(k), TopP(p)))
  ours = np.asarray(sampler.filter(jnp.asarray(LOGITS), sampler.init(None, None)))
  # Where p meets a cumulative sum to within float32 rounding, either set is right.
  decided = np.array([distribution(row, temperature, k, p)[1] > 1e-6 for row in LOGITS])
  assert decided.mean() > 0.98
  expected = theirs(LOGITS, temperature, k, p)
  np.testing.assert_array_equal(np.isfinite(ours[decided]), np.isfinite(expected[decided]))
  # torch divides by the temperature and we multiply by its inverse: two roundings of 2^-24.
  np.testing.assert_allclose(ours[decided], expected[decided], rtol=0 if temperature == 1 else 1.2e-7)
  kept = np.isfinite(expected) & decided[:, None]
  error = np.max(np.abs(ours[kept] / expected[kept] - 1))
  components.measured([*acting, "chain"], "transformers", error)
  numbers = dict(worst_difference=error, logits=ours[decided].size, cases=1)
  generation_table.measured("samplers", ", ".join(acting), **numbers)


def test_greedy_is_the_argmax_of_torch():
  """Of rows whose largest logit is one; of equal ones torch names no order."""
  ours, _ = Greedy()(None, jnp.asarray(LOGITS), ())
  np.testing.assert_array_equal(ours, torch.argmax(torch.tensor(LOGITS), -1))
  components.measured("greedy", "torch", 0)
  generation_table.measured("samplers", "greedy", worst_difference=0.0, logits=LOGITS.size, cases=1)


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_top_k_keeps_the_ties_that_transformers_keeps(k):
  ours = np.asarray(TopK(k).filter(jnp.asarray(TIED), ()))
  np.testing.assert_array_equal(ours, theirs(TIED, 1.0, k, 1.0))
  assert (np.isfinite(ours).sum(-1) > k).any()
  generation_table.measured("samplers", "top_k", worst_difference=0.0, logits=ours.size, cases=1)


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99])
def test_top_p_keeps_as_many_ties_as_transformers(p):
  ours = np.isfinite(TopP(p).filter(jnp.asarray(TIED), ()))
  decided = np.array([distribution(row, p=p)[1] > 1e-6 for row in TIED])
  assert decided.mean() > 0.99
  np.testing.assert_array_equal(ours.sum(-1)[decided], np.isfinite(theirs(TIED, 1.0, 0, p)).sum(-1)[decided])
