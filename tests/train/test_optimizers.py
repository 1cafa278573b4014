"""Optimizers beside torch's and formulas in NumPy; schedules beside closed forms; what a run's record says of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from jaxllm import tree
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.nn import Transformer
from jaxllm.train import loop
from jaxllm.train.optimizers import OPTIMIZERS, Adafactor, AdamW, Lion, Muon
from jaxllm.train.precision import POLICIES
from jaxllm.train.schedules import SCHEDULES, WarmupStableDecay
from jaxllm.train.step import TrainConfig, init_state

RATE, DECAY, STEPS = 0.03, 0.2, 6
SHAPES = {
  "embed": (12, 8),
  "layers/0/attn/q/w": (8, 6),
  "layers/0/mlp/up/w": (8, 20),
  "layers/0/attn_norm/scale": (8,),
}
rng = np.random.default_rng(0)
START = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
GRADS = [
  {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
  for _ in range(STEPS)
]


def found_after(rule, start=START, grads=GRADS, **kwargs):
  """Parameters after a constant rate's steps, nothing clipped."""
  settings = dict(
    learning_rate=RATE, weight_decay=DECAY, warmup=0.0, clip_norm=1e9, rate=SCHEDULES["constant"]()
  )
  config = TrainConfig(100, 1, 1, rule=rule, **settings | kwargs)
  optimizer = config.optimizer()

  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  params = tree.unflatten(start)
  state = optimizer.init(params)
  for g in grads:
    params, state = step(params, state, tree.unflatten(g))
  return tree.flatten(jax.device_get(params))


def decayed(path):
  return path.endswith("/w")


def by_torch(make):
  torch = pytest.importorskip("torch")
  weights = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in START.items()}
  groups = [{"params": [w], "weight_decay": DECAY * decayed(path)} for path, w in weights.items()]
  optimizer = make(torch, groups)
  for g in GRADS:
    for path, w in weights.items():
      w.grad = torch.tensor(g[path])
    optimizer.step()
  return {path: w.detach().numpy() for path, w in weights.items()}


def adamw_reference():
  return by_torch(lambda torch, groups: torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-8))


def adafactor_reference():
  return by_torch(lambda torch, groups: torch.optim.Adafactor(groups, lr=RATE, eps=(1e-15, 1e-3)))


def lion_reference():
  """Algorithm 2 of the paper, in float64."""
  out = {}
  for path, value in START.items():
    w, m = np.float64(value), 0.0
    for g in (np.float64(g[path]) for g in GRADS):
      w = w - RATE * (np.sign(0.9 * m + 0.1 * g) + DECAY * decayed(path) * w)
      m = 0.98 * m + 0.02 * g
    out[path] = w
  return out


def orthogonal(m):
  """Five steps of the quintic with the author's coefficients, in float64."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = m / (np.linalg.norm(m) + 1e-8)
  x = x.T if m.shape[0] > m.shape[1] else x
  for _ in range(5):
    s = x @ x.T
    x = a * x + (b * s + c * s @ s) @ x
  return x.T if m.shape[0] > m.shape[1] else x


def muon_reference():
  """The author's momentum (Nesterov's, without the bias), and sizes as Liu et al. (2025) have them; the rest is AdamW's."""
  out = adamw_reference()
  for path in filter(decayed, START):
    w, m = np.float64(START[path]), 0.0
    for t, g in enumerate((np.float64(g[path]) for g in GRADS), 1):
      m = 0.95 * m + 0.05 * g
      nesterov = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
      w = w - RATE * (0.2 * np.sqrt(max(w.shape)) * orthogonal(nesterov) + DECAY * w)
    out[path] = w
  return out


ROWS = {
  "adamw": (AdamW(), adamw_reference),
  "lion": (Lion(), lion_reference),
  "adafactor": (Adafactor(factored_from=1), adafactor_reference),
  "muon": (Muon(), muon_reference),
}


@pytest.mark.core
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_six_steps_are_those_of_another_implementation(name):
  assert ROWS.keys() == OPTIMIZERS.keys()
  rule, reference = ROWS[name]
  found, expected = found_after(rule), reference()
  for path in START:
    # of how far a weight went; Newton-Schulz steps raise small singular values, with their rounding, 3.4-fold each
    np.testing.assert_allclose(
      found[path], expected[path], rtol=0, atol=2e-4 * np.abs(expected[path] - START[path]).max()
    )
  undecayed = found_after(rule, weight_decay=0.0)
  assert {path for path in START if np.any(undecayed[path] != found[path])} == set(filter(decayed, START))


def test_muon_turns_matrices_by_rules_and_stacked_ones_one_by_one():
  matrix = "layers/0/mlp/up/w"
  one = found_after(Muon())
  for path in set(START) - set(filter(decayed, START)):
    np.testing.assert_array_equal(one[path], found_after(AdamW())[path])
  stack = lambda values: {"blocks/0/mlp/up/w": np.stack([values[matrix], 2 * values[matrix][::-1]])}
  found = found_after(Muon(), stack(START), [stack(g) for g in GRADS])["blocks/0/mlp/up/w"]
  np.testing.assert_allclose(found[0], one[matrix], rtol=1e-4, atol=1e-5)
  same = found_after(Muon(rules=((".+", False),)))
  for path, value in found_after(AdamW()).items():
    np.testing.assert_array_equal(same[path], value)


