"""config.json, read through an allow-list: every setting is handled, knowingly ignored, at its default, or an error."""

from __future__ import annotations


class Settings:
  """The settings of one config.json, each of which has to be taken or ignored before `finish`."""
