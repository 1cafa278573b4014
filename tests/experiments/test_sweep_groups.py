"""The cells of a group: one program for all RoPE scalings, and each value as it is defined."""

import dataclasses

import jax
import numpy as np
import pytest
import sweep_case

from experiments.extrapolation import evaluate
from experiments.extrapolation.models import Models
from experiments.extrapolation.trained import Trained, model_config
from jaxllm.evaluate import text
from jaxllm.evaluate.windows import cut_windows
from jaxllm.nn import Transformer
from jaxllm.position import LogN
from jaxllm.study import methods

COMPILED = "/jax/core/compile/backend_compile_duration"
TEXT = np.random.default_rng(0).integers(32, 127, 2000).astype(np.uint8)
compilations = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **kwargs: compilations.append(event) if event == COMPILED else None
)


class Untrained(Models):
  """Random parameters, large enough for attention to be sharp."""

  in_length = methods.IN_LENGTH_WINDOWS

  def __init__(self, settings):
    self.schemes = {name: methods.SCHEMES[name] for name in settings.schemes}
    self.configs = {
      s: model_config(settings, how, how.position, "float32") for s, how in self.schemes.items()
    }
    self.tested, self.text = self.configs, text.of_bytes(TEXT)

  def params(self, scheme, seed):
    cfg = self.configs[scheme]
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
      lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32) * 0.5), shapes
    )


def groups_of(settings):
  chosen = (
    [methods.SCHEMES[name] for name in settings.schemes],
    settings.methods,
    settings.metrics,
    settings.factors,
  )
  return methods.plan(*chosen, settings.train_length, settings.lengths, settings.seeds, settings.windows)


def sweep(*args):
  """(settings, rows of all groups, in the order of the plan)."""
  settings = sweep_case.settings_of(*sweep_case.TINY, *args)
  trained = Untrained(settings)
  return settings, [
    row for group in groups_of(settings) for row in evaluate.compute(settings, trained, group)
  ]


def values(rows, **wanted):
  """The values of the rows that have these columns."""
  return [row["value"] for row in rows if all(row[name] == item for name, item in wanted.items())]


@pytest.fixture(scope="module")
def small_operations():
  """Compiles what stacks and cuts arrays around the programs that are counted."""
  sweep("--schemes=rope", "--methods=pi,rerope", "--lengths=16,32", "--metrics=bpb", "--mlp_dim=8")


def compiled(mlp_dim, *args):
  """Compilations of a sweep with a model that no other test has."""
  compilations.clear()
  sweep("--lengths=32", "--metrics=bpb", f"--mlp_dim={mlp_dim}", *args)
  return len(compilations)


@pytest.mark.core
def test_twenty_methods_compile_as_often_as_five(small_operations):
  five = compiled(10, "--schemes=rope", "--methods=pi,ntk,ntk_fixed,ntk_mixed,yarn")
  twenty = compiled(12, "--schemes=rope", "--methods=pi,ntk,ntk_fixed,ntk_mixed,yarn", "--factors=2,4,6,8")
  assert five == twenty > 0


def test_log_n_and_its_training_compile_nothing_more(small_operations):
  plain = compiled(16, "--schemes=rope", "--methods=none,pi,ntk,yarn,dynamic_ntk")
  assert (
    compiled(14, "--schemes=rope,rope_logn", "--methods=none,logn,ntk_logn,yarn,dynamic_ntk") == plain > 0
  )


def test_every_method_is_the_trained_model_at_the_trained_length():
  _, rows = sweep("--schemes=rope", "--methods=all", "--lengths=16,32", "--metrics=bpb_last")
  assert len(set(values(rows, length=16, metric="bpb_last"))) == 1
  assert len(values(rows, length=16, metric="bpb_last")) == len(methods.METHODS)
  assert len(set(values(rows, length=32, metric="bpb_last"))) == len(methods.METHODS)


def test_given_factors_act_at_the_trained_length_too():
  args = ("--schemes=rope", "--methods=none,pi,yarn", "--factors=1,4", "--lengths=16", "--metrics=bpb")
  _, rows = sweep(*args)
  trained = values(rows, method="none", metric="bpb")
  assert values(rows, factor=1.0, metric="bpb") == trained * 3
  assert len({*trained, *values(rows, factor=4.0, metric="bpb")}) == 3


