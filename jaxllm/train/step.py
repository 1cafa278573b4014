"""One optimizer step: the gradient of a batch, its scale and finiteness, and an update, in the types of a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxllm import parallel
from jaxllm.errors import ConfigError, check_choice, check_positive
from jaxllm.nn.layers import REMATS
from jaxllm.nn.transformer import Transformer, head
from jaxllm.ops.losses import cross_entropy
from jaxllm.parallel.rules import Rules, RuleSet
from jaxllm.train.batches import Batch
from jaxllm.train.layout import Layout, make_layout
from jaxllm.train.loss_scale import all_finite
from jaxllm.train.optimizers import DECAYED, AdamW, Optimizer, chosen
from jaxllm.train.precision import POLICIES, Policy
from jaxllm.train.schedules import Cosine, Schedule
from jaxllm.train.trainable import Rules as Trained
from jaxllm.train.trainable import trained, with_trained

State = dict
"""{"step": int32, "params": tree, "opt": optax state}: all of a run that is not its configuration.

By the policy also {"master": the weights in the reduction type, "loss_scale": `loss_scale.State`}.  The step is the place in
the data, which goes on where an update is skipped.
"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything of a run beside the model and the text.  `length` is in tokens, `warmup` the share of the steps.

  accumulate: parts of a batch whose gradients are computed one after the other.  remat: what is kept of a layer for its
  gradient (`REMATS`).  z_loss: the coefficient of log(sum exp logits)^2 in what is minimized.  trained: which parameters are
  (`trainable.trained`); None: all, or the factors of LoRA.
  """

  steps: int
  batch_size: int
  length: int
  learning_rate: float = 2e-3
  final_ratio: float = 0.02
  warmup: float = 0.05
  weight_decay: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.98
  clip_norm: float = 1.0
  _: dataclasses.KW_ONLY
  rule: Optimizer = AdamW()
  rate: Schedule = Cosine()
  precision: Policy = POLICIES["model"]
  accumulate: int = 1
  remat: str = "none"
  z_loss: float = 0.0
  trained: Trained | None = None

  def __post_init__(self):
    check_positive(self, steps=self.steps, batch_size=self.batch_size, length=self.length)
    check_positive(self, learning_rate=self.learning_rate, clip_norm=self.clip_norm)
    if not 0 <= self.warmup < 1:
      raise ConfigError(
        f"TrainConfig.warmup: found {self.warmup}, expected a share of the steps, from 0 to below 1"
      )
    check_choice(self, "remat", REMATS)
    if not 0 <= self.z_loss < float("inf"):
      raise ConfigError(f"TrainConfig.z_loss: found {self.z_loss}, expected a finite number, 0 for none")
    if type(self.accumulate) is not int or self.accumulate < 1 or self.batch_size % self.accumulate:
      raise ConfigError(
        f"TrainConfig.accumulate: found {self.accumulate!r}, expected a divisor of batch_size, {self.batch_size}"
      )

  def schedule(self) -> optax.Schedule:
    """Learning rate of an update: linear from 0 over the warm-up, then `rate`, to final_ratio of the peak.

    It counts updates: a step that is skipped, as its gradient overflowed, is none.
    """
    peak = self.learning_rate
    return self.rate(peak, int(self.warmup * self.steps), self.steps, peak * self.final_ratio)

  def optimizer(self) -> optax.GradientTransformation:
    """clip by global norm, then `rule`, weight decay apart from it (Loshchilov and Hutter, 2017), times the schedule."""
    update = optax.chain(
      self.rule.direction(self.beta1, self.beta2),
      optax.add_decayed_weights(self.weight_decay, lambda params: chosen(DECAYED, params)),
      optax.scale_by_learning_rate(self.schedule()),
    )
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), update)

  def record(self) -> dict:
    """The configuration as JSON: a value by its type and fields, and fields by keyword where they are not at their defaults.

    So the record of a run stays what it was when such a field is added.
    """
    told = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if dataclasses.is_dataclass(value):
        told[field.name] = {"type": type(value).__name__, **dataclasses.asdict(value)}
      else:
        told[field.name] = value
      if field.kw_only and value == field.default:
        del told[field.name]
    return told


def init_state(
  model: Transformer,
  config: TrainConfig,
  seed: int,
  params: Any = None,
  mesh: Mesh | None = None,
  rules: RuleSet | Rules | None = None,
) -> State:
  """The state before the first step, a pure function of its arguments.

  params: those that training begins with, such as `lora.apply` gave them, in place of random ones of the seed; the first step
  gives them up.
  mesh, rules: where it lies (`layout.make_layout`); every device makes what it holds, the same random bits on any mesh.
  """
  policy, layout = config.precision, _layout(model, config, mesh, rules)

  def start(params):
    changed = trained(params, config.trained)
    weights = policy.wide(changed)
    params = with_trained(params, policy.stored(changed), config.trained)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": config.optimizer().init(weights)}
    if policy.keeps_master:
      state["master"] = jax.tree.map(jnp.copy, weights)  # a step gives up both
    if policy.loss_scale is not None:
      state["loss_scale"] = policy.loss_scale.init()
    return state

  if params is not None and mesh is None:
    return start(params)
  if params is not None:
    placed = parallel.shard(params, mesh, layout.rules, model.cfg)
    return layout.made(lambda params: start(parallel.unpad(params, model.cfg)), placed)
  tokens = jnp.zeros((1, config.length), jnp.int32)
  init = jax.jit(lambda key: model.init(key, tokens)["params"])
  return layout.made(lambda key: start(init(key)), jax.random.key(seed))


def make_step(
  model: Transformer,
  config: TrainConfig,
  mesh: Mesh | None = None,
  rules: RuleSet | Rules | None = None,
  *,
  metrics: bool = False,
) -> Callable[[State, Batch | jax.Array], tuple[State, Any]]:
  """step(state, batch) -> (state, mean loss of a label in nats), compiled; the old state is given up.

  The batch is a `Batch`, whose weights the mean is by, or tokens [B, length + 1], of which each but the last reads the next.
  Where weights have LoRA, its factors alone are trained, and all else of the parameters stays as it is, bit for bit.  With a
  loss scale, gradients that are not all finite leave parameters, master weights and the optimizer's state as they are.
  mesh, rules: those of `init_state`; the new state lies as the old one.  It is to be called within `jax.set_mesh(mesh)`.
  metrics: in place of the loss {"loss", "learning_rate", "grad_norm": the norm of the whole gradient, divided by the loss scale
  and not clipped, "labels": what the mean is over, "updates": how many there were, this step's too, and with a loss scale
  "loss_scale": that of this step, "skipped": 0 or 1}.
  """
  policy, optimizer = config.precision, config.optimizer()
  layout = _layout(model, config, mesh, rules)
  gradient = make_gradient(model, config, mesh, rules)

  def step(state, batch):
    scale = state["loss_scale"]["scale"] if policy.loss_scale is not None else None
    loss, grads = gradient(state["params"], batch, scale)
    weights = (
      state["master"] if policy.keeps_master else policy.wide(trained(state["params"], config.trained))
    )
    weights = layout.changed(weights, state["params"])
    plain = layout.unpadded((grads, state["opt"], weights), state["params"])
    updates, opt = optimizer.update(*plain)
    weights = optax.apply_updates(plain[-1], updates)
    opt, weights = layout.padded((opt, weights), state["params"])
    new = {"params": with_trained(state["params"], policy.stored(weights), config.trained), "opt": opt}
    if policy.keeps_master:
      new["master"] = weights
    if scale is not None:
      finite = all_finite(grads)  # before they are clipped
      new = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, {name: state[name] for name in new})
      new["loss_scale"] = policy.loss_scale.update(state["loss_scale"], finite)
    new = layout.kept({"step": state["step"] + 1} | new)
    if not metrics:
      return new, loss
    updates = lambda state: state["opt"][1][-1].count  # its place in the chain of `optimizer`
    told = {
      "loss": loss,
      "learning_rate": config.schedule()(updates(state)),
      "updates": updates(new),
      "grad_norm": jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))),
      "labels": _labels(batch),
    }
    if scale is not None:
      told |= {"loss_scale": scale, "skipped": 1 - finite.astype(jnp.int32)}
    return new, told

  return jax.jit(step, donate_argnums=0)


def make_gradient(
  model: Transformer,
  config: TrainConfig,
  mesh: Mesh | None = None,
  rules: RuleSet | Rules | None = None,
):
  """gradient(params, batch, scale or None) -> (mean loss, its gradient by what is trained, in the reduction type).

  The loss is multiplied by the scale, and the gradient divided by it.  Parts of a batch are every `accumulate`-th row, which
  leaves rows that are split over a mesh where they are; their sums are of the mean over all labels of the batch.
  mesh, rules: as in `make_step`.
  """
  policy, parts, layout = config.precision, config.accumulate, _layout(model, config, mesh, rules)
  sequence = layout.rules.sequence or model.sequence
  model = policy.model(model).clone(remat=config.remat, sequence=sequence, split_table=layout.splits_table)

  def objective(changed, params, batch, count, scale):
    params = with_trained(params, changed, config.trained)
    whole = isinstance(batch, Batch)
    tokens_BT, context = (batch.tokens, batch.context) if whole else (batch[:, :-1], None)
    to_logits = policy.logits(head(model.cfg, params))
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, context, logits=None)
    labels_BT = batch.labels if whole else batch[:, 1:]
    nll_BT, _ = cross_entropy(hidden_BTD, to_logits, labels_BT, z_loss=config.z_loss)
    if whole:
      nll_BT = batch.weighed(nll_BT)
    loss = jnp.sum(nll_BT) / count
    return loss if scale is None else loss * scale, loss

  def of_part(*args):
    (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(*args)
    return loss, layout.gradients(policy.wide(grads), args[1])

  def gradient(params, batch: Batch | jax.Array, scale=None):
    layout.check_scope()
    params = layout.computed_with(params)
    count = _labels(batch)
    if isinstance(batch, Batch):
      count = jnp.where(count > 0, count, 1)
    changed = trained(params, config.trained)
    if parts == 1:
      loss, grads = of_part(changed, params, batch, count, scale)
    else:
      batches = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
      add = lambda total, part: jax.tree.map(jnp.add, total, of_part(changed, params, part, count, scale))
      zero = layout.gradients(jax.tree.map(jnp.zeros_like, policy.wide(changed)), params)
      (loss, grads), _ = jax.lax.scan(
        lambda *xs: (add(*xs), None), (jnp.zeros((), jnp.float32), zero), batches
      )
    return loss, grads if scale is None else jax.tree.map(lambda g: g * (1 / scale).astype(g.dtype), grads)

  return gradient


def _labels(batch: Batch | jax.Array):
  """What the loss is a mean over: the sum of the weights, or the number of labels."""
  return jnp.sum(batch.weights) if isinstance(batch, Batch) else batch.shape[0] * (batch.shape[1] - 1)


def _layout(
  model: Transformer, config: TrainConfig, mesh: Mesh | None, rules: RuleSet | Rules | None
) -> Layout:
  rows = config.batch_size // config.accumulate
  return make_layout(model.cfg, mesh, rules, rows=rows, length=config.length)
