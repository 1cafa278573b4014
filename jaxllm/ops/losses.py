"""The one scorer of training and evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.ops.constrain import batch_shards
from jaxllm.ops.head import Head

CHUNK = 8192
"""Tokens of a device whose logits exist at a time."""


def cross_entropy(
  hidden_BTD: jax.Array, head: Head, labels_BT: jax.Array, chunk: int = CHUNK, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """-log softmax(head(hidden))[label] in nats, and whether the label is the most likely token: float32 and bool [B, T].

  Logits are float32 and exist for `chunk` tokens of a device at a time, forward and backward: 32k tokens of a 152k vocabulary
  would be 20 GB.  A chunk holds some positions of all rows (one at least), so that rows split over a mesh stay where they are;
  each gathers a head that is split, and sums its gradient, over the mesh anew.
  Over a vocabulary that a mesh splits no logits are gathered: devices sum a token's maximum, sum and label's logit (Shoeybi et
  al. (2019), Megatron-LM, section 3), and backward the gradient of its hidden state.
  z_loss: the gradient, and not the value, is that of -log softmax + z_loss log(sum exp logits)^2, which holds logits near 0.
  Source of the latter: Chowdhery et al. (2022), PaLM, section 5 (1e-4 there).
  """
  B, T = labels_BT.shape
  chunk *= batch_shards()
  if labels_BT.size <= chunk:
    return _score(hidden_BTD, head, labels_BT, z_loss)
  count = -(-T // max(1, chunk // B))
  t = -(-T // count)

  def tiles(x):  # [B, T, ...] -> [count, B, t, ...]
    x = jnp.pad(x, [(0, 0), (0, count * t - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, t, *x.shape[2:]), 1, 0)

  score = jax.checkpoint(lambda hl: _score(hl[0], head, hl[1], z_loss))
  scores = jax.lax.map(score, (tiles(hidden_BTD), tiles(labels_BT)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T], scores)


def _score(hidden_BTD, head, labels_BT, z_loss):
  logits_CV = head(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]))
  labels_C = labels_BT.reshape(-1)
  label_logit_C, log_sum_C = _label_and_sum(logits_CV, labels_C)
  nll_C = log_sum_C - label_logit_C
  if z_loss:
    z_C = z_loss * jnp.square(log_sum_C)
    nll_C += z_C - jax.lax.stop_gradient(z_C)
  correct_C = jnp.argmax(logits_CV, axis=-1) == labels_C
  return nll_C.reshape(labels_BT.shape), correct_C.reshape(labels_BT.shape)


@jax.custom_vjp
def _label_and_sum(logits_CV: jax.Array, labels_C: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(the label's logit, log sum exp of the logits), [C] each.

  Its gradient is one pass over the logits, which are read again: by JAX's own rules exponentials are kept, and the label's
  part is an array of zeros to which one number a row is added.
  """
  return _label_and_sum_forward(logits_CV, labels_C)[0]


def _label_and_sum_forward(logits_CV, labels_C):
  label_logit_C = jnp.take_along_axis(logits_CV, labels_C[:, None], axis=-1)[:, 0]
  top_C = jnp.max(logits_CV, axis=-1)
  top_C = jnp.where(jnp.isfinite(top_C), top_C, 0)  # infinity less itself would be no number
  sum_C = jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1)
  return (label_logit_C, jnp.log(sum_C) + top_C), (logits_CV, labels_C, top_C, sum_C)


def _label_and_sum_backward(kept, by):
  (logits_CV, labels_C, top_C, sum_C), (by_label_C, by_sum_C) = kept, by
  labels_C = jnp.where(
    labels_C < 0, labels_C + logits_CV.shape[-1], labels_C
  )  # from the end, as they were read
  gradient_CV = (by_sum_C / sum_C)[:, None] * jnp.exp(logits_CV - top_C[:, None])
  here_CV = labels_C[:, None] == jnp.arange(logits_CV.shape[-1], dtype=labels_C.dtype)[None]
  return jnp.where(here_CV, gradient_CV + by_label_C[:, None], gradient_CV), None


_label_and_sum.defvjp(_label_and_sum_forward, _label_and_sum_backward)
