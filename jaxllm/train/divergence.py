"""Which tensor of a step is the first that is not finite: the step is done again, and looked into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.nn.transformer import Transformer
from jaxllm.train.batches import Batch
from jaxllm.train.step import State, TrainConfig, make_gradient

_IN_LAYER = ("attn_norm", "attn", "attn_post_norm", "mlp_norm", "mlp", "mlp_post_norm")
"""The modules of a layer, in the order of most of them."""


def explain(
  model: Transformer,
  config: TrainConfig,
  source: Any,
  begin: Callable[[], State],
  step_fn: Callable[[State, Any], tuple[State, Any]],
  put: Callable[[Any], Any],
  step: int,
) -> str:
  """The batch of a step, and the first of its tensors that is not finite, in words.

  begin: makes a state that is at most at `step`, from which the run is gone through again.  step_fn, put: as in `loop.fit`.
  """
  state = begin()
  for i in range(int(state["step"]), step):
    state, _ = step_fn(state, put(source.batch(i)))
  batch = put(source.batch(step))
  try:
    found = first_bad(model, config, state, batch)
  except (
    jax.errors.JaxRuntimeError
  ) as e:  # it keeps more than a step does, and the error is that the run diverged
    found = f"what is not finite first cannot be told: {str(e).splitlines()[0][:200]}"
  return f"{source.describe(step)}; {found}"


def first_bad(model: Transformer, config: TrainConfig, state: State, batch: Any) -> str:
  """The first tensor of a step that is not finite, in words: parameters, then outputs of modules, then gradients.

  Outputs are looked at in the order in which they are computed, gradients from the last layer to the first.
  """
  params = state["params"]
  for path, leaf in tree.flatten(params).items():
    if not _finite(leaf):
      return f"the first tensor that is not finite is the parameter {path}, before the step"
  found = _outputs(model, config, params, batch)
  for path in sorted(found, key=_place):
    if not found[path]:
      return f"the first tensor that is not finite is the output of {path}"
  grads = tree.flatten(jax.jit(make_gradient(model, config))(params, batch)[1])
  for path in sorted(grads, key=_place, reverse=True):
    if not _finite(grads[path]):
      return f"the first tensor that is not finite is the gradient of {path}; parameters and outputs are"
  return "parameters, outputs and gradients of the step are finite, and the update is not"


def _outputs(model: Transformer, config: TrainConfig, params: Any, batch: Any) -> dict[str, bool]:
  """Whether what each module gives is finite."""
  if "blocks" in params:
    params = tree.unstack_layers(params)
  whole = config.precision.model(model).clone(scan=False, remat="none")

  def flags(params, batch):
    tokens, context = (batch.tokens, batch.context) if isinstance(batch, Batch) else (batch[:, :-1], None)
    _, seen = whole.apply(
      {"params": params}, tokens, context, logits=None, capture_intermediates=True, mutable=["intermediates"]
    )
    outputs = tree.flatten(seen["intermediates"])
    return {path.removesuffix("/__call__"): _all(value) for path, value in outputs.items()}

  return {path: bool(flag) for path, flag in jax.jit(flags)(params, batch).items()}


def _all(values: Any) -> jax.Array:
  floats = [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])) if floats else jnp.array(True)


def _finite(leaf: Any) -> bool:
  return bool(np.asarray(jax.jit(_all)(leaf)))


def _place(path: str) -> tuple:
  """Where in a pass a module or a parameter is: inner modules before the one that they are in."""
  parts = path.split("/")
  if parts[0] in ("layers", "blocks") and len(parts) > 2:
    inner = _IN_LAYER.index(parts[2]) if parts[2] in _IN_LAYER else len(_IN_LAYER)
    return 1, int(parts[1]), inner, -len(parts), path
  if parts[0] in ("layers", "blocks"):
    return (1, int(parts[1]), len(_IN_LAYER) + 1, 0, path) if len(parts) == 2 else (2, 0, 0, 0, path)
  return (0 if parts[0].startswith(("embed", "positions")) else 3), 0, 0, -len(parts), path
