"""One optimizer step: AdamW with warm-up and cosine decay, clipped gradients, float32 parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm import tree
from jaxllm.errors import ConfigError, check_positive
from jaxllm.nn.transformer import Transformer, head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train import lora

DECAYED = (
  (r"(embed|embed_in|embed_out|head|head_bias)(/[ab])?", False),
  (r"positions/\d+/\w+", False),
  (r".*/(scale|bias|sinks|alpha_p|alpha_n)", False),
  (r".*/w(/[ab])?", True),
)
"""Which parameters weight decay acts on: the matrices inside the layers, and what `train.lora` adds to them."""

State = dict
"""{"step": int32, "params": tree, "opt": optax state}: all of a run that is not its configuration."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything of a run beside the model and the text.  `length` is in tokens, `warmup` the share of the steps."""

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

  def __post_init__(self):
    check_positive(self, steps=self.steps, batch_size=self.batch_size, length=self.length)
    check_positive(self, learning_rate=self.learning_rate, clip_norm=self.clip_norm)
    if not 0 <= self.warmup < 1:
      raise ConfigError(
        f"TrainConfig.warmup: found {self.warmup}, expected a share of the steps, from 0 to below 1"
      )

  def schedule(self) -> optax.Schedule:
    """Learning rate of a step: linear from 0, then a cosine to final_ratio of the peak."""
    peak, warmup = self.learning_rate, int(self.warmup * self.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, self.steps, peak * self.final_ratio)

  def optimizer(self) -> optax.GradientTransformation:
    """clip by global norm, then AdamW (Loshchilov and Hutter, 2017) on the schedule."""

    def decayed(params):
      flat = tree.flatten(params)
      return tree.unflatten({path: tree.first_match(DECAYED, path) for path in flat})

    adamw = optax.adamw(
      self.schedule(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def init_state(model: Transformer, config: TrainConfig, seed: int, params: Any = None) -> State:
  """The state before the first step, a pure function of its arguments.

  params: those that training begins with, such as `lora.apply` gave them, in place of random ones of the seed.
  """
  if params is None:
    tokens = jnp.zeros((1, config.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
  opt = config.optimizer().init(lora.trained(params))
  return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": opt}


def make_step(
  model: Transformer, config: TrainConfig
) -> Callable[[State, jax.Array], tuple[State, jax.Array]]:
  """step(state, tokens [B, length + 1]) -> (state, mean loss in nats), compiled; the old state is given up.

  Where weights have LoRA, its factors alone are trained, and all else of the parameters stays as it is, bit for bit.
  """
  optimizer = config.optimizer()

  def loss_of(params, tokens):
    hidden_BTD, _ = model.apply({"params": params}, tokens[:, :-1], logits=None)
    nll_BT, _ = cross_entropy(hidden_BTD, head(model.cfg, params), tokens[:, 1:])
    return jnp.mean(nll_BT)

  def step(state, tokens):
    put = lambda trained: lora.with_trained(state["params"], trained)
    trained = lora.trained(state["params"])
    loss, grads = jax.value_and_grad(lambda trained: loss_of(put(trained), tokens))(trained)
    updates, opt = optimizer.update(grads, state["opt"], trained)
    params = put(optax.apply_updates(trained, updates))
    return {"step": state["step"] + 1, "params": params, "opt": opt}, loss

  return jax.jit(step, donate_argnums=0)
