"""Flags for samplers, named as users of transformers and llama.cpp know them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from jaxllm.errors import ConfigError

ORDERS = ("transformers", "llama.cpp")
"""Names of orders (`sampling.order.ORDERS`), which a flag lists without importing jax."""

LEAST, MOST = 1e-37, 1e38
"""What float32 can hold, above 0 and in size, with its inverse and twice itself."""


class Allowed(NamedTuple):
  """The values of a flag: from `low` to `high`, `low` itself only if `closed`."""

  low: float
  high: float
  closed: bool = True

  def __contains__(self, value: float) -> bool:
    above = value >= self.low if self.closed else value >= self.low + LEAST
    return above and value <= self.high and abs(value) <= MOST

  def __str__(self) -> str:
    if math.isfinite(self.high):
      return f"a number from {self.low} to {self.high}"
    if not math.isfinite(self.low):
      return "a finite number"
    return f"{self.low} or more" if self.closed else f"a number above {self.low}"


SHARE, COUNT, FINITE = Allowed(0, 1), Allowed(0, math.inf), Allowed(-math.inf, math.inf)
LAST = Allowed(-1, math.inf)
FLAGS: dict[str, tuple[float, Allowed, str]] = {  # default, allowed, help
  "temperature": (0.7, COUNT, "0 is greedy"),
  "top_k": (0, LAST, "keep the k most likely {}; 0 or -1 keeps all"),
  "top_p": (0.95, SHARE, "keep the smallest set of {} with this probability; 1 keeps all"),
  "min_p": (0.0, SHARE, "keep the {} at least this many times as likely as the likeliest; 0 keeps all"),
  "typical_p": (1.0, SHARE, "keep the {} nearest the entropy, to this probability; 1 keeps all"),
  "epsilon_cutoff": (0.0, SHARE, "keep the {} of at least this probability; 0 keeps all"),
  "eta_cutoff": (0.0, SHARE, "epsilon_cutoff that falls with the entropy; 0 keeps all"),
  "top_n_sigma": (0.0, COUNT, "keep the {} whose logits are within so many standard deviations; 0 keeps all"),
  "repetition_penalty": (1.0, Allowed(0, math.inf, False), "divide the logits of {} seen before; 1 is off"),
  "presence_penalty": (0.0, FINITE, "take this from the logits of {} drawn before; 0 is off"),
  "frequency_penalty": (0.0, FINITE, "take this as often as they were drawn; 0 is off"),
  "repeat_last_n": (-1, LAST, "how many of the newest {} the three penalties look at; -1 all"),
  "no_repeat_ngram_size": (0, COUNT, "no run of so many {} twice; 0 is off"),
  "dry_multiplier": (0.0, COUNT, "the strength of DRY; 0 is off"),
  "dry_base": (1.75, Allowed(1, math.inf), "how fast its penalty grows with a repetition"),
  "dry_allowed_length": (
    2,
    Allowed(1, math.inf),
    "the longest repetition that costs no more than dry_multiplier",
  ),
  "dry_penalty_last_n": (-1, LAST, "how many of the newest {} it looks at; -1 all"),
  "xtc_probability": (0.0, SHARE, "how often XTC acts; 0 is off"),
  "xtc_threshold": (0.1, SHARE, "it excludes all {} of this probability but the least likely"),
  "mirostat_tau": (
    0.0,
    COUNT,
    "the surprise that mirostat (version 2) holds, in bits, after all other filters; 0 is off",
  ),
  "mirostat_eta": (0.1, COUNT, "how fast it learns"),
}


ALIASES = {"temp": "temperature", "repeat_penalty": "repetition_penalty", "typical": "typical_p"}
"""Names of llama.cpp for flags that transformers names otherwise."""

LEFT_OUT = {
  **{name: name for name in ("top_k", "top_p", "min_p", "top_n_sigma")},
  **{name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
  **{"typical_p": "typical", "epsilon_cutoff": "epsilon", "eta_cutoff": "eta", "xtc_probability": "xtc"},
  **{"no_repeat_ngram_size": "no_repeat_ngram", "dry_multiplier": "dry"},
}
"""What llama.cpp leaves out with mirostat, which has the temperature alone beside it: flags, and the samplers that they are."""

BREAKERS = ("\n", ":", '"', "*")


def define(unit: str = "tokens", values: flags.FlagValues = flags.FLAGS) -> None:
  """Define the flags of FLAGS, and --sampler_order, in `values`; `unit`: what a token is called in their help."""
  for name, (default, _, text) in FLAGS.items():
    kind = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
    kind(name, default, text.format(unit), flag_values=values)
  for other, name in ALIASES.items():
    flags.DEFINE_alias(other, name, flag_values=values)
  flags.DEFINE_multi_string(
    "dry_sequence_breaker",
    BREAKERS,
    f"a text across whose {unit} DRY sees no repetition; may be given several times; none: there is no such text",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "sampler_order", ORDERS[0], ORDERS, "the project in whose order they are applied", flag_values=values
  )


def check(f: Any) -> None:
  """Raise ConfigError, with the flag, its value and what is allowed, for one that no sampler takes."""
  for name, (_, allowed, _) in FLAGS.items():
    if f[name].value not in allowed:
      raise ConfigError(f"--{name}={f[name].value}: expected {allowed}")
  given = [name for name in LEFT_OUT if f[name].present]
  if _mirostat_alone(f) and given:
    raise ConfigError(
      f"--{given[0]} with --mirostat_tau={f.mirostat_tau} and --sampler_order=llama.cpp: mirostat does without it there; leave "
      "one of them out"
    )
  if "" in f.dry_sequence_breaker:
    raise ConfigError("--dry_sequence_breaker=: empty, which is in every text; none leaves all out")


def _mirostat_alone(f: Any) -> bool:
  return f.sampler_order == "llama.cpp" and f.mirostat_tau > 0


def breakers(f: Any, decode: Callable[[list[int]], str], vocab_size: int) -> Any:
  """Which ids have a text of --dry_sequence_breaker in theirs, bool [V] (None: no id, or DRY is off)."""
  import numpy as np

  texts = [text for text in f.dry_sequence_breaker if text != "none"]
  if not f.dry_multiplier or not texts:
    return None
  decoded = [decode([one]) for one in range(vocab_size)]
  for text in texts if f["dry_sequence_breaker"].present else ():
    if not any(text in one for one in decoded):
      raise ConfigError(
        f"--dry_sequence_breaker={text!r}: no token's text has it, so that it would break nothing; give a text within one token"
      )
  return np.array([any(text in one for text in texts) for one in decoded])


def sampler(f: Any, breakers: Any = None) -> Any:
  """The chain that the flags ask for: those that are on, in the order of --sampler_order; breakers: what DRY breaks at."""
  from jaxllm.sampling import SAMPLERS, in_order

  last_n = {"last_n": f.repeat_last_n}
  dry = {"base": f.dry_base, "allowed_length": f.dry_allowed_length, "last_n": f.dry_penalty_last_n}
  dry |= {"breakers": breakers}
  alone = _mirostat_alone(f)
  chosen = [  # name, whether it is on, fields
    ("repetition_penalty", f.repetition_penalty != 1, {"penalty": f.repetition_penalty} | last_n),
    ("presence_penalty", f.presence_penalty, {"penalty": f.presence_penalty} | last_n),
    ("frequency_penalty", f.frequency_penalty, {"penalty": f.frequency_penalty} | last_n),
    ("dry", f.dry_multiplier, {"multiplier": f.dry_multiplier} | dry),
    ("no_repeat_ngram", f.no_repeat_ngram_size, {"n": f.no_repeat_ngram_size}),
    ("temperature", True, {"temperature": f.temperature}),
    ("top_n_sigma", f.top_n_sigma, {"n": f.top_n_sigma}),
    ("top_k", f.top_k > 0, {"k": f.top_k}),
    ("top_p", f.top_p < 1, {"p": f.top_p}),
    ("min_p", f.min_p, {"min_p": f.min_p}),
    ("typical", f.typical_p < 1, {"p": f.typical_p}),
    ("epsilon", f.epsilon_cutoff, {"epsilon": f.epsilon_cutoff}),
    ("eta", f.eta_cutoff, {"epsilon": f.eta_cutoff}),
    ("xtc", f.xtc_probability, {"probability": f.xtc_probability, "threshold": f.xtc_threshold}),
    ("mirostat", f.mirostat_tau, {"tau": f.mirostat_tau, "eta": f.mirostat_eta}),
  ]
  left = (one for one in chosen if not (alone and one[0] in LEFT_OUT.values()))
  return in_order([SAMPLERS[name](**fields) for name, on, fields in left if on], f.sampler_order)
