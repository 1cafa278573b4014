"""Models of the rows of family_cases.py whose greedy text varies, as directories that both sides read."""

import functools

from family_cases import built, family_of, from_tensors, settings, shapes

from jaxllm import hf

LAYERS = {"bloom": 8.0}
"""By how much the layers are larger, where it is not 2.5; the norm of its embedding undoes what is done there."""


@functools.cache
def params(row):
  """Parameters whose layers outweigh the embedding: else the same token comes again and again."""
  model = built(row)
  tensors = dict(model.tensors)
  for name, path, shape in shapes(model.family, model.cfg):
    if path == "embed":
      tensors[name] = 0.2 * tensors[name]
    elif len(shape) > 1 and path != "head":
      tensors[name] = LAYERS.get(row, 2.5) * tensors[name]
  return from_tensors(model.family, model.cfg, tensors)


def saved(row, directory):
  """(cfg, params) by hf.load of what hf.save wrote into the directory."""
  hf.save(directory, built(row).cfg, params(row), family=family_of(row))
  return hf.load(directory)


def opened(row, directory):
  """transformers' model of the directory, which stops at no id."""
  import theirs

  model, info = theirs.transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    attn_implementation=theirs.attention_of(settings(row)),
    experts_implementation="eager",
    output_loading_info=True,
  )
  assert not any(info.values()), info
  model.generation_config.eos_token_id = None
  return model.eval()
