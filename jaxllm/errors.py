"""Errors for the user: each names the file, tensor, key or flag, what was found, what was expected and what to do.

`assert` is for this package's own invariants; what reaches a user is one of these.
"""

from collections.abc import Collection


class JaxllmError(ValueError):
  """Something the user can mend.  `exit_code` is what a script that meets it returns."""

  exit_code = 2


class ConfigError(JaxllmError):
  """A flag, a field or a combination of them that cannot be run."""


class DataError(JaxllmError):
  """A corpus or prompt that cannot be used."""

  exit_code = 65


class CheckpointError(JaxllmError):
  """A checkpoint that is missing, damaged, or of another model."""

  exit_code = 65


class TokenizerError(JaxllmError):
  """A tokenizer that does not fit the model, or ids outside the vocabulary."""

  exit_code = 65


class SamplingError(JaxllmError):
  """A sampler parameter or logits that no token can be drawn from."""


class QuantError(JaxllmError):
  """A tensor that a quantization scheme cannot hold."""


def check_positive(owner: object, **values: float) -> None:
  """Raise ConfigError for a field that is not a finite number above zero."""
  for name, value in values.items():
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
      raise ConfigError(f"{type(owner).__name__}.{name}: found {value!r}, expected a finite number above 0")


def check_choice(owner: object, name: str, allowed: Collection[object]) -> None:
  """Raise ConfigError for a field that is not one of the allowed values."""
  value = getattr(owner, name)
  if not any(type(value) is type(one) and value == one for one in allowed):  # 1 is not True
    raise ConfigError(
      f"{type(owner).__name__}.{name}: found {value!r}, expected one of {', '.join(map(str, allowed))}"
    )
