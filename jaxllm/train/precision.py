"""The types that a training step computes in, as values: Apex's levels, and those of bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.config import DTYPES
from jaxllm.errors import ConfigError
from jaxllm.nn.transformer import Transformer
from jaxllm.train.loss_scale import LOSS_SCALES, LossScale

Rules = tuple[tuple[str, str], ...]

ALL_FLOAT32: Rules = ((r".+", "float32"),)


@dataclasses.dataclass(frozen=True)
class Policy:
  """Which type holds what in a step.

  parameters: (regular expression of a path, type), the first match counts: of the weights that are trained, as the model is
  given them; all others stay in their types.
  compute: of products and the residual stream, in place of cfg.dtype; None: cfg.dtype.
  output: what logits are rounded to; the loss is float32 of them.
  reduction: of gradients once they have left the backward pass (their sum over microbatches, scale, finiteness and norm),
  of the optimizer's moments, and of the weights that it changes.
  master: keep the weights in the reduction type, too, where parameters are of another; without it what an update changes is
  rounded to the parameter's type in every step, and lost where it is less than half of the last place.
  loss_scale: None for no scale, and no look for overflow.
  Norm statistics, softmax, angles and sums of products are float32 under every policy.
  Raises ConfigError for an unknown type.  Source: Micikevicius et al. (2017), Mixed Precision Training, section 3.
  """

  parameters: Rules = ALL_FLOAT32
  compute: str | None = "float32"
  output: str = "float32"
  reduction: str = "float32"
  master: bool = True
  loss_scale: LossScale | None = None

  def __post_init__(self):
    compute = () if self.compute is None else (self.compute,)
    for found in (*(dtype for _, dtype in self.parameters), *compute, self.output, self.reduction):
      if found not in DTYPES:
        raise ConfigError(f"Policy: found {found!r}, expected one of {', '.join(DTYPES)}")

  @property
  def keeps_master(self) -> bool:
    """Whether there are weights beside the parameters."""
    return self.master and any(dtype != self.reduction for _, dtype in self.parameters)

  def model(self, model: Transformer) -> Transformer:
    """The model, computing in the policy's type."""
    if self.compute is None:
      return model
    return model.clone(cfg=dataclasses.replace(model.cfg, dtype=self.compute))

  def stored(self, params: tree.Tree) -> dict[str, Any]:
    """The parameters in their types."""
    flat = tree.flatten(params)
    return tree.unflatten({p: _cast(x, tree.first_match(self.parameters, p)) for p, x in flat.items()})

  def wide(self, values: Any) -> Any:
    """Gradients or weights in the reduction type."""
    return _cast(values, self.reduction)

  def logits(self, head: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A head whose logits, float32, have been rounded to the output type."""
    if self.output == "float32":
      return head
    info = jnp.finfo(self.output)
    # not by two casts, which XLA may leave out
    return lambda x: jax.lax.reduce_precision(head(x), int(info.nexp), int(info.nmant))


def _cast(values: Any, dtype: str) -> Any:
  floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, values)


def _norms_wide(dtype: str) -> Rules:
  return ((r"(.*/)?\w*norm/(scale|bias)", "float32"), (r".+", dtype))


def _pure(dtype: str) -> Policy:
  return Policy(((r".+", dtype),), compute=dtype, output=dtype, master=False)


POLICIES: dict[str, Policy] = {
  "model": Policy(compute=None),
  "O0": Policy(),
  "O1": Policy(compute="float16", loss_scale=LOSS_SCALES["apex"]),
  "O2": Policy(_norms_wide("float16"), compute="float16", loss_scale=LOSS_SCALES["apex"]),
  "O3": _pure("float16"),
  "bf16": Policy(compute="bfloat16"),
  "bf16_master": Policy(_norms_wide("bfloat16"), compute="bfloat16"),
  "bf16_pure": _pure("bfloat16"),
}
"""Policies by name.

model: float32 parameters, and cfg.dtype.  Apex's levels: O0 is float32; O1 casts inputs and float32 weights where they are
multiplied; O2 has weights of float16 but those of norms, and float32 ones beside them; O3 is float16 alone.  O1 and O2 scale
the loss.  bf16, bf16_master, bf16_pure: as O1, O2 and O3 in bfloat16, which has the range of float32 and needs no scale.
Apex leaves O3's moments in float16, where the square of a small gradient is 0; here they are of the reduction type.
Source: apex.amp, opt_level; the documentation of apex.amp.initialize.
"""
