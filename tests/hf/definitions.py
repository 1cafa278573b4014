"""Families that transformers does not have, by their authors' formulas: float64 NumPy from config.json and the tensors.

Nothing of jaxllm, and in the authors' forms: fused projections are viewed as their code views them, cosines and sines turn
queries and keys, ALiBi is slope times key position, scores are divided by the layer's number and multiplied again.
"""

import math

import numpy as np


def logits(plain, tensors, ids, pos=None, prefix=0):
  """Logits [B, T, V] of config.json's settings and tensors by name; pos is [T] or [T, 2], prefix the length of a context."""
  w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
  pos = np.arange(ids.shape[1]) if pos is None else np.asarray(pos)
  if plain["model_type"] == "baichuan":
    model = baichuan
  elif plain["model_type"] == "glm-130b" or "inner_hidden_size" in plain:
    model = glm
  else:
    model = chatglm
  return np.stack([model(plain, w, row, pos, prefix) for row in ids])


def rms_norm(x, weight, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def linear(w, name, x):
  return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def silu(x):
  return x / (1 + np.exp(-x))


def angles(pos, dim, base=10000.0):
  return pos[:, None] * base ** -(np.arange(0, dim, 2) / dim)


def rotate_half(x_TNH, angle):
  """cos x + sin [-x2; x1], x = [x1; x2]."""
  cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
  x1, x2 = np.split(x_TNH, 2, -1)
  return x_TNH * cos + np.concatenate([-x2, x1], -1) * sin


def rotate_pairs(x_TNH, angle):
  """Neighbouring coordinates, those of the angles; the rest stays."""
  turned, rest = np.split(x_TNH, [2 * angle.shape[1]], -1)
  a, b, cos, sin = turned[..., ::2], turned[..., 1::2], np.cos(angle)[:, None], np.sin(angle)[:, None]
  return np.concatenate(
    [np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(turned.shape), rest], -1
  )


def attention(q_TNH, k_TNH, v_TNH, bias=0.0, prefix=0, number=1):
  T, _, H = q_TNH.shape
  scores = np.einsum("tnh,snh->nts", q_TNH / (math.sqrt(H) * number), k_TNH) * number + bias
  order = np.arange(T)
  scores = np.where((order[:, None] >= order) | (order < prefix), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v_TNH).reshape(T, -1)


def alibi_slopes(n):
  power = 2 ** int(math.log2(n))
  start = 2.0 ** -(2 ** -(math.log2(power) - 3))
  slopes = [start ** (i + 1) for i in range(power)]
  return slopes if power == n else slopes + alibi_slopes(2 * power)[0::2][: n - power]


def baichuan(plain, w, ids, pos, prefix):
  N, eps = plain["num_attention_heads"], plain["rms_norm_eps"]
  x = w["model.embed_tokens.weight"][ids]
  H = x.shape[-1] // N
  for i in range(plain["num_hidden_layers"]):
    at = f"model.layers.{i}."
    h = rms_norm(x, w[f"{at}input_layernorm.weight"], eps)
    q, k, v = linear(w, f"{at}self_attn.W_pack", h).reshape(len(ids), 3, N, H).swapaxes(0, 1)
    if "max_position_embeddings" in plain:
      q, k, bias = rotate_half(q, angles(pos, H)), rotate_half(k, angles(pos, H)), 0.0
    else:
      bias = np.array(alibi_slopes(N))[:, None, None] * pos
    x = x + linear(w, f"{at}self_attn.o_proj", attention(q, k, v, bias))
    h = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], eps)
    act = {"silu": silu, "relu": lambda x: np.maximum(x, 0)}[plain.get("hidden_act", "silu")]
    h = act(linear(w, f"{at}mlp.gate_proj", h)) * linear(w, f"{at}mlp.up_proj", h)
    x = x + linear(w, f"{at}mlp.down_proj", h)
  head = w["lm_head.weight"]
  if "z_loss_weight" in plain:
    head = head / np.maximum(np.sqrt((head**2).sum(1, keepdims=True)), 1e-12)
  return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def chatglm(plain, w, ids, pos, prefix):
  N, H, eps, T = (
    plain["num_attention_heads"],
    plain["kv_channels"],
    plain["layernorm_epsilon"],
    len(ids),
  )

  def norm(name, x):
    if plain["rmsnorm"]:
      return rms_norm(x, w[f"{name}.weight"], eps)
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

  ratio, second = plain.get("rope_ratio", 1), "chatglm2" in plain.get("_name_or_path", "")
  angle = angles(pos / ratio, H // 2) if second else angles(pos, H // 2, 10000.0 * ratio)

  def turn(x):
    if plain["original_rope"]:
      return rotate_pairs(x, angle)
    return np.concatenate([rotate_half(x[..., : H // 2], angle), x[..., H // 2 :]], -1)

  x = w["transformer.embedding.word_embeddings.weight"][ids]
  for i in range(plain["num_layers"]):
    at = f"transformer.encoder.layers.{i}."
    after = plain.get("apply_residual_connection_post_layernorm")
    h = norm(f"{at}input_layernorm", x)
    mixed = linear(w, f"{at}self_attention.query_key_value", h)
    if plain["multi_query_attention"]:
      G = plain["multi_query_group_num"]
      q, k, v = (part.reshape(T, -1, H) for part in np.split(mixed, [N * H, (N + G) * H], -1))
      k, v = (x.repeat(N // G, 1) for x in (k, v))
    else:
      q, k, v = np.split(mixed.reshape(T, N, 3 * H), 3, -1)
    x = (h if after else x) + linear(w, f"{at}self_attention.dense", attention(turn(q), turn(k), v))
    h = norm(f"{at}post_attention_layernorm", x)
    gate, up = np.split(linear(w, f"{at}mlp.dense_h_to_4h", h), 2, -1)
    x = (h if after else x) + linear(w, f"{at}mlp.dense_4h_to_h", silu(gate) * up)
  return norm("transformer.encoder.final_layernorm", x) @ w["transformer.output_layer.weight"].T


def glm(plain, w, ids, pos, prefix):
  N, L, T = plain["num_attention_heads"], plain["num_layers"], len(ids)
  norm = lambda name, x: layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], plain["layernorm_epsilon"])
  alpha = (2 * L) ** 0.5
  gated = plain["model_type"] == "glm-130b"

  def turn(x):
    H = x.shape[-1]
    if gated or not plain["position_encoding_2d"]:
      return rotate_half(x, angles(pos, H))
    both = pos if pos.ndim == 2 else np.stack([pos, 0 * pos], -1)
    halves = zip(np.split(x, 2, -1), both.T, strict=True)
    return np.concatenate([rotate_half(half, angles(one, H // 2)) for half, one in halves], -1)

  x = w["transformer.word_embeddings.weight"][ids]
  for i in range(L):
    at = f"transformer.layers.{i}."
    a = norm(f"{at}input_layernorm", x)
    q, k, v = np.split(linear(w, f"{at}attention.query_key_value", a).reshape(T, N, -1), 3, -1)
    mixed = attention(turn(q), turn(k), v, prefix=prefix, number=i + 1)
    m = norm(f"{at}post_attention_layernorm", alpha * a + linear(w, f"{at}attention.dense", mixed))
    h = linear(w, f"{at}mlp.dense_h_to_4h", m)
    if gated:
      x1, x2 = np.split(h, 2, -1)
      h = x1 * x2 / 2 * (1 + np.vectorize(math.erf)(x2 / math.sqrt(2)))
    else:
      h = h / 2 * (1 + np.tanh(0.7978845608028654 * h * (1 + 0.044715 * h * h)))
    x = alpha * m + linear(w, f"{at}mlp.dense_4h_to_h", h)
  embed = w["transformer.word_embeddings.weight"]
  return norm("transformer.final_layernorm", x) @ w.get("lm_head.weight", embed).T
