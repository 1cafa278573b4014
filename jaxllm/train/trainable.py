"""What of the parameters training changes: the factors of LoRA where there are any, or those that rules choose, or all."""

from __future__ import annotations

from jaxllm import tree
from jaxllm.errors import ConfigError
from jaxllm.train import lora

Rules = tuple[tuple[str, bool], ...]


def trained(params: tree.Tree, rules: Rules | None = None) -> tree.Tree:
  """The part of the tree that an optimizer changes, as `lora.trained` gives it; with rules those whose value is True.

  rules: (regular expression of a whole path, whether it is trained), the first that matches counts; a path is that of the
  parameters as they are, blocks/0/... where layers are stacked.
  Raises ConfigError where no rule matches a parameter, a rule matches none, there is LoRA beside rules, or nothing is left.
  """
  if rules is None:
    return lora.trained(params)
  flat = tree.flatten(params)
  tree.check_rules(rules, flat, lambda value: isinstance(value, bool), "True or False")
  if lora.has(params):
    raise ConfigError(
      "trained: found rules for parameters with LoRA, of which the factors are trained; leave them out"
    )
  chosen = {path: leaf for path, leaf in flat.items() if tree.first_match(rules, path)}
  if not chosen:
    raise ConfigError(
      "trained: found rules that leave no parameter to train, expected one with True; give (pattern, True)"
    )
  return lora.trained(tree.unflatten(chosen))


def with_trained(params: tree.Tree, values: tree.Tree, rules: Rules | None = None) -> tree.Tree:
  """The tree with other values of what `trained` gave; all else is the very leaf that it was."""
  if rules is None:
    return lora.with_trained(params, values)
  return tree.unflatten(tree.flatten(params) | tree.flatten(values))
