"""What each policy computes in, keeps and skips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from jaxllm import quant, tree
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train import data, loop, lora, step
from jaxllm.train.loop import DivergedError
from jaxllm.train.loss_scale import LOSS_SCALES, LossScale
from jaxllm.train.precision import POLICIES, Policy

MODEL = Transformer(train_cases.CFG)
SCALED = dataclasses.replace(
  POLICIES["O2"], loss_scale=dataclasses.replace(LOSS_SCALES["megatron"], initial=2.0**22)
)


def batch(number):
  return data.batch(train_cases.TEXT, 3, number, train_cases.BATCH, train_cases.LENGTH)


def types(params):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


@pytest.mark.core
@pytest.mark.parametrize(
  ("name", "weights", "norms", "master"),
  [
    ("model", "float32", "float32", False),
    ("O0", "float32", "float32", False),
    ("O1", "float32", "float32", False),
    ("O2", "float16", "float32", True),
    ("O3", "float16", "float16", False),
    ("bf16", "float32", "float32", False),
    ("bf16_master", "bfloat16", "float32", True),
    ("bf16_pure", "bfloat16", "bfloat16", False),
  ],
)
def test_what_a_state_holds(name, weights, norms, master):
  """Before a step; `test_skipped_steps` and the resumed runs see that steps keep these types."""
  state = step.init_state(MODEL, train_cases.config(2, precision=POLICIES[name]), 0, tree_of())
  for path, leaf in tree.flatten(state["params"]).items():
    assert leaf.dtype == (norms if "norm/" in path else weights), path
  assert ("master" in state) == master and ("loss_scale" in state) == (name in ("O1", "O2"))
  assert types(state["opt"]) == {"float32", "int32"} and types(state.get("master", {})) <= {"float32"}
  if master:  # the parameters are the master weights, rounded
    for new, old in zip(*map(jax.tree.leaves, (state["params"], state["master"])), strict=True):
      np.testing.assert_array_equal(new, np.asarray(old).astype(new.dtype))


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
        yield from equations(inner)


@pytest.mark.parametrize(
  ("name", "wanted"), [("O0", "float32"), ("O1", "float16"), ("O2", "float16"), ("bf16", "bfloat16")]
)
def test_products_are_of_the_compute_type_and_sums_are_float32(name, wanted):
  """softmax, norm statistics, the loss: every exponential, logarithm, root and sum of the forward pass."""
  policy = POLICIES[name]
  model = policy.model(MODEL)
  weights = policy.stored(tree_of())

  def loss(p):
    hidden, _ = model.apply({"params": p}, batch(0)[:, :-1], logits=None)
    return jnp.mean(cross_entropy(hidden, policy.logits(head(model.cfg, p)), batch(0)[:, 1:])[0])

  found = list(equations(jax.make_jaxpr(loss)(weights).jaxpr))
  kinds = {str(eqn.primitive) for eqn in found}
  assert {"exp", "log", "rsqrt", "reduce_sum", "reduce_max", "dot_general"} <= kinds
  for eqn in found:
    kind, dtypes = str(eqn.primitive), {str(x.aval.dtype) for x in eqn.invars}
    if kind in ("exp", "log", "rsqrt", "sqrt", "reduce_sum", "reduce_max", "logistic"):
      assert dtypes <= {"float32", "int32"}, eqn
    if kind == "dot_general":
      assert dtypes == {wanted} and eqn.outvars[0].aval.dtype == "float32", eqn


@functools.cache
def _weights():
  return jax.device_get(jax.jit(MODEL.init)(jax.random.key(5), batch(0)[:, :-1])["params"])


def tree_of():
  return jax.tree.map(jnp.asarray, _weights())


def test_o3_is_a_cast_of_everything():
  config = train_cases.config(4, precision=POLICIES["O3"])
  half = jax.tree.map(lambda x: x.astype(jnp.float16), tree_of())
  model = Transformer(dataclasses.replace(train_cases.CFG, dtype="float16"))

  def loss_of(p):
    hidden, _ = model.apply({"params": p}, batch(0)[:, :-1], logits=None)
    logits = jax.lax.reduce_precision(head(model.cfg, p)(hidden), 5, 10)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch(0)[:, 1:, None], axis=-1))

  loss, expected = jax.jit(jax.value_and_grad(loss_of))(half)
  found_loss, found = jax.jit(step.make_gradient(MODEL, config))(half, batch(0))
  np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
  assert types(expected) == {"float16"} and types(found) == {"float32"}
  for path, leaf in tree.flatten(found).items():
    truth = np.asarray(tree.flatten(expected)[path], np.float32)
    np.testing.assert_allclose(leaf, truth, rtol=0, atol=2**-10 * np.abs(truth).max(), err_msg=path)
  rounded = jax.jit(POLICIES["O3"].logits(lambda x: x))(jnp.float32([1 + 2**-12, 0.1, 65504.0]))
  np.testing.assert_array_equal(rounded, np.float32(np.float16([1 + 2**-12, 0.1, 65504.0])))


def test_a_scale_by_a_power_of_two_changes_no_bit():
  """Nothing is clipped in either run, as gradients are divided before their norm, some 3, is compared."""
  plain = train_cases.config(8, learning_rate=0.02, clip_norm=100.0)
  scaled = dataclasses.replace(plain, precision=Policy(loss_scale=LossScale(2.0**20)))
  states = [step.init_state(MODEL, config, 0, tree_of()) for config in (plain, scaled)]
  programs = [step.make_step(MODEL, config) for config in (plain, scaled)]
  for i in range(8):
    (states[0], a), (states[1], b) = (
      run(state, batch(i)) for run, state in zip(programs, states, strict=True)
    )
    assert a == b
  assert int(states[1].pop("loss_scale")["clean"]) == 8
  assert train_cases.bytes_of(states[0]) == train_cases.bytes_of(states[1])


@pytest.mark.core
def test_skipped_steps_leave_parameters_moments_and_their_count_as_they_are():
  """From 2^22, with hysteresis, down to where gradients of float16 are finite; the place in the data goes on."""
  config = train_cases.config(25, precision=SCALED, learning_rate=0.02, warmup=0.0)
  state, run = step.init_state(MODEL, config, 0, tree_of()), step.make_step(MODEL, config)
  gradient = jax.jit(step.make_gradient(MODEL, config))
  skipped, losses = [], []
  for i in range(25):
    before, scale = train_cases.bytes_of(state), state["loss_scale"]["scale"]
    grads = jax.device_get(gradient(state["params"], batch(i), scale)[1])
    overflow = not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    state, loss = run(state, batch(i))
    after = train_cases.bytes_of(state)
    held = [path for path in before if path.startswith(("['params']", "['master']", "['opt']"))]
    assert len(held) > 60
    same = [before[path] == after[path] for path in held]
    assert all(same) if overflow else sum(same) < 3  # a norm whose gradient is rounded to 0 may stay
    assert int(state["step"]) == i + 1 and (int(state["loss_scale"]["skipped"]) > 0) == overflow
    skipped.append(overflow)
    losses.append(float(loss))
  assert (
    2 < sum(skipped) < 15 and not skipped[-1] and np.all(np.isfinite(losses)) and losses[-1] < 0.6 * losses[0]
  )
  counts = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt"])
    if "count" in jax.tree_util.keystr(path)
  ]
  assert {int(count) for count in counts} == {25 - sum(skipped)}  # the schedule's too
  assert types(state["params"]) == {"float16", "float32"}


@pytest.mark.parametrize(
  "policy", [POLICIES["model"], dataclasses.replace(POLICIES["O0"], loss_scale=LOSS_SCALES["static"])]
)
def test_the_norm_of_a_gradient_is_before_scale_and_clip(policy):
  """Of the mean over all labels, in parts or not, whatever the loss scale and the clip."""
  config = train_cases.config(1, precision=policy, accumulate=2, clip_norm=1e-3)
  state = step.init_state(MODEL, config, 0, tree_of())
  tokens = batch(0)

  def loss(params):
    hidden, _ = MODEL.apply({"params": params}, tokens[:, :-1], logits=None)
    logits = head(MODEL.cfg, params)(hidden)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

  grads = jax.tree.leaves(jax.grad(loss)(state["params"]))
  expected = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in grads))
  _, told = step.make_step(MODEL, config, metrics=True)(state, tokens)
  assert (
    float(told["grad_norm"]) == pytest.approx(expected, rel=1e-4) and told["labels"] == tokens[:, 1:].size
  )


def test_the_rate_counts_updates():
  """A step that is skipped has the rate that the next one has, and metrics tell it."""
  config = train_cases.config(12, precision=SCALED, warmup=0.5)
  state, run = step.init_state(MODEL, config, 0, tree_of()), step.make_step(MODEL, config, metrics=True)
  updates, skipped = 0, 0
  for i in range(12):
    state, told = run(state, batch(i))
    assert float(told["learning_rate"]) == pytest.approx(float(config.schedule()(updates)), rel=1e-6)
    updates, skipped = updates + 1 - int(told["skipped"]), skipped + int(told["skipped"])
    assert int(told["updates"]) == updates
  assert 2 < skipped < 10


def constant_gradient(monkeypatch, grads):
  """A step whose gradient is given: of the reduction type, as `make_gradient` has it."""
  monkeypatch.setattr(step, "make_gradient", lambda *_: lambda *_: (jnp.float32(1), grads()))


@pytest.mark.parametrize(
  ("name", "moves"), [("bf16_master", True), ("bf16_pure", False), ("O2", True), ("O3", False)]
)
def test_small_updates_add_up_in_master_weights_only(monkeypatch, name, moves):
  """A thousand steps of 1e-4 from 1: half the last place is 2^-9 in bfloat16, 2^-12 in float16."""
  w = {"layers": {"0": {"attn": {"q": {"w": jnp.ones((2, 3))}}}}}
  constant_gradient(monkeypatch, lambda: jax.tree.map(jnp.ones_like, w))
  config = step.TrainConfig(
    1001, 4, 8, learning_rate=1e-4, weight_decay=0.0, warmup=0.0, final_ratio=1.0, precision=POLICIES[name]
  )
  state, run = step.init_state(MODEL, config, 0, w), step.make_step(MODEL, config)
  for _ in range(1000):
    state, _ = run(state, batch(0))
  found = np.float64(jax.tree.leaves(state["params"])[0])
  if moves:
    np.testing.assert_allclose(jax.tree.leaves(state["master"])[0], 0.9, rtol=1e-4)
    np.testing.assert_allclose(found, 0.9, rtol=2**-9)
  else:
    np.testing.assert_array_equal(found, 1.0)


def test_a_run_that_is_cut_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
  """Cut at step 8 of 16 while the scale comes down, so that master weights, scale and hysteresis all come back."""
  monkeypatch.setattr(loop, "SAVE_EVERY", 8)
  monkeypatch.setattr(loop, "make_step", train_cases.compiled_step)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)

  def cut():
    raise KeyboardInterrupt

  whole, _ = train_cases.train(tmp_path / "whole", 16, precision=SCALED, accumulate=2)
  with pytest.raises(KeyboardInterrupt):
    train_cases.train(tmp_path / "cut", 16, check_stop=cut, precision=SCALED, accumulate=2)
  state, starts = train_cases.train(tmp_path / "cut", 16, precision=SCALED, accumulate=2)
  assert (
    starts == [8] and int(state["loss_scale"]["left"]) < 2 and float(state["loss_scale"]["scale"]) < 2.0**21
  )
  assert train_cases.bytes_of(state) == train_cases.bytes_of(whole)


def test_factors_of_lora_have_the_policys_types_and_all_else_stays():
  base = quant.apply(tree_of(), quant.SCHEMES["int8"]())
  config = train_cases.config(8, precision=POLICIES["O2"], warmup=0.0, accumulate=2)
  state = step.init_state(MODEL, config, 0, lora.apply(base, rank=2, alpha=4.0, key=jax.random.key(0)))
  before, run = train_cases.bytes_of(lora.unmerge(state["params"])), step.make_step(MODEL, config)
  assert types(lora.adapters(state["params"])) == {"float16"} and types(state["master"]) == {"float32"}
  for i in range(3):
    state, loss = run(state, batch(i))
  assert np.isfinite(loss) and int(state["loss_scale"]["clean"]) == 3
  assert train_cases.bytes_of(lora.unmerge(state["params"])) == before
  factors = lora.adapters(state["params"])
  assert types(factors) == {"float16"} and all(np.any(x) for x in jax.tree.leaves(factors))


def test_a_run_that_only_skips_is_stopped(tmp_path):
  endless = Policy(compute="float16", loss_scale=LossScale(2.0**60, growth=1.0, backoff=1.0))
  with pytest.raises(
    DivergedError, match=r"overflowed in all of the last 75 steps, to 75, with a loss scale of 1.15292e\+18"
  ):
    train_cases.train(tmp_path, 100, precision=endless)


def test_a_type_that_is_none_is_refused():
  for fields in (
    dict(compute="float8"),
    dict(parameters=((".+", "int8"),)),
    dict(reduction="half"),
    dict(output=""),
  ):
    with pytest.raises(ConfigError, match="Policy: found"):
      Policy(**fields)
