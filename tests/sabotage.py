"""Known bugs of other codebases, put in one at a time: a property that is not about it must catch each.

A check proves something only if it can fail.  Each row first holds its check on the code as it is.
"""

import functools

import model_checks
import pytest


def register(bugs, check, *args):
  """A decorator that puts a patch of the package, and the check that must catch it, into the table `bugs`."""

  def put(patch):
    bugs[patch.__name__] = (patch, functools.partial(check, *args))
    return patch

  return put


def wrap(monkeypatch, owner, name, wrapper):
  """Replaces owner.name by wrapper(the original, *its arguments)."""
  monkeypatch.setattr(owner, name, functools.partial(wrapper, getattr(owner, name)))


def wrap_method(monkeypatch, owner, name, wrapper):
  """The same of a method, which then still binds its instance."""
  original = getattr(owner, name)
  monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def must_be_caught(monkeypatch, patch, check):
  """The check holds, and with the patch it does not; patched code is compiled anew."""
  check()
  monkeypatch.setattr(model_checks, "PROGRAMS", {})
  monkeypatch.setattr(model_checks, "OPTIMIZED", None)
  patch(monkeypatch)
  with pytest.raises(AssertionError):
    check()
