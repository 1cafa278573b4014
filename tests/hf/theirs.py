"""transformers' side of a row: its config, its model with the row's weights, its logits, gradients and hidden states."""

import copy
import functools
import json

import numpy as np
import pytest
from family_cases import built, settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

torch.set_num_threads(1)
IN_MEMORY = {"gpt_neox": ("embed_out.weight", "lm_head.weight")}
"""By model_type, the name in the files that transformers gives another in memory, and that one."""
EXPERTS = {
  "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
  "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""By model_type, what the files call a mixture, and gate, up and down of an expert: in memory they are mlp, and stacked."""


MIXTURES = (*EXPERTS, "gpt_oss")
"""Whose experts are to be computed one after the other: the grouped product of torch refuses odd widths in half types."""


def config(plain):
  """transformers' config of the settings, of which it changes the objects it is given."""
  plain = copy.deepcopy(dict(plain))
  fields = {name: value for name, value in plain.items() if name != "model_type"}
  fields |= {"experts_implementation": "eager"} if plain["model_type"] in MIXTURES else {}
  return transformers.AutoConfig.for_model(plain["model_type"], attn_implementation="eager", **fields)


def written(cfg):
  """The settings that transformers writes into config.json for its config."""
  return json.loads(cfg.to_json_string())


def model(plain, tensors, dtype=None):
  """Its decoder with these tensors, eager attention, in evaluation; every tensor of its own is given."""
  out = transformers.AutoModelForCausalLM.from_config(config(plain), attn_implementation="eager").eval()
  in_files, in_memory = IN_MEMORY.get(plain["model_type"], ("", ""))
  tensors = stacked(plain["model_type"], tensors)
  named = {in_memory if name == in_files else name: torch.tensor(x) for name, x in tensors.items()}
  if out.config.tie_word_embeddings:
    named["lm_head.weight"] = next(x for name, x in named.items() if name.split(".")[-2] in EMBEDDINGS)
  out.load_state_dict(named)
  return out if dtype is None else out.to(dtype)


def stacked(model_type, tensors):
  """Tensors by the names of the files as it has them in memory: all experts of a layer in one, gate above up."""
  if model_type not in EXPERTS:
    return tensors
  block, names = EXPERTS[model_type]
  out, experts = {}, {}
  for name, x in tensors.items():
    layer, at, rest = name.partition(f".{block}.experts.")
    if at:
      number, kind, _ = rest.split(".")
      experts.setdefault(layer, {})[kind, int(number)] = x
    else:
      out[name.replace(f".{block}.", ".mlp.")] = x
  for layer, parts in experts.items():
    gate, up, down = (np.stack([parts[kind, j] for j in range(len(parts) // 3)]) for kind in names)
    out[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], 1)
    out[f"{layer}.mlp.experts.down_proj"] = down
  return out


EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")


@functools.cache
def row_model(row):
  """The model of a row, which no test changes."""
  return model(settings(row), built(row).tensors)


def logits(its_model, ids, pos=None):
  """Its logits, float32 [B, T, V]."""
  pos = {} if pos is None else {"position_ids": torch.tensor(np.asarray(pos)).long()}
  with torch.no_grad():
    return its_model(torch.tensor(ids).long(), use_cache=False, **pos).logits.float().numpy()


def hidden_states(its_model, ids):
  """What enters each layer, and what leaves the last one after the final norm."""
  with torch.no_grad():
    out = its_model(torch.tensor(ids).long(), use_cache=False, output_hidden_states=True)
  return [x.float().numpy() for x in out.hidden_states]


def gradients(its_model, ids):
  """(loss, {name in the files: gradient}) of the mean cross entropy of the next tokens."""
  its_model.zero_grad()
  ids = torch.tensor(ids).long()
  out = its_model(ids, use_cache=False).logits[:, :-1]
  loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  in_files, in_memory = IN_MEMORY.get(its_model.config.model_type, ("", ""))
  named = its_model.named_parameters()
  grads = {in_files if name == in_memory else name: p.grad.numpy() for name, p in named}
  return loss.item(), grads
