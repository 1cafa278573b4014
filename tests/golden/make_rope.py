"""Writes rope.json: RoPE frequencies, rotated vectors and exact angles, from two independent sources.

Source 1: the published formulas at 50 digits (RoFormer; PI; bloc97's NTK; kexue.fm 9675 and 9706; YaRN and its authors'
NTK-by-parts; Llama 3.1; LongRoPE), rounded once to float64.
Source 2: transformers' own RoPE initialisation, in float32 as its models use it.
Needs numpy, mpmath, torch, transformers; the tests need only the JSON.  Run: python tests/golden/make_rope.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import mpmath
import numpy as np
import torch
from mpmath import mpf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

mpmath.mp.dps = 50

HF_NAMES = {"rope": "default", "pi": "linear", "dynamic_ntk": "dynamic", "yarn": "yarn"}
HF_NAMES |= {name: name for name in ("llama3", "longrope", "proportional")}
HF_FIELDS = {"proportion": "partial_rotary_factor"}  # ours: theirs, where they differ
HF_REQUIRES = {"llama3": dict(low_freq_factor=1.0, high_freq_factor=4.0)}  # as every Llama 3 has them
TAKE_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")

# factors like those of published checkpoints: short ones near 1, long ones rising to 60
LONG_ROPE = dict(
  base=10000.0,
  factor=32.0,
  original_length=4096,
  short_factor=[round(1 + 0.05 * i, 2) for i in range(24)],
  long_factor=[round(1.08 * 60.0 ** (i / 23), 4) for i in range(24)],
)

# (method, rotary_dim, seq_len, fields)
CASES = [
  ("rope", 128, None, dict(base=10000.0)),
  ("rope", 64, None, dict(base=500000.0)),
  ("rope", 24, None, dict(base=1000000.0)),
  ("pi", 128, None, dict(base=10000.0, factor=8.0)),
  ("pi", 64, None, dict(base=500000.0, factor=1.0)),
  ("pi", 64, None, dict(base=1000000.0, factor=16.0)),
  ("pi", 24, None, dict(base=10000.0, factor=2.5)),
  *[
    (name, d, None, dict(base=base, factor=factor, **more))
    for name, more in (
      ("ntk_old", {}),
      ("ntk", {}),
      ("ntk_fixed", {}),
      ("ntk_mixed", {}),
      ("ntk_mixed", dict(exponent=0.75)),
    )
    for d, base, factor in (
      (128, 10000.0, 8.0),
      (64, 500000.0, 32.0),
      (24, 1000000.0, 2.0),
      (24, 10000.0, 12.0),
    )
  ],
  # below, at, just above, and far above the trained length; factor 1 still grows with length
  ("dynamic_ntk", 128, None, dict(base=10000.0, factor=2.0, original_length=2048)),
  ("dynamic_ntk", 128, 2047, dict(base=10000.0, factor=2.0, original_length=2048)),
  ("dynamic_ntk", 128, 2048, dict(base=10000.0, factor=2.0, original_length=2048)),
  ("dynamic_ntk", 128, 2049, dict(base=10000.0, factor=2.0, original_length=2048)),
  ("dynamic_ntk", 128, 16384, dict(base=10000.0, factor=2.0, original_length=2048)),
  ("dynamic_ntk", 64, 5000, dict(base=500000.0, factor=4.0, original_length=4096)),
  ("dynamic_ntk", 24, 1024, dict(base=1000000.0, factor=8.0, original_length=128)),
  ("dynamic_ntk", 24, 1024, dict(base=10000.0, factor=1.0, original_length=128)),
  *[
    ("yarn", 128, None, dict(base=10000.0, factor=1.0 * s, original_length=2048))
    for s in (1, 2, 4, 8, 16, 32)
  ],
  ("yarn", 128, None, dict(base=10000.0, factor=8.0, original_length=4096)),
  ("yarn", 64, None, dict(base=500000.0, factor=4.0, original_length=4096)),
  ("yarn", 24, None, dict(base=1000000.0, factor=8.0, original_length=128)),
  ("yarn", 128, None, dict(base=1000000.0, factor=4.0, original_length=2048, beta_fast=16.0, beta_slow=2.0)),
  # the scale on cos and sin: both weights, one of the two (transformers ignores it), and given outright
  *[
    ("yarn", 64, None, dict(base=10000.0, factor=factor, original_length=4096, **weights))
    for factor, weights in (
      (40.0, dict(mscale=1.0, mscale_all_dim=1.0)),
      (32.0, dict(mscale=0.707, mscale_all_dim=1.5)),
      (8.0, dict(mscale=0.707)),
      (8.0, dict(mscale_all_dim=0.707)),
      (8.0, dict(attention_factor=0.875)),
      (8.0, dict(attention_factor=1.5, mscale=0.7, mscale_all_dim=0.3)),
    )
  ],
  ("yarn", 64, None, dict(base=150000.0, factor=32.0, original_length=4096, truncate=False)),
  ("yarn", 128, None, dict(base=10000.0, factor=2.0, original_length=2048, truncate=False)),
  # the top of the range is clipped at rotary_dim - 1, not at rotary_dim / 2 - 1
  ("yarn", 24, None, dict(base=10.0, factor=4.0, original_length=2048, beta_fast=64.0)),
  # an empty range: a step, by way of high += 0.001
  ("yarn", 24, None, dict(base=10000.0, factor=4.0, original_length=6)),
  ("ntk_by_parts", 128, None, dict(base=10000.0, factor=8.0, original_length=2048)),
  ("ntk_by_parts", 128, None, dict(base=10000.0, factor=1.0, original_length=2048)),
  ("ntk_by_parts", 64, None, dict(base=500000.0, factor=4.0, original_length=8192)),
  ("ntk_by_parts", 64, None, dict(base=10000.0, factor=16.0, original_length=128)),
  (
    "ntk_by_parts",
    128,
    None,
    dict(base=10000.0, factor=8.0, original_length=4096, beta_turns=[0.5, 3.0], gamma_turns=[1.5, 32.0]),
  ),
  # Llama 3.1 and 3.2, and windows of wavelengths that begin or end elsewhere
  ("llama3", 128, None, dict(base=500000.0, factor=8.0, original_length=8192)),
  ("llama3", 64, None, dict(base=500000.0, factor=32.0, original_length=8192)),
  ("llama3", 128, None, dict(base=10000.0, factor=1.0, original_length=2048)),
  (
    "llama3",
    64,
    None,
    dict(base=10000.0, factor=4.0, original_length=128, low_freq_factor=0.5, high_freq_factor=8.0),
  ),
  # up to, at and beyond the trained length; the temperature from the factor, or given
  *[("longrope", 48, n, LONG_ROPE) for n in (None, 1, 4095, 4096, 4097, 131072)],
  ("longrope", 48, 8192, LONG_ROPE | dict(attention_factor=1.25)),
  ("longrope", 48, 8192, LONG_ROPE | dict(factor=1.0)),
  *[
    ("proportional", d, None, dict(base=1000000.0, proportion=p, factor=s))
    for d, p, s in ((64, 0.25, 1.0), (64, 1.0, 1.0), (24, 0.6, 4.0), (128, 0.999, 8.0))
  ],
]


def by_parts(base, factor, d, original_length, beta=(0.75, 1.25), gamma=(2, 16)):
  """NTK-by-parts as in the YaRN authors' LlamaPartNTKScaledRotaryEmbedding: linear, NTK and plain frequencies by two masks."""

  def mask(turns):
    low, high = yarn_range(base, d, original_length, turns[1], turns[0], True)
    if low == high:
      high += mpf("0.001")
    return [1 - min(max((i - low) / (high - low), mpf(0)), mpf(1)) for i in range(d // 2)]

  plain, ntk = powers(base, d), ntk_aware(base, factor, d)
  mixed = [f / mpf(factor) * (1 - m) + n * m for f, n, m in zip(plain, ntk, mask(beta), strict=True)]
  return [x * (1 - m) + f * m for x, f, m in zip(mixed, plain, mask(gamma), strict=True)]


def llama3(base, factor, d, original_length, low_freq_factor=1.0, high_freq_factor=4.0):
  """Llama 3.1's reference code: three cases by wavelength."""
  out = []
  for f in powers(base, d):
    wavelength = 2 * mpmath.pi / f
    smooth = (original_length / wavelength - mpf(low_freq_factor)) / mpf(high_freq_factor - low_freq_factor)
    if wavelength < original_length / mpf(high_freq_factor):
      out.append(f)
    elif wavelength > original_length / mpf(low_freq_factor):
      out.append(f / mpf(factor))
    else:
      out.append((1 - smooth) * f / mpf(factor) + smooth * f)
  return out


def powers(base, d):
  """RoFormer section 3.2.2: base^(-2i/d)."""
  return [mpf(base) ** (-mpf(2 * i) / d) for i in range(d // 2)]


def ntk_aware(base, factor, d):
  """bloc97 (2023): base * factor^(d/(d-2))."""
  return powers(mpf(base) * mpf(factor) ** (mpf(d) / (d - 2)), d)


def per_digit(base, factor, d, exponent):
  """kexue.fm 9706: lambda_1...lambda_m = exp(a m^b) with a (d/2)^b = ln factor, m counted from 1."""
  a = mpmath.log(mpf(factor)) / (mpf(d) / 2) ** mpf(exponent)
  return [f * mpmath.exp(-a * mpf(i + 1) ** mpf(exponent)) for i, f in enumerate(powers(base, d))]


def yarn_range(base, d, original_length, beta_fast, beta_slow, truncate):
  """YaRN section 3.2: the dimensions that turn beta_fast and beta_slow times within the trained length."""

  def dimension(turns):
    return d * mpmath.log(mpf(original_length) / (2 * mpmath.pi * mpf(turns))) / (2 * mpmath.log(mpf(base)))

  low, high = dimension(beta_fast), dimension(beta_slow)
  if truncate:
    for edge in (low, high):
      assert abs(edge - mpmath.nint(edge)) > 1e-6, "too near an integer: float64 could fall on the other side"
    low, high = mpmath.floor(low), mpmath.ceil(high)
  return max(low, mpf(0)), min(high, mpf(d - 1))


def yarn(base, factor, d, original_length, beta_fast=32.0, beta_slow=1.0, truncate=True):
  low, high = yarn_range(base, d, original_length, beta_fast, beta_slow, truncate)
  if low == high:
    high += mpf("0.001")
  ramp = [min(max((i - low) / (high - low), mpf(0)), mpf(1)) for i in range(d // 2)]
  return [f / mpf(factor) * r + f * (1 - r) for f, r in zip(powers(base, d), ramp, strict=True)]


def temperature(factor, mscale=1):
  """YaRN section 3.4: sqrt(1/t) = 0.1 ln s + 1, with the weight that DeepSeek added."""
  return mpf(1) if factor <= 1 else mpf(mscale) * mpmath.log(mpf(factor)) / 10 + 1


def published(name, d, seq_len, kw):
  """(frequencies, scale) at 50 digits."""
  base, factor = kw["base"], kw.get("factor", 1.0)
  if name == "rope":
    return powers(base, d), mpf(1)
  if name == "pi":
    return [f / mpf(factor) for f in powers(base, d)], mpf(1)
  if name == "ntk_old":
    return powers(mpf(base) * mpf(factor), d), mpf(1)
  if name == "ntk":
    return ntk_aware(base, factor, d), mpf(1)
  if name == "ntk_fixed":
    return [f * mpf(factor) ** (-mpf(2 * (i + 1)) / d) for i, f in enumerate(powers(base, d))], mpf(1)
  if name == "ntk_mixed":
    return per_digit(base, factor, d, kw.get("exponent", 0.625)), mpf(1)
  if name == "dynamic_ntk":
    trained = kw["original_length"]
    return ntk_aware(base, mpf(factor) * max(seq_len or 0, trained) / trained - (mpf(factor) - 1), d), mpf(1)
  if name == "ntk_by_parts":
    turns = {new: kw[old] for old, new in (("beta_turns", "beta"), ("gamma_turns", "gamma")) if old in kw}
    return by_parts(base, factor, d, kw["original_length"], **turns), mpf(1)
  if name == "llama3":
    fields = {key: kw[key] for key in ("low_freq_factor", "high_freq_factor") if key in kw}
    return llama3(base, factor, d, kw["original_length"], **fields), mpf(1)
  if (
    name == "longrope"
  ):  # LongRoPE, section 3: each pair's own factor, and a temperature for the length to reach
    listed = kw["long_factor" if (seq_len or 0) > kw["original_length"] else "short_factor"]
    scale = kw.get("attention_factor")
    if scale is None:
      growth = mpmath.log(mpf(factor)) / mpmath.log(mpf(kw["original_length"]))
      scale = mpmath.sqrt(1 + growth) if factor > 1 else 1
    return [f / mpf(e) for f, e in zip(powers(base, d), listed, strict=True)], mpf(scale)
  if name == "proportional":
    turned = int(kw["proportion"] * d // 2)
    return [f / mpf(factor) if i < turned else mpf(0) for i, f in enumerate(powers(base, d))], mpf(1)
  assert name == "yarn"
  fields = {key: kw[key] for key in ("original_length", "beta_fast", "beta_slow", "truncate") if key in kw}
  scale = kw.get("attention_factor")
  if scale is None and "mscale" in kw and "mscale_all_dim" in kw:
    scale = temperature(factor, kw["mscale"]) / temperature(factor, kw["mscale_all_dim"])
  return yarn(base, factor, d, **fields), temperature(factor) if scale is None else mpf(scale)


def transformers_row(name, d, seq_len, kw):
  """(float32 frequencies, scale) of transformers, whose `dynamic` counts from max_position_embeddings."""
  rope = {"rope_type": HF_NAMES[name], "rope_theta": kw["base"]} | HF_REQUIRES.get(name, {})
  rope |= {HF_FIELDS.get(key, key): kw[key] for key in kw if key not in ("base", "original_length")}
  trained = kw.get("original_length", 2048)
  if name in TAKE_ORIGINAL_LENGTH:
    rope["original_max_position_embeddings"] = trained
  config = LlamaConfig(
    hidden_size=4 * d,
    num_attention_heads=4,
    head_dim=d,
    max_position_embeddings=trained,
    rope_parameters=rope,
  )
  if name == "rope":
    module = LlamaRotaryEmbedding(config)
    freqs, scale = module.inv_freq, module.attention_scaling
  else:
    freqs, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)
  assert freqs.dtype == torch.float32
  return freqs.numpy(), float(scale)


def short(values):
  """Each float32 as the shortest decimal that gives it back."""
  return [float(str(v)) for v in np.asarray(values, np.float32)]


def row(name, d, seq_len, kw):
  freqs, scale = published(name, d, seq_len, kw)
  out = dict(method=name, kw=kw, rotary_dim=d, seq_len=seq_len)
  out |= dict(inv_freq=[float(f) for f in freqs], scale=float(scale))
  if name in HF_NAMES:
    hf_freqs, hf_scale = transformers_row(name, d, seq_len, kw)
    pairs = [(float(a), b) for a, b in zip(hf_freqs, freqs, strict=True)]
    assert all(a == 0 for a, b in pairs if b == 0)  # pairs that stand still
    worst = max(abs(mpf(a) / b - 1) for a, b in pairs if b)
    assert worst < 1e-6 and abs(hf_scale - scale) < 1e-7, (name, d, kw, float(worst), hf_scale, float(scale))
    out["transformers"] = dict(inv_freq=short(hf_freqs), scale=hf_scale)
  return out


def rotated_vector(layout, d=4, pos=1, base=10000.0):
  """[0, 1, 2, 3] at position 1: pair (2i, 2i+1) or (i, i+d/2) turned by pos * base^(-2i/d)."""
  out = [mpf(0)] * d
  for i, f in enumerate(powers(base, d)):
    a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + d // 2)
    c, s = mpmath.cos(pos * f), mpmath.sin(pos * f)
    out[a], out[b] = a * c - b * s, b * c + a * s
  return [float(v) for v in out]


def angle_rows():
  """cos and sin of the exact product position * float64 frequency: checks the oracle that the tests use."""
  mpmath.mp.dps = 60
  picks = [(10000.0, 0), (10000.0, 1), (10000.0, 37), (1000000.0, 63)]
  freqs = [float(powers(base, 128)[i]) for base, i in picks]
  positions = [0, 1, 255, 256, 257, 4095, 10**6, 2**24 - 1, 2**24 + 1, 2**30, 2**31 - 1]
  rows = [(p, f, mpf(p) * mpf(f)) for f in freqs for p in positions]
  return [dict(pos=p, inv_freq=f, cos=float(mpmath.cos(x)), sin=float(mpmath.sin(x))) for p, f, x in rows]


def self_extend_rows():
  """Relative positions of the last query of a text, nearest key last, as the paper's two attentions give them.

  Positions of the groups of G are p // G, and those of the queries are moved by w - w // G (section 3.2); the nearest w keys,
  the query's own included, keep theirs (as the authors' code masks them).
  """
  rows = []
  for length, window, group in ((12, 4, 2), (16, 6, 3), (23, 5, 4), (9, 9, 2), (40, 16, 5), (40, 1, 7)):
    grouped = [p // group for p in range(length)]
    query = grouped[-1] + window - window // group
    relative = [query - k for k in grouped[: max(0, length - window)]]
    relative += list(range(min(window, length) - 1, -1, -1))
    rows.append(dict(window=window, group=group, relative=relative))
  return rows


def xpos_zeta(d):
  """torchscale's buffer of xPos: (arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)."""
  return [(mpf(i) + mpf("0.4") * d) / (mpf("1.4") * d) for i in range(0, d, 2)]


def pins():
  """Closed forms of the frequency ratios at d = 128, factor 8 (kexue.fm 9675, 9706), and YaRN's constants."""
  d, k, m = 128, mpf(8), mpf(64)
  highest_mixed = mpmath.exp(-mpmath.log(k) / m ** mpf("0.625"))
  ratios = {
    "pi": (1 / k, 1 / k),
    "ntk_old": (mpf(1), k ** (-mpf(d - 2) / d)),
    "ntk": (mpf(1), 1 / k),
    "ntk_fixed": (k ** (-mpf(2) / d), 1 / k),
    "ntk_mixed": (highest_mixed, 1 / k),
  }
  ranges = {n: [int(e) for e in yarn_range(10000.0, d, n, 32.0, 1.0, True)] for n in (2048, 4096)}
  assert ranges == {2048: [16, 41], 4096: [20, 46]}
  assert [round(float(ratios[name][0]), 5) for name in ("ntk_fixed", "ntk_mixed")] == [0.96803, 0.85680]
  # by wavelength: highest kept, lowest divided by the factor; the first pairs that the ramps move, and the last they leave
  for name, freqs in (
    ("ntk_by_parts", by_parts(10000.0, 8, d, 2048)),
    ("llama3", llama3(10000.0, 8, d, 2048)),
  ):
    plain = powers(10000.0, d)
    ratios[name] = (freqs[0] / plain[0], freqs[-1] / plain[-1])
    assert [mpmath.nstr(x, 20) for x in ratios[name]] == ["1.0", "0.125"]
  return dict(
    ratios={name: [float(v) for v in pair] for name, pair in ratios.items()},
    yarn_ranges={str(n): pair for n, pair in ranges.items()},
    yarn_scales={str(s): float(temperature(s)) for s in (2, 4, 8, 16, 32)},
    self_extend=self_extend_rows(),
    xpos_zeta={str(d): [float(z) for z in xpos_zeta(d)] for d in (4, 64)},
    log_n_512={str(n): float(mpmath.log(n) / mpmath.log(512)) for n in (1, 2, 511, 512, 513, 4096)},
  )


def main():
  rows = [row(*case) for case in CASES]
  parts = {
    "made_with": {name: version(name) for name in ("mpmath", "torch", "transformers")},
    "pins": pins(),
    "vectors": {layout: rotated_vector(layout) for layout in ("interleaved", "half")},
  }
  text = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in parts.items())
  for key, values in (("angles", angle_rows()), ("frequencies", rows)):
    text += f"{json.dumps(key)}: [\n" + ",\n".join(json.dumps(value) for value in values) + "\n],\n"
  path = Path(__file__).with_name("rope.json")
  path.write_text("{\n" + text.rstrip(",\n") + "\n}\n")
  json.loads(path.read_text())
  print(f"{path.name}: {len(rows)} rows of frequencies")


if __name__ == "__main__":
  main()