def test_muon_leaves_routers_to_adam():
  rules = Muon().rules
  for path, turned in {
    "layers/3/mlp/router/w": False,
    "layers/3/mlp/experts/up/w": True,
    "head": False,
    "blocks/0/attn/o/w": True,
  }.items():
    assert tree.first_match(rules, path) == turned


@pytest.mark.parametrize(
  "name",
  [pytest.param("lion", marks=pytest.mark.slow), pytest.param("adafactor", marks=pytest.mark.slow), "muon"],
)
def test_it_trains_and_comes_back_from_a_checkpoint(tmp_path, monkeypatch, name):
  monkeypatch.setattr(loop, "SAVE_EVERY", 10)
  monkeypatch.setattr(loop, "make_step", train_cases.compiled_step)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)
  losses = []
  kwargs = dict(rule=OPTIMIZERS[name](), learning_rate=0.003 if name == "lion" else 0.03)

  def stop():
    raise KeyboardInterrupt

  state, _ = train_cases.train(
    tmp_path / "whole", 20, on_step=lambda step, loss: losses.append(float(loss)), **kwargs
  )
  assert losses[-1] < 0.85 * losses[0], losses
  with pytest.raises(KeyboardInterrupt):
    train_cases.train(tmp_path / "cut", 20, check_stop=stop, **kwargs)
  cut, starts = train_cases.train(tmp_path / "cut", 20, **kwargs)
  assert starts == [10] and train_cases.bytes_of(cut) == train_cases.bytes_of(state)
  with pytest.raises(CheckpointError):
    train_cases.train(tmp_path / "cut", 20)  # AdamW's


@pytest.mark.parametrize(
  ("name", "shares"),
  [
    ("cosine", {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1, 500: 0.1}),
    ("linear", {0: 0, 5: 0.5, 10: 1, 35: 0.775, 60: 0.55, 110: 0.1, 500: 0.1}),
    ("constant", {0: 0, 5: 0.5, 10: 1, 60: 1, 500: 1}),
    ("wsd", {0: 0, 5: 0.5, 10: 1, 88: 1, 99: 0.55, 110: 0.1, 500: 0.1}),
    ("inverse_sqrt", {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3, 1000: 0.1}),
  ],
)
def test_schedules(name, shares):
  config = TrainConfig(110, 1, 1, learning_rate=0.5, warmup=1 / 11, final_ratio=0.1, rate=SCHEDULES[name]())
  for step, share in shares.items():
    np.testing.assert_allclose(config.schedule()(step), 0.5 * share, rtol=1e-6, err_msg=str(step))
  without = dataclasses.replace(config, warmup=0.0)
  assert float(without.schedule()(0)) == 0.5


def test_a_schedule_that_does_not_fit_is_refused():
  with pytest.raises(ConfigError, match=r"5 steps of warm-up and 6 of decay, expected at most 10"):
    TrainConfig(10, 1, 1, warmup=0.5, rate=WarmupStableDecay(0.6)).schedule()
  with pytest.raises(ConfigError, match=r"WarmupStableDecay.decay"):
    WarmupStableDecay(0)


OLD = dict(
  **dict(steps=3, batch_size=4, length=8, learning_rate=2e-3, final_ratio=0.02, warmup=0.05),
  **dict(weight_decay=0.1, beta1=0.9, beta2=0.98, clip_norm=1.0),
)


def test_the_record_of_a_run_is_what_it_was_before_there_was_a_choice():
  assert train_cases.config(3).record() == OLD
  state = init_state(Transformer(train_cases.CFG), train_cases.config(3), 0)
  assert state.keys() == {"step", "params", "opt"}


def test_the_record_tells_values_apart():
  records = [
    train_cases.config(3, **{field: value}).record()
    for field, value in (
      *(("rule", make()) for make in OPTIMIZERS.values()),
      *(("rate", make()) for make in SCHEDULES.values()),
      *(("precision", policy) for policy in POLICIES.values()),
      *(("accumulate", 2), ("remat", "full"), ("z_loss", 1e-4)),
    )
  ]
  texts = {repr(record) for record in records}
  assert len(texts) == len(records) - 2  # AdamW, cosine and the model's types are the defaults
  assert records[1] == OLD | {"rule": {"type": "Lion"}}


@pytest.mark.parametrize(
  ("field", "value"), [("accumulate", 3), ("accumulate", 0), ("remat", "some"), ("z_loss", -1.0)]
)
def test_fields_that_cannot_be_run_are_refused(field, value):
  with pytest.raises(ConfigError, match=field):
    train_cases.config(3, **{field: value})


@pytest.mark.parametrize("rule", [Adafactor(), Adafactor(factored_from=4), Muon(), Lion()])
def test_stacked_layers_are_as_many_layers(rule):
  """Of weights and gradients of other sizes in each layer."""
  sizes = {"layers/0": 0.1, "layers/1": 3.0}
  spread = lambda values: {
    path.replace("layers/0", layer): np.float32(size * x)
    for layer, size in sizes.items()
    for path, x in values.items()
  }
  stacked = lambda values: tree.flatten(tree.stack_layers(tree.unflatten(values), 1))
  start, grads = spread(START), [spread(g) for g in GRADS]
  expected = stacked(found_after(rule, start, grads))
  found = found_after(rule, stacked(start), [stacked(g) for g in grads])
  assert found.keys() == expected.keys()
  for path, x in found.items():
    np.testing.assert_allclose(x, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)
