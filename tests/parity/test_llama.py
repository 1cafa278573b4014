"""Live parity with transformers: a tiny random Llama on both sides, far beyond its trained length."""

import dataclasses

import components
import jax
import numpy as np
import oracle
import pytest
from model_cases import params
from model_checks import relative_error

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Context, Transformer
from jaxllm.norm import RMSNorm
from jaxllm.position import Rope

TRAINED, B, T = 32, 2, 96
CFG = ModelConfig(
  vocab_size=61,
  embed_dim=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=80,
  layers=(Layer(Rope(base=5000.0, original_length=TRAINED)),),
  norm=RMSNorm(1e-5),
)
IDS = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, T), np.int32)

# method: (its fields, transformers' rope_parameters)
METHODS = {
  "rope": ({}, {"rope_type": "default"}),
  "pi": ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
  "dynamic_ntk": ({"factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}),
  "yarn": (
    {"factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
  ),
}
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
NAMES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def state_dict(weights):
  """Their names and layouts ([out, in]) of our weights."""
  theirs = {"model.embed_tokens.weight": weights["embed"], "lm_head.weight": weights["head"].T}
  theirs["model.norm.weight"] = weights["final_norm"]["scale"]
  for i, layer in weights["layers"].items():
    at = f"model.layers.{i}"
    theirs[f"{at}.input_layernorm.weight"] = layer["attn_norm"]["scale"]
    theirs[f"{at}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
    for name, w in (layer["attn"] | layer["mlp"]).items():
      theirs[f"{at}.{NAMES[name]}.weight"] = w["w"].T
  return theirs


def llama(rope_parameters, weights, first=0):
  """transformers' logits, of tokens at positions from `first` on."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers", minversion="5.0")
  config = transformers.LlamaConfig(
    vocab_size=CFG.vocab_size,
    hidden_size=CFG.embed_dim,
    intermediate_size=CFG.mlp_dim,
    num_hidden_layers=CFG.num_layers,
    num_attention_heads=CFG.num_heads,
    num_key_value_heads=CFG.num_kv_heads,
    head_dim=CFG.head_dim,
    max_position_embeddings=TRAINED,
    rms_norm_eps=CFG.norm.eps,
    rope_parameters=rope_parameters | {"rope_theta": CFG.layers[0].position.base},
    attn_implementation="eager",
  )
  model = transformers.LlamaForCausalLM(config).eval()
  model.load_state_dict(
    {name: torch.tensor(np.ascontiguousarray(w)) for name, w in state_dict(weights).items()}
  )
  with torch.no_grad():
    pos = torch.arange(first, first + T)[None]
    return model(torch.tensor(IDS, dtype=torch.long), position_ids=pos, use_cache=False).logits.numpy()


@pytest.fixture(scope="module")
def ours():
  """Our logits of the table of a method: one program for all of them."""
  model = Transformer(CFG)
  return jax.jit(lambda weights, rope: model.apply({"params": weights}, IDS, rope=rope)[0])


@pytest.mark.parametrize("name", METHODS)
def test_logits(ours, name):
  fields, rope_parameters = METHODS[name]
  cfg, weights = CFG.with_position(name, **fields), params(CFG)
  found = np.asarray(ours(weights, cfg.rope_tables(seq_len=T)))
  theirs = llama(rope_parameters, weights)
  error = relative_error(found, theirs)
  assert error <= 1e-5
  components.measured([name, "pre"], "transformers' Llama", error)
  np.testing.assert_array_equal(found.argmax(-1), theirs.argmax(-1))
  # and the float64 decoder says the same of both: their dynamic base is that of the whole sequence
  assert relative_error(found, oracle.logits(cfg, weights, IDS, seq_len=T)) <= 5e-6


def test_logits_at_long_positions():
  """transformers' own at a million need its float32 angles; exact ones, which know the distance only, are apart by 1e-2."""
  weights, first = params(CFG), 1_000_000
  fields, rope_parameters = METHODS["yarn"]
  theirs = llama(rope_parameters, weights, first)

  def error(precision):
    cfg = dataclasses.replace(CFG.with_position("yarn", **fields), rope_precision=precision)
    pos = first + np.arange(T, dtype=np.int32)[None]
    run = jax.jit(lambda weights: Transformer(cfg).apply({"params": weights}, IDS, Context(pos=pos))[0])
    return relative_error(run(weights), theirs)

  found = error("hf")
  assert found <= 1e-5
  components.measured("rope_precision", "transformers' Llama at a million", found)
  assert error("exact") > 1e-3


def test_row_wise_dynamic_ntk_differs_from_theirs():
  """Decoding can keep each query under the base of its own length, not a whole sequence under one base."""
  cfg = CFG.with_position("dynamic_ntk", factor=4.0)
  row_wise, pinned = (oracle.logits(cfg, params(CFG), IDS, seq_len=n) for n in (None, T))
  assert relative_error(row_wise[:, -1], pinned[:, -1]) > 1e-3  # even where both use the same base
  one_layer = dataclasses.replace(cfg, num_layers=1)
  row_wise, pinned = (oracle.logits(one_layer, params(CFG), IDS, seq_len=n) for n in (None, T))
  assert relative_error(row_wise[:, -1], pinned[:, -1]) < 1e-12  # which one layer would hide
