"""The filters once more: one row, NumPy float64 over probabilities and Python lists, by each definition's own words.

Each function takes the logits z [V], the text so far (a list of ids, prompt first), how many of them were drawn, and
the parameters; it returns (logits, margin).  margin is the distance from the nearest decision: where it is below
float32 rounding, a float32 filter may decide otherwise.
"""

import numpy as np

INF = np.inf


def softmax(z):
  weights = np.exp(z - z.max())
  return weights / weights.sum()


def surprise(z):
  """-log p in nats; inf where p is 0."""
  with np.errstate(divide="ignore"):
    return -np.log(softmax(z))


def entropy(z):
  probs = softmax(z)
  return -sum(p * np.log(p) for p in probs if p > 0)


def only(z, keep):
  return np.where(keep, z, -INF)


def cut(z, level):
  """(the logits whose log-probabilities reach `level`, or the largest, margin)."""
  logs, largest = -surprise(z), z == z.max()
  others = logs[~largest & np.isfinite(logs)]
  margin = np.abs(others - level).min() if others.size and np.isfinite(level) else INF
  return only(z, (logs >= level) | largest), margin


def window(text, last_n):
  return text if last_n < 0 else text[len(text) - min(last_n, len(text)) :]


def temperature(z, text, drawn, temperature):
  if temperature == 0:
    return only(z, np.arange(z.size) == np.argmax(z)), INF
  return z / temperature, INF


def top_k(z, text, drawn, k):
  return (only(z, z >= np.sort(z)[-min(k, z.size)]) if k else z), INF


def top_p(z, text, drawn, p):
  if p >= 1:
    return z, INF
  kept, total, margin = [], 0.0, INF
  for token in np.argsort(-z, kind="stable"):
    if kept and total >= p:
      break
    kept.append(token)
    total += softmax(z)[token]
    margin = min(margin, abs(total - p)) if p > 0 else INF
  return only(z, np.isin(np.arange(z.size), kept)), margin


def min_p(z, text, drawn, min_p):
  with np.errstate(divide="ignore"):
    return cut(z, np.log(min_p) + np.log(softmax(z).max()))


def typical(z, text, drawn, p):
  if p >= 1:
    return z, INF
  distance = np.abs(surprise(z) - entropy(z))
  order = np.argsort(distance, kind="stable")
  upto = np.cumsum(softmax(z)[order])
  last = min(int(np.sum(upto < p)), z.size - 1)
  gaps = np.abs(distance - distance[order[last]])
  gaps = gaps[(gaps > 1e-12) & np.isfinite(gaps)]  # what is equal in float64 is kept together
  margin = min(np.abs(upto - p).min() if p > 0 else INF, gaps.min() if gaps.size else INF)
  return only(z, distance <= distance[order[last]] + 1e-12), margin


def epsilon(z, text, drawn, epsilon):
  with np.errstate(divide="ignore"):
    return cut(z, np.log(epsilon))


def eta(z, text, drawn, epsilon):
  with np.errstate(divide="ignore"):
    return cut(z, np.log(min(epsilon, np.sqrt(epsilon) * np.exp(-entropy(z)))))


def top_n_sigma(z, text, drawn, n):
  if n == 0:
    return z, INF
  finite = z[np.isfinite(z)]
  least = z.max() - n * np.std(finite)
  margin = np.abs(finite[finite < z.max()] - least).min() if (finite < z.max()).any() else INF
  return only(z, (z >= least) | (z == z.max())), margin


def repetition_penalty(z, text, drawn, penalty, last_n=-1):
  out = z.copy()
  for token in set(window(text, last_n)):
    out[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
  return out, INF


def _counted(text, drawn, last_n, prompt):
  counted = text if prompt else text[len(text) - drawn :]
  return window(counted, last_n)


def presence_penalty(z, text, drawn, penalty, last_n=-1, prompt=False):
  out = z.copy()
  for token in set(_counted(text, drawn, last_n, prompt)):
    out[token] -= penalty
  return out, INF


def frequency_penalty(z, text, drawn, penalty, last_n=-1, prompt=False):
  out = z.copy()
  for token in _counted(text, drawn, last_n, prompt):
    out[token] -= penalty
  return out, INF


def no_repeat_ngram(z, text, drawn, n):
  if n == 0:
    return z, INF
  grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
  newest = text[len(text) - n + 1 :] if len(text) >= n - 1 else None
  banned = [newest is not None and (*newest, token) in grams for token in range(z.size)]
  return only(z, ~np.array(banned)), INF


def logit_bias(z, text, drawn, bias):
  return z + np.asarray(bias, np.float64), INF


def banned_tokens(z, text, drawn, mask):
  return only(z, ~np.asarray(mask)), INF


def forced_tokens(z, text, drawn, tokens):
  if drawn >= len(tokens) or tokens[drawn] < 0:
    return z, INF
  return np.where(np.arange(z.size) == tokens[drawn], 0.0, -INF), INF


def min_new_tokens(z, text, drawn, number, stop):
  return (only(z, ~np.asarray(stop)) if drawn < number else z), INF


def xtc(z, text, drawn, probability, threshold=0.1, keep=None, chance=0.0):
  """chance: the uniform number of this draw."""
  probs = softmax(z)
  above = [token for token in np.argsort(-z, kind="stable") if probs[token] >= threshold and probs[token] > 0]
  margin = np.abs(probs - threshold).min()
  excluded = above[:-1]
  if chance >= probability or (keep is not None and any(keep[token] for token in excluded)):
    return z, margin
  return only(z, ~np.isin(np.arange(z.size), excluded)), margin


def dry(z, text, drawn, multiplier, base=1.75, allowed_length=2, last_n=-1, breakers=None):
  text, out = window(text, last_n), z.copy()
  breaks = lambda token: breakers is not None and breakers[token]
  longest = {}
  for place, token in enumerate(text):
    length = 0
    while length < min(place, 50) and text[place - 1 - length] == text[-1 - length]:
      if breaks(text[-1 - length]):
        break
      length += 1
    longest[token] = max(length, longest.get(token, 0))
  for token, length in longest.items():
    if length >= allowed_length and not breaks(token):
      out[token] -= multiplier * base ** (length - allowed_length)
  return out, INF


def mirostat(z, text, drawn, tau=5.0, eta=0.1, mu=None):
  bits = surprise(z) / np.log(2)
  mu = 2 * tau if mu is None else mu
  margin = np.abs(bits[np.isfinite(bits)] - mu).min()
  keep = bits <= mu
  return only(z, keep if keep.any() else np.arange(z.size) == np.argmax(z)), margin


def chained(z, text, drawn, filters):
  """filters: (name, parameters) in order; (logits, the least margin)."""
  margins = [INF]
  for name, kw in filters:
    z, margin = globals()[name](z, text, drawn, **kw)
    margins.append(margin)
  return z, min(margins)
