"""config.json, read through an allow-list: every setting is handled, knowingly ignored, at its default, or an error.

An error names the file, the key as Hugging Face has it, the value found and what was expected; a key that nobody knows is an
error with the nearest name that is known, as silence is how a wrong RoPE ships.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.hf.plain import brief

LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the value of a setting may be: the words of an error, and the test."""

  expected: str
  fits: Callable[[Any], bool]


def one_of(values: Iterable[Any]) -> Kind:
  """One of `values`."""
  values = list(values)
  return Kind(
    f"one of {', '.join(map(str, values))}", lambda x: any(type(x) is type(v) and x == v for v in values)
  )


def list_of(kind: Kind, length: int, what: str) -> Kind:
  """A list of `length` values of a kind, one a `what`."""
  return Kind(
    f"a list of {length}, one a {what}, each {kind.expected}",
    lambda x: isinstance(x, list) and len(x) == length and all(map(kind.fits, x)),
  )


def _is_number(x: Any) -> bool:
  return (
    type(x) in (int, float) and abs(x) <= 1e300 and math.isfinite(x)
  )  # not bool; not an int that no float holds


COUNT = Kind(f"an integer from 1 to {LARGEST}", lambda x: type(x) is int and 1 <= x <= LARGEST)
DEPTH = Kind("an integer from 1 to 10000", lambda x: type(x) is int and 1 <= x <= 10_000)
NUMBER = Kind("a finite number", _is_number)
POSITIVE = Kind("a finite number above 0", lambda x: _is_number(x) and x > 0)
BASE = Kind("a finite number above 1", lambda x: _is_number(x) and x > 1)
FLAG = Kind("true or false", lambda x: type(x) is bool)
TEXT = Kind("a string", lambda x: isinstance(x, str))
GROUP = Kind(
  "an object of settings", lambda x: isinstance(x, Mapping) and all(isinstance(name, str) for name in x)
)
TOKENS = Kind(
  "a token id, a list of token ids, or null",
  lambda x: all(type(i) is int and -1 <= i <= LARGEST for i in (x if isinstance(x, list) else [x])),
)

REQUIRED = object()
"""The default of a setting that has none."""

# Who wrote the file; what it says of tokenizers, of classifiers and of remote code, which is never run; what a call returns and
# how it computes; initial weights and dropout; sampling, which is chosen at the call.
_IGNORED = """
model_type transformers_version _name_or_path name_or_path _commit_hash license unsloth_version unsloth_fixed
tokenizer_class tokenizer_name bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
decoder_start_token_id prefix
id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params
auto_map trust_remote_code custom_pipelines transformers.js_config
output_hidden_states output_attentions output_scores return_dict return_dict_in_generate use_cache cache_implementation
attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled experts_implementation
torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing pretraining_tp is_decoder
tie_encoder_decoder tie_last_hidden_states
initializer_range attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop emb_pdrop
attention_probs_dropout_prob hidden_dropout_prob
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens
"""
IGNORED = frozenset(_IGNORED.split())
"""Settings that change no logit, of any family."""


_SHOWN = 20
"""Unknown settings that an error names."""


class Settings:
  """The settings of one config.json, or of an object inside it, each of which has to be taken or ignored before `finish`.

  source is the file, and `path` where in it these settings are, both for messages.
  """

  def __init__(self, plain: Mapping[str, Any], source: str = "config.json", path: str = ""):
    if not GROUP.fits(plain):
      raise ConfigError(f"{source}: found {brief(plain)}, expected {GROUP.expected}")
    self.plain, self.source, self.path = dict(plain), source, path
    self._known: set[str] = set()

  def has(self, name: str) -> bool:
    """Whether the setting is there and not null."""
    return self.plain.get(name) is not None

  def take(
    self, name: str, kind: Kind, default: Any = REQUIRED, null: Any = REQUIRED, also: Collection[str] = ()
  ) -> Any:
    """The value of a setting, checked.

    default: the value where it is missing; null: where it is null (`default` unless given).  also: other names that
    transformers accepts for it; where several are there they have to agree.  Raises ConfigError for a value of another kind,
    and for a missing setting without a default.
    """
    self._known |= {name, *also}
    found = {one: self.plain[one] for one in (name, *also) if one in self.plain}
    values = {one: value for one, value in found.items() if value is not None}
    for one, value in values.items():
      if not kind.fits(value):
        raise self.error(one, kind.expected)
    if values:
      first, *others = values
      for other in others:
        if values[other] != values[first]:
          raise self.error(other, f"{brief(values[first])} as in {self._at(first)}, or no such key")
      return values[first]
    value = null if found and null is not REQUIRED else default
    if value is REQUIRED:
      raise self.error(name, kind.expected)
    return value

  def settle(self, name: str, *values: Any, why: str) -> None:
    """Take a setting that has to be missing, null or one of `values`; `why` says what another one would need."""
    self._known.add(name)
    if self.has(name) and not one_of(values).fits(self.plain[name]):
      allowed = " or ".join(map(brief, values)) if values else "no such key"
      raise self.error(name, f"{allowed} ({why})")

  def group(self, name: str) -> Settings:
    """The settings of an object: none, which is false, where it is missing or null."""
    return Settings(self.take(name, GROUP, {}), self.source, self._at(name))

  def __bool__(self) -> bool:
    return bool(self.plain)

  def ignore(self, *names: str) -> None:
    """Settings that change nothing here."""
    self._known |= set(names)

  def error(self, name: str, expected: str) -> ConfigError:
    """What to raise for the value of a setting."""
    found = brief(self.plain[name]) if name in self.plain else "nothing"
    if name not in self.plain and (near := nearest(name, self.plain.keys() - self._known, 0.75)):
      found += f", but a {near}"
    return ConfigError(f"{self.source}: {self._at(name)}: found {found}, expected {expected}")

  def finish(self, ignored: Collection[str] = ()) -> list[str]:
    """The settings that were ignored; raises ConfigError if there are some that nobody took and nobody ignores."""
    known = self._known | set(ignored)
    unknown = []
    for name in self.plain:
      if name not in known:
        near = nearest(name, known) if len(unknown) < _SHOWN else None
        unknown.append(
          f"{self._at(name)} = {brief(self.plain[name])}" + (f" (nearest: {near})" if near else "")
        )
    if unknown:
      more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
      raise ConfigError(
        f"{self.source}: unknown settings, which could change the model: {'; '.join(unknown[:_SHOWN])}{more}; expected some of "
        f"{', '.join(sorted(self._known))}, or ones that change nothing"
      )
    return [name for name in self.plain if name not in self._known]

  def _at(self, name: str) -> str:
    name = name if name.isprintable() and len(name) <= 100 else brief(name)
    return f"{self.path}.{name}" if self.path else name


def nearest(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
  """The known name that is most like another one, None where none is, or where it is longer than any name."""
  known = [one for one in known if len(one) <= 100] if len(name) <= 100 else []
  return next(iter(difflib.get_close_matches(name, sorted(known)[:1000], 1, cutoff)), None)