@pytest.fixture(scope="module")
def measured():
  return sweep("--schemes=rope,rope_logn,alibi", "--methods=all", "--lengths=40")


def score(cfg, params, tokens):
  """(bits, hits) of a model by itself, in float64 from its logits."""
  tables, model = cfg.rope_tables(seq_len=tokens.shape[1] - 1), Transformer(cfg)
  apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, rope=tables)[0])
  logits, labels = np.asarray(apply(tokens[:, :-1]), np.float64), tokens[:, 1:]
  log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  bits = (log_sum - np.take_along_axis(logits, labels[..., None], -1)[..., 0]) / np.log(2)
  return bits, logits.argmax(-1) == labels


@pytest.mark.parametrize(
  ("scheme", "name"),
  [
    ("rope", "ntk_mixed_logn"),
    ("rope", "dynamic_ntk"),
    ("rope", "rerope_logn"),
    ("rope", "llama3"),
    ("rope", "leaky_rerope"),
    ("rope", "self_extend"),
    ("rope_logn", "streaming"),
    ("rope_logn", "none"),
    ("alibi", "logn"),
  ],
)
def test_a_cell_is_what_the_model_alone_gives(measured, scheme, name):
  settings, rows = measured
  trained = Untrained(settings)
  params, cfg, method, length = trained.params(scheme, 0), trained.configs[scheme], methods.METHODS[name], 40
  factor = length / 16 if method.stretches else 1.0
  if method.position:
    cfg = cfg.with_position(method.position, **({"factor": factor} if method.stretches else {}))
  if method.log_n:
    cfg = dataclasses.replace(cfg, query_scale=LogN(16, floor=1.0))
  windows = cut_windows(TEXT, length, max(settings.lengths), settings.windows)
  repeated = np.tile(windows[:, -16:], 3)[:, -length - 1 :]
  bits, hits = score(cfg, params, windows)
  expected = {
    "bpb": bits.mean(),
    "bpb_last": bits[:, -16:].mean(),
    "accuracy": hits.mean(),
    "accuracy_repeated": score(cfg, params, repeated)[1].mean(),
  }
  cell = dict(scheme=scheme, method=name, factor=factor, length=length)
  for metric, expected_value in expected.items():
    np.testing.assert_allclose(
      values(rows, metric=metric, **cell), [expected_value], rtol=2e-6, err_msg=metric
    )
  by_window = values(rows, metric=methods.BY_WINDOW, **cell)
  np.testing.assert_allclose(by_window, bits[:, -16:].mean(axis=1), rtol=2e-6)


def test_the_loss_within_the_trained_length_is_that_of_the_model_as_trained(measured):
  settings, rows = measured
  trained = Untrained(settings)
  windows, _ = evaluate.in_length_windows(trained, 16)
  assert len(windows) > 100
  bits, _ = score(trained.configs["rope_logn"], trained.params("rope_logn", 0), windows)
  found = values(rows, scheme="rope_logn", metric=methods.IN_LENGTH)
  np.testing.assert_allclose(found, [bits.mean()], rtol=2e-6)


@pytest.mark.parametrize("name", ["none", "yarn", "rerope"])
def test_the_curve_by_position_averages_to_the_whole_window(measured, name):
  cells = dict(scheme="rope", method=name, length=40)
  curve = values(measured[1], metric=methods.BY_POSITION, **cells)
  assert len(curve) == 40 // 8
  for metric, part in (("bpb", curve), ("bpb_last", curve[-2:])):
    np.testing.assert_allclose([np.mean(part)], values(measured[1], metric=metric, **cells), rtol=1e-6)


def test_a_failed_training_fails_its_cells_each_time_and_is_tried_once(monkeypatch, corpus):
  from jaxllm.train.loop import DivergedError

  settings, tried = sweep_case.settings_of(*sweep_case.TINY, f"--corpus={corpus}"), []
  trained = Trained(settings, "float32")

  def train(scheme, seed):
    tried.append(scheme)
    raise DivergedError("the loss is nan")

  monkeypatch.setattr(trained, "_train", train)
  for group in groups_of(settings):
    if group.name.split("/")[3] != "none":
      with pytest.raises(DivergedError):
        evaluate.compute(settings, trained, group)
  assert tried == ["rope", "alibi"]
