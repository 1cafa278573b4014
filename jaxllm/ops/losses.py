"""The one scorer of training and evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.ops.head import Head


def cross_entropy(
  hidden_BTD: jax.Array, head: Head, labels_BT: jax.Array, chunk: int = 8192
) -> tuple[jax.Array, jax.Array]:
  """-log softmax(head(hidden))[label] in nats, and whether the label is the most likely token: float32 and bool [B, T].

  Logits are float32 and exist for `chunk` tokens at a time, forward and backward: 32k tokens of a 152k vocabulary at once
  would be 20 GB.
  """
  D = hidden_BTD.shape[-1]
  hidden_CD, labels_C = hidden_BTD.reshape(-1, D), labels_BT.reshape(-1)
  count = labels_C.shape[0]
  if count <= chunk:
    nll, correct = _score(hidden_CD, head, labels_C)
  else:
    pad = -count % chunk
    hidden = jnp.pad(hidden_CD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    labels = jnp.pad(labels_C, (0, pad)).reshape(-1, chunk)
    score = jax.checkpoint(lambda hl: _score(hl[0], head, hl[1]))
    nll, correct = jax.tree.map(lambda x: x.reshape(-1)[:count], jax.lax.map(score, (hidden, labels)))
  return nll.reshape(labels_BT.shape), correct.reshape(labels_BT.shape)


def _score(hidden_CD, head, labels_C):
  logits_CV = head(hidden_CD)
  label_logit = jnp.take_along_axis(logits_CV, labels_C[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_CV, axis=-1) - label_logit, jnp.argmax(logits_CV, axis=-1) == labels_C
