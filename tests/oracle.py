"""A decoder in NumPy float64: the truth that the float32 model is measured against.  No JAX, no torch.

It is written from the publications and in other forms than the package on purpose: rotations are complex
numbers of the *relative* position, one [T, S, R/2] array; there is no table, no absolute angle and no cache.
Of the package it reads the fields of a config and the names of parameters, nothing else.
"""

import math

import numpy as np

PLAIN = ("Rope", "ReRope", "LeakyReRope", "InvLeakyReRope", "SelfExtendRope", "StreamingRope", "XPosRope")


def inv_freq(method, rotary_dim, length):
  """(frequencies [R/2], temperature of cos and sin) of a RoPE for a context of `length` tokens."""
  name, m = type(method).__name__, method
  i = np.arange(rotary_dim // 2)
  theta = np.exp(-2.0 * i / rotary_dim * math.log(m.base))  # RoFormer, section 3.2.2
  if name in PLAIN:
    return theta, 1.0
  s = float(m.factor)
  if name == "ProportionalRope":
    return np.where(i < int(m.proportion * rotary_dim // 2), theta / s, 0.0), 1.0
  if name == "LongRope":  # LongRoPE, equation 2, and its temperature
    listed = np.array(m.long_factor if length > m.original_length else m.short_factor)
    scale = math.sqrt(1 + math.log(s) / math.log(m.original_length)) if s > 1 else 1.0
    return theta / listed, m.attention_factor or scale
  if name == "Llama3Rope":  # Llama 3.1's reference code, a frequency at a time
    out = []
    for f in theta:
      wave, L0 = 2 * math.pi / f, m.original_length
      if wave < L0 / m.high_freq_factor:
        out.append(f)
      elif wave > L0 / m.low_freq_factor:
        out.append(f / s)
      else:
        smooth = (L0 / wave - m.low_freq_factor) / (m.high_freq_factor - m.low_freq_factor)
        out.append((1 - smooth) * f / s + smooth * f)
    return np.array(out), 1.0
  if name == "PiRope":
    return theta / s, 1.0
  if name == "NtkOldRope":  # kexue.fm 9675: the base times s
    return np.exp(-2.0 * i / rotary_dim * math.log(m.base * s)), 1.0
  if name == "NtkFixedRope":  # kexue.fm 9706
    return theta * np.exp(-2.0 * (i + 1) / rotary_dim * math.log(s)), 1.0
  if name == "NtkMixedRope":  # kexue.fm 9706: exp(-a m^b), a (R/2)^b = ln s
    a = math.log(s) / (rotary_dim / 2) ** m.exponent
    return theta * np.exp(-a * (i + 1.0) ** m.exponent), 1.0
  if name == "DynamicNtkRope":
    s = s * max(length, m.original_length) / m.original_length - (s - 1)
  if name in ("NtkRope", "DynamicNtkRope"):  # bloc97: base * s^(R / (R - 2))
    base = m.base * s ** (rotary_dim / (rotary_dim - 2))
    return np.exp(-2.0 * i / rotary_dim * math.log(base)), 1.0
  pair = lambda turns: (
    rotary_dim * math.log(m.original_length / (2 * math.pi * turns)) / (2 * math.log(m.base))
  )
  if name == "NtkByPartsRope":  # the YaRN authors' LlamaPartNTKScaledRotaryEmbedding
    kept = lambda fast, slow: (
      1
      - np.clip(
        (i - max(math.floor(pair(fast)), 0))
        / max(min(math.ceil(pair(slow)), rotary_dim - 1) - max(math.floor(pair(fast)), 0), 0.001),
        0,
        1,
      )
    )
    ntk = np.exp(-2.0 * i / rotary_dim * math.log(m.base * s ** (rotary_dim / (rotary_dim - 2))))
    mask = kept(m.beta_turns[1], m.beta_turns[0])
    low_part = theta / s * (1 - mask) + ntk * mask
    mask = kept(m.gamma_turns[1], m.gamma_turns[0])
    return low_part * (1 - mask) + theta * mask, 1.0
  assert name == "YarnRope", name
  low, high = pair(m.beta_fast), pair(m.beta_slow)
  if m.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_dim - 1)
  kept = 1 - np.clip((i - low) / max(high - low, 0.001), 0, 1)
  weight = lambda w: 0.1 * w * math.log(s) + 1 if s > 1 else 1.0
  scale = weight(m.mscale) / weight(m.mscale_all_dim) if m.mscale and m.mscale_all_dim else weight(1.0)
  return theta * kept + theta / s * (1 - kept), m.attention_factor or scale


def slopes(heads):
  """ALiBi's slopes, from its authors' recursion."""
  if heads & (heads - 1) == 0:
    start = 2.0 ** (-8.0 / heads)
    return [start ** (h + 1) for h in range(heads)]
  power = 2 ** math.floor(math.log2(heads))
  return slopes(power) + slopes(2 * power)[0::2][: heads - power]


def eight_bits(x):
  """Numbers of at least 0 with eight binary digits each, half to even."""
  step = 2.0 ** (np.floor(np.log2(np.maximum(x, 1e-30))) - 7)
  return np.round(x / step) * step


def pairs(x, rotary_dim, layout):
  """The first rotary_dim coordinates as complex numbers [..., R/2], and the rest."""
  turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
  if layout == "half":
    return turned[..., : rotary_dim // 2] + 1j * turned[..., rotary_dim // 2 :], rest
  return turned[..., 0::2] + 1j * turned[..., 1::2], rest


def relative_positions(m, i, j):
  """(what a query at i and a key at j are apart for the method, whether it sees the key at all)."""
  name, apart, all_seen = type(m).__name__, i - j, np.full(np.broadcast_shapes(i.shape, j.shape), True)
  L0 = m.original_length
  if name == "ReRope":
    return np.minimum(apart, m.window or L0 // 2), all_seen
  if name in ("LeakyReRope", "InvLeakyReRope"):
    w, step = (
      (m.window or L0 // 2, 1 / m.leak) if name == "LeakyReRope" else (m.window or L0 // 4, 2 * m.factor)
    )
    return np.where(apart < w, apart, w + (apart - w) * step), all_seen
  if name == "SelfExtendRope":
    w = m.window or L0 // 2
    G = m.group or math.ceil((m.factor * L0 - w) / (L0 - w))
    return np.where(apart < w, apart, i // G - j // G + w - w // G), all_seen
  if name == "StreamingRope":  # places in a cache of the sinks and the window
    w, sink = m.window or L0 - m.sinks, j < m.sinks
    return np.where(sink, np.minimum(i, m.sinks + w - 1) - j, apart), sink | (apart < w)
  return apart, all_seen


def float32_angles(method, rotary_dim, pos_T):
  """The angles of a plain RoPE in transformers, [T, R/2]: float32 numbers, whose cosines are taken exactly here."""
  assert type(method).__name__ == "Rope", method
  exponent = (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)).astype(np.float64)
  theta = np.float32(1) / (method.base**exponent).astype(np.float32)
  return (pos_T.astype(np.float32)[:, None] * theta).astype(np.float64)


def rope_scores(method, q_BNTH, k_BNSH, pos_T, seq_len, precision):
  """Re sum_c q_ic conj(k_jc) e^(i theta_c r_ij), r_ij the relative position, plus what is not turned."""
  rotary_dim = method.rotary_dim or q_BNTH.shape[-1]
  q, q_rest = pairs(q_BNTH, rotary_dim, method.layout)
  k, k_rest = pairs(k_BNSH, rotary_dim, method.layout)
  relative_TS, allowed_TS = relative_positions(method, pos_T[:, None], pos_T[None])
  rows = [inv_freq(method, rotary_dim, seq_len or int(p) + 1) for p in pos_T]  # each query's own length
  theta_TC, scale_T = np.stack([f for f, _ in rows]), np.array([s for _, s in rows])
  phase_TSC = np.exp(1j * relative_TS[:, :, None] * theta_TC[:, None])
  if precision == "hf":  # differences of rounded angles
    angle_TC = float32_angles(method, rotary_dim, pos_T)
    phase_TSC = np.exp(1j * (angle_TC[:, None] - angle_TC[None]))
  if type(method).__name__ == "XPosRope":  # section 3.2: zeta to the power of the distance
    zeta = (np.arange(0, rotary_dim, 2) / rotary_dim + method.gamma) / (1 + method.gamma)
    phase_TSC = phase_TSC * zeta ** (relative_TS[:, :, None] / method.scale_base)
  turned = np.einsum("bntc,bnsc,tsc->bnts", q, k.conj(), phase_TSC).real
  out = turned * scale_T[:, None] ** 2 + np.einsum("bnth,bnsh->bnts", q_rest, k_rest)
  return np.where(allowed_TS, out, -np.inf)


def turned(method, x_BNTH, pos_T):
  """x turned by absolute positions, for what happens to it between its rotation and the inner product."""
  rotary_dim = method.rotary_dim or x_BNTH.shape[-1]
  z, rest = pairs(x_BNTH, rotary_dim, method.layout)
  theta, scale = inv_freq(method, rotary_dim, None)
  z = z * scale * np.exp(1j * pos_T[:, None] * theta)
  if method.layout == "half":
    return np.concatenate([z.real, z.imag, rest], -1)
  return np.concatenate([np.stack([z.real, z.imag], -1).reshape(*z.shape[:-1], -1), rest], -1)


def two_dimensional_scores(method, q_BNTH, k_BNSH, pos_T2):
  """A RoPE of the position on the first half of the turned coordinates, and one of the block on the second."""
  rotary_dim, out = method.rotary_dim or q_BNTH.shape[-1], 0
  half = rotary_dim // 2
  theta_C = method.base ** (-2.0 * np.arange(half // 2) / half)
  for axis in (0, 1):
    part = slice(axis * half, (axis + 1) * half)
    (q, _), (k, _) = (pairs(x[..., part], half, method.layout) for x in (q_BNTH, k_BNSH))
    phase_TSC = np.exp(1j * (pos_T2[:, None, axis] - pos_T2[None, :, axis])[..., None] * theta_C)
    out = out + np.einsum("bntc,bnsc,tsc->bnts", q, k.conj(), phase_TSC).real
  return out + np.einsum("bnth,bnsh->bnts", q_BNTH[..., rotary_dim:], k_BNSH[..., rotary_dim:])


def t5_bias(method, table, apart_TS):
  """T5's bias [N, T, S], by the logarithm of its code; a nudge keeps an exact threshold on its upper side."""
  exact = method.num_buckets // 2
  apart = np.maximum(apart_TS, 0)
  growth = np.log(np.maximum(apart, 1) / exact) / math.log(method.max_distance / exact)
  large = exact + np.floor(growth * (method.num_buckets - exact) + 1e-9).astype(int)
  bucket = np.where(apart < exact, apart, np.minimum(large, method.num_buckets - 1))
  return np.moveaxis(table[bucket], -1, 0)


def embedding(method, p, pos_T, width):
  """What a method adds to the token embeddings: [T, D], or 0."""
  name = type(method).__name__
  if name == "Learned":
    return p["table"][method.offset + pos_T]
  if name == "Sinusoidal":  # section 3.5, a column at a time
    angle = lambda c: pos_T / method.base ** ((c - c % 2) / width)
    return np.stack([np.cos(angle(c)) if c % 2 else np.sin(angle(c)) for c in range(width)], axis=-1)
  return 0


def scores(cfg, layer, q_BNTH, k_BNSH, pos_T, seq_len, learned):
  """Scaled scores with whatever the layer's position method makes of them; pos_T is [T, 2] for two dimensions."""
  method = layer.position
  how = cfg.query_scale
  if type(how).__name__ == "LogN" and layer.window is None:
    log_n = np.log(pos_T + 1) / math.log(how.train_length)
    q_BNTH = q_BNTH * np.maximum(how.floor, log_n)[:, None]
  if type(how).__name__ == "Llama4Scale":
    q_BNTH = q_BNTH * (1 + how.beta * np.log1p(np.floor(pos_T / how.original_length)))[:, None]
  q_BNTH = q_BNTH * cfg.attention_scale if cfg.attention_scale else q_BNTH / math.sqrt(cfg.head_dim)
  if type(method).__name__ == "Rope2d":
    pos_T2 = pos_T if pos_T.ndim == 2 else np.stack([pos_T, 0 * pos_T], axis=-1)
    return two_dimensional_scores(method, q_BNTH, k_BNSH, pos_T2)
  if hasattr(method, "rotary_dim") and not (cfg.qk_norm and cfg.qk_norm.place == "after"):
    return rope_scores(method, q_BNTH, k_BNSH, pos_T, seq_len, cfg.rope_precision)
  out = np.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH)
  if type(method).__name__ == "Alibi":
    steep_N1 = np.array(slopes(cfg.num_heads))[:, None] ** (method.bias_max / 8)
    at_NT = steep_N1 * pos_T
    if method.slope_dtype == "bfloat16":
      at_NT = eight_bits(eight_bits(steep_N1) * eight_bits(pos_T))
    if method.placement == "before":
      at_NT = at_NT / math.sqrt(cfg.head_dim)
    out -= at_NT[:, :, None] - at_NT[:, None]
  if type(method).__name__ == "T5Bias":
    out += t5_bias(method, learned[method]["table"], pos_T[:, None] - pos_T[None])
  return out


def norm(kind, p, x):
  name = type(kind).__name__
  if name == "L2Norm":
    return x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), kind.eps)
  if name == "LayerNorm":
    x = x - x.mean(-1, keepdims=True)
  measured = x[..., : int(getattr(kind, "fraction", 1.0) * x.shape[-1])]
  x = x / np.sqrt((measured**2).mean(-1, keepdims=True) + kind.eps)
  if kind.scale is not None:
    x = x * (p["scale"] + (kind.scale == "1+w"))
  return x + p["bias"] if getattr(kind, "bias", False) else x


def head_norm(kind, p, x_BTNH):
  """The norm of queries or keys, over one head's coordinates or all heads' at once."""
  if kind.over == "all":
    return norm(kind.norm, p, x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
  if kind.over == "head":
    return norm(kind.norm, p, x_BTNH)
  one = lambda n: norm(kind.norm, {name: weight[n] for name, weight in p.items()}, x_BTNH[:, :, n])
  return np.stack([one(n) for n in range(x_BTNH.shape[2])], axis=2)


def activation(name, x, beta=None):
  sigmoid = lambda x: 0.5 + 0.5 * np.tanh(x / 2)
  if name in ("silu", "swish", "gelu_sigmoid"):
    return x * sigmoid({"silu": 1.0, "swish": beta or 1.0, "gelu_sigmoid": 1.702}[name] * x)
  if name == "gelu_tanh":
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  if name in ("relu", "relu2"):
    return np.where(x > 0, x, 0.0) ** (2 if name == "relu2" else 1)
  if name in ("sigmoid", "identity"):
    return sigmoid(x) if name == "sigmoid" else x
  assert name == "gelu", name
  return x * 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))


def linear(p, x):
  return x @ p["w"] + p["bias"] if "bias" in p else x @ p["w"]


def attention(cfg, layer, p, x_BTD, pos_T, seq_len, prefix, learned):
  B, T, _ = x_BTD.shape
  groups = cfg.num_heads // cfg.num_kv_heads

  def heads(name, n):
    x = linear(p[name], x_BTD)
    if cfg.clip_qkv:
      x = np.minimum(np.maximum(x, -cfg.clip_qkv), cfg.clip_qkv)
    x = x.reshape(B, T, n, cfg.head_dim)
    if name != "v" and cfg.qk_norm:
      if cfg.qk_norm.place == "after":
        x = turned(layer.position, x.transpose(0, 2, 1, 3), pos_T).transpose(0, 2, 1, 3)
      x = head_norm(cfg.qk_norm, p.get(f"{name}_norm", {}), x)
    return x.transpose(0, 2, 1, 3)

  q_BNTH, k_BKSH, v_BKSH = (
    heads(name, n) for name, n in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads))
  )
  k_BNSH, v_BNSH = (np.repeat(x, groups, axis=1) for x in (k_BKSH, v_BKSH))
  s = scores(cfg, layer, q_BNTH, k_BNSH, pos_T, seq_len, learned)
  if cfg.attention_softcap:
    s = np.where(np.isinf(s), s, cfg.attention_softcap * np.tanh(s / cfg.attention_softcap))
  distance = np.arange(T)[:, None] - np.arange(T)[None]
  seen = (distance >= 0) | (np.arange(T)[None] < prefix)
  s = np.where(seen & (distance < (layer.window or T)), s, -np.inf)
  weights = np.exp(s - s.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  if cfg.attention_sinks:
    total = total + np.exp(p["sinks"][:, None, None] - s.max(-1, keepdims=True))
  return linear(p["o"], (weights / total @ v_BNSH).transpose(0, 2, 1, 3).reshape(B, T, -1))


def hidden(mlp, p, *inputs):
  """What a feed-forward value makes of its projections: (gate, up) or (up,)."""
  name = type(mlp).__name__
  if name == "ClampedGlu":
    gate, up = np.minimum(inputs[0], mlp.limit), np.clip(inputs[1], -mlp.limit, mlp.limit)
    return (up + 1) * activation("swish", gate, mlp.alpha)
  if name == "Xielu":
    x, softplus = inputs[0], lambda name: np.log1p(np.exp(p[name]))
    low = (mlp.beta + softplus("alpha_n")) * (np.expm1(np.minimum(x, mlp.eps)) - x) + mlp.beta * x
    return np.where(x > 0, softplus("alpha_p") * x**2 + mlp.beta * x, low)
  out = activation(mlp.activation, inputs[0], mlp.beta)
  return out * inputs[1] if name == "Glu" else out


def feed_forward(cfg, p, x, mlp=None):
  mlp = mlp or cfg.mlp
  if type(mlp).__name__ == "Moe":
    return mixture(mlp, p, x)
  inputs = [linear(p[name], x) for name in ("gate", "up") if name in p]
  return linear(p["down"], hidden(mlp, p, *inputs))


def chosen(moe, logits_E):
  """[(expert, weight)] of one token: by the probabilities of all experts, renormalised over the chosen."""
  assert type(moe.router).__name__ == "SoftmaxRouter", moe.router
  p_E = np.exp(logits_E - logits_E.max())
  p_E = p_E / p_E.sum()
  best = sorted(range(len(p_E)), key=lambda e: (-logits_E[e], e))[: moe.top_k]
  total = sum(p_E[e] for e in best) if moe.router.renormalize else 1.0
  return [(e, p_E[e] / total) for e in best]


def mixture(moe, p, x):
  """A mixture of experts, a token and an expert at a time."""
  out = np.zeros_like(x)
  for at in np.ndindex(x.shape[:-1]):
    for e, share in chosen(moe, linear(p["router"], x[at])):
      mine = {name: {kind: w[e] for kind, w in part.items()} for name, part in p["experts"].items()}
      inputs = [linear(mine[name], x[at]) for name in ("gate", "up") if name in mine]
      out[at] += share * linear(mine["down"], hidden(moe.expert, {}, *inputs))
  return out


def float64(tree):
  """The nested dict with float64 leaves."""
  if hasattr(tree, "items"):
    return {name: float64(value) for name, value in tree.items()}
  return np.asarray(tree, np.float64)


def block(cfg, p, x, attend, feed):
  """One block by the equations of its wiring's source."""
  name, n = type(cfg.wiring).__name__, lambda which, h: norm(cfg.norm, p.get(which, {}), h)
  if name == "Pre":
    x = x + attend(n("attn_norm", x)) * cfg.wiring.branch_scale
    return x + feed(n("mlp_norm", x)) * cfg.wiring.branch_scale
  if name == "PostOnly":
    x = x + n("attn_norm", attend(x))
    return x + n("mlp_norm", feed(x))
  if name == "Sandwich":
    x = x + n("attn_post_norm", attend(n("attn_norm", x)))
    return x + n("mlp_post_norm", feed(n("mlp_norm", x)))
  if name.startswith("Parallel"):
    other = "mlp_norm" if name == "ParallelTwoNorms" else "attn_norm"
    return x + attend(n("attn_norm", x)) + feed(n(other, x))
  alpha = getattr(cfg.wiring, "alpha", 1.0)
  if name == "GlmDeepNorm":  # the norm belongs to what comes in, and the residual is its output
    x = n("attn_norm", x)
    x = n("mlp_norm", x * alpha + attend(x))
    return x * alpha + feed(x)
  assert name in ("Post", "DeepNorm"), name
  x = n("attn_norm", x * alpha + attend(x))
  return n("mlp_norm", x * alpha + feed(x))


def logits(cfg, params, tokens_BT, pos_T=None, seq_len=None, prefix=0):
  """Logits [B, T, V] in float64; pos_T is what position methods see, seq_len pins one length for all.

  `prefix` is how many leading tokens see each other both ways.
  """
  p = float64(params)
  tokens_BT = np.asarray(tokens_BT)
  pos_T = np.arange(tokens_BT.shape[1]) if pos_T is None else np.asarray(pos_T, np.int64)
  x = p["embed"][tokens_BT] * cfg.embed_scale
  if cfg.embed_width:
    x = x @ p["embed_in"]
  methods = list(dict.fromkeys(layer.position for layer in cfg.layers))
  with_parameters = [m for m in methods if type(m).__name__ in ("Learned", "T5Bias")]
  learned = {m: p["positions"][str(i)] for i, m in enumerate(with_parameters)}
  for method in methods:
    x = x + embedding(method, learned.get(method), pos_T, cfg.embed_dim)
  if cfg.embed_norm:
    x = norm(cfg.norm, p.get("embed_norm", {}), x)
  for i in range(cfg.num_layers):
    layer, mine = cfg.layers[i % len(cfg.layers)], p["layers"][str(i)]
    attend = lambda h, a=mine["attn"], layer=layer: attention(
      cfg, layer, a, h, pos_T, seq_len, prefix, learned
    )
    x = block(cfg, mine, x, attend, lambda h, f=mine["mlp"], m=layer.mlp: feed_forward(cfg, f, h, m))
  if type(cfg.wiring).__name__ not in ("Post", "DeepNorm"):
    x = norm(cfg.norm, p.get("final_norm", {}), x)
  x = x @ p["embed_out"] if cfg.embed_width else x
  w_DV = p["embed"].T if cfg.tie_embeddings else p["head"]
  if cfg.norm_head:
    w_DV = w_DV / np.maximum(np.linalg.norm(w_DV, axis=0), 1e-12)
  x = x @ w_DV + p.get("head_bias", 0.0)
  x = x * cfg.logit_scale
  return cfg.logit_softcap * np.tanh(x / cfg.logit_softcap) if cfg.logit_softcap else x
