"""Small checkpoints of every weight layout, written by safetensors from layouts spelled out here."""

import dataclasses
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe
from jaxllm.hf.family import Blocks, Family, Grouped, Interleaved, Key
from jaxllm.hf.match import Source
from jaxllm.leaf import dense
from jaxllm.nn.shapes import expected_shapes

PLAIN = dict(
  vocab_size=61,
  hidden_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
)
PLAIN |= dict(intermediate_size=80, tie_word_embeddings=False, dtype="float32")
FIELDS = dict(hidden_size="embed_dim", num_hidden_layers="num_layers", num_attention_heads="num_heads")
FIELDS |= dict(
  num_key_value_heads="num_kv_heads", intermediate_size="mlp_dim", tie_word_embeddings="tie_embeddings"
)
BIASES = ("q", "k", "v", "o")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config(plain=PLAIN):
  """The ModelConfig of such settings; k and v have head_dim and num_key_value_heads of their own, as in Llama."""
  if plain["num_attention_heads"] % plain["num_key_value_heads"]:
    raise ConfigError("num_key_value_heads")
  return ModelConfig(**{FIELDS.get(key, key): value for key, value in plain.items()})


def source(directory, plain=PLAIN):
  """Where messages say it is from."""
  return Source(str(directory / "config.json"), plain, config)


def _norms():
  names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
  return [
    Key(f"model.layers.{{i}}.{theirs}.weight", (f"layers/{{i}}/{ours}/scale",))
    for theirs, ours in names.items()
  ]


def _ends(cfg):
  ends = [Key("model.embed_tokens.weight", ("embed",)), Key("model.norm.weight", ("final_norm/scale",))]
  return ends if cfg.tie_embeddings else [*ends, Key("lm_head.weight", ("head",), "oi")]


def _linear(theirs, ours, layout=None, stored="oi", bias=()):
  name, layout = f"model.layers.{{i}}.{theirs}", {} if layout is None else {"layout": layout}
  keys = [Key(f"{name}.weight", tuple(f"layers/{{i}}/{each}/w" for each in ours), stored, **layout)]
  if bias:
    keys.append(Key(f"{name}.bias", tuple(f"layers/{{i}}/{each}/bias" for each in ours), **layout))
  return keys


ATTENTION, MLP = ("attn/q", "attn/k", "attn/v"), ("mlp/gate", "mlp/up")
QKV = Blocks(lambda cfg: [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)])
GATE_UP = Blocks(lambda cfg: [cfg.mlp_dim] * 2)


def separate(cfg):
  """Llama."""
  parts = {f"{name}_proj": f"attn/{name}" for name in "qkvo"}
  keys = [
    key for name, path in parts.items() for key in _linear(f"self_attn.{name}", (path,), bias=cfg.biases)
  ]
  keys += [key for name in ("gate", "up", "down") for key in _linear(f"mlp.{name}_proj", (f"mlp/{name}",))]
  return [*_ends(cfg), *_norms(), *keys]


def blocks(cfg):
  """Phi-3."""
  keys = [
    *_linear("self_attn.qkv_proj", ATTENTION, QKV, bias=cfg.biases),
    *_linear("self_attn.o_proj", ("attn/o",), bias=cfg.biases),
  ]
  keys += [*_linear("mlp.gate_up_proj", MLP, GATE_UP), *_linear("mlp.down_proj", ("mlp/down",))]
  return [*_ends(cfg), *_norms(), *keys]


def grouped(cfg):
  """Falcon-40B, whose groups have more queries than one."""
  return [_to_grouped(key) if "qkv" in key.theirs else key for key in blocks(cfg)]


def _to_grouped(key):
  return dataclasses.replace(key, layout=Grouped())


def conv(cfg):
  """GPT-2: every matrix [in, out] but the head."""
  stored = lambda key: dataclasses.replace(key, stored="io") if key.stored and "{i}" in key.theirs else key
  return list(map(stored, blocks(cfg)))


def _experts(*keys):
  """Of attention as `separate`, a router, and these keys."""
  router = Key("model.layers.{i}.mlp.gate.weight", ("layers/{i}/mlp/router/w",), "oi")
  return lambda cfg: [key for key in separate(cfg) if "/mlp/" not in key.ours[0]] + [router, *keys]


def _paths(*names):
  return tuple(f"layers/{{i}}/mlp/experts/{name}/w" for name in names)


EXPERTS = 3
AT = "model.layers.{i}.mlp.experts."
stacked = _experts(
  Key(f"{AT}{{j}}.gate_up_proj.weight", _paths("gate", "up"), "oi", GATE_UP, stack=EXPERTS),
  Key(f"{AT}{{j}}.down_proj.weight", _paths("down"), "oi", stack=EXPERTS),
)
"""Each expert's matrices as tensors of their own, of which two are fused."""
turned = _experts(
  Key(f"{AT}gate_up_proj", _paths("gate", "up"), "io", Interleaved()),
  Key(f"{AT}down_proj", _paths("down"), "io"),
)
"""GPT-OSS: all experts in one tensor, the columns of gate and up in turn."""


def of_layout(layout, cfg):
  """The config of a layout: those of experts have some."""
  return dataclasses.replace(cfg, mlp=Moe(num_experts=EXPERTS)) if layout in ("stacked", "turned") else cfg


def family(keys):
  """A family with these keys."""
  unused = (r"model\.layers\.[0-9]+\.self_attn\.(rotary_emb\.inv_freq|masked_bias)",)
  return Family("tiny", "TinyForCausalLM", read=None, write=None, keys=keys, unused=unused)


LAYOUTS = dict(separate=separate, blocks=blocks, grouped=grouped, conv=conv, stacked=stacked, turned=turned)


def params(cfg, dtype=np.float32, seed=0):
  """Random parameters, NumPy, [in, out]."""
  rng = np.random.default_rng(seed)
  draw = lambda shape: (0.2 * rng.standard_normal(shape)).astype(dtype)
  return tree.unflatten({path: draw(shape) for path, shape in expected_shapes(cfg).items()})


def tensors(layout, cfg, weights):
  """What the files of `layout` hold of the parameters, spelled out."""
  out = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["final_norm"]["scale"]}
  if not cfg.tie_embeddings:
    out["lm_head.weight"] = weights["head"].T
  for i, layer in weights["layers"].items():
    at = f"model.layers.{i}."
    out[at + "input_layernorm.weight"] = layer["attn_norm"]["scale"]
    out[at + "post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
    mlp = layer["mlp"]
    if "experts" in mlp:
      out |= {at + name: x for name, x in _of_experts(layout, mlp).items()}
      mlp = {}
    linear = {name: part["w"] for name, part in (layer["attn"] | mlp).items()}
    bias = {name: part["bias"] for name, part in layer["attn"].items() if "bias" in part}
    for kind, parts, axis in (("weight", linear, 1), ("bias", bias, 0)):
      if not parts:
        continue
      turn = (lambda w: w) if kind == "bias" or layout == "conv" else np.transpose
      if layout in ("separate", "stacked", "turned"):
        named = {f"self_attn.{name}_proj": parts[name] for name in "qkvo"}
      else:
        named = {"self_attn.o_proj": parts["o"], "self_attn.qkv_proj": _qkv(layout, cfg, parts, axis)}
      if kind == "weight" and "gate" in parts:
        mlp = {"gate_proj": parts["gate"], "up_proj": parts["up"]}
        if layout != "separate":
          mlp = {"gate_up_proj": np.concatenate([parts["gate"], parts["up"]], 1)}
        named |= {f"mlp.{name}": w for name, w in (mlp | {"down_proj": parts["down"]}).items()}
      out |= {f"{at}{name}.{kind}": np.ascontiguousarray(turn(w)) for name, w in named.items()}
  return {name: np.ascontiguousarray(x) for name, x in out.items()}


def _of_experts(layout, mlp):
  """The tensors of a router and its experts, one at a time or one column at a time."""
  gate, up, down = (mlp["experts"][name]["w"] for name in ("gate", "up", "down"))
  out = {"mlp.gate.weight": mlp["router"]["w"].T}
  if layout == "turned":
    columns = [w[..., c] for c in range(gate.shape[-1]) for w in (gate, up)]
    return out | {"mlp.experts.gate_up_proj": np.stack(columns, -1), "mlp.experts.down_proj": down}
  for j in range(EXPERTS):
    out[f"mlp.experts.{j}.gate_up_proj.weight"] = np.concatenate([gate[j].T, up[j].T])
    out[f"mlp.experts.{j}.down_proj.weight"] = down[j].T
  return out


def _qkv(layout, cfg, parts, axis):
  """One after the other or, for "grouped", the heads of each key/value head together: G queries, a key, a value."""
  if layout != "grouped":
    return np.concatenate([parts["q"], parts["k"], parts["v"]], axis)
  heads = {name: np.split(parts[name], parts[name].shape[axis] // cfg.head_dim, axis) for name in "qkv"}
  G, order = cfg.num_heads // cfg.num_kv_heads, []
  for k in range(cfg.num_kv_heads):
    order += [*heads["q"][k * G : (k + 1) * G], heads["k"][k], heads["v"][k]]
  return np.concatenate(order, axis)


def write(directory, layout="separate", plain=PLAIN, dtype=np.float32, shards=1, seed=0, change=None):
  """A model directory, and what is in it: (ModelConfig, parameters, tensors).  change: a function that alters the tensors."""
  directory.mkdir(parents=True, exist_ok=True)
  cfg = of_layout(layout, config(plain))
  weights = params(cfg, dtype, seed)
  stored = tensors(layout, cfg, weights)
  if change is not None:
    change(stored)
  (directory / "config.json").write_text(json.dumps(plain))
  if shards == 1:
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
  else:
    names, where = sorted(stored), {}
    for i in range(shards):
      file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
      save_file({name: stored[name] for name in names[i::shards]}, directory / file)
      where |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
  return cfg, weights, stored


def assert_equal_trees(found, expected):
  """The same leaves, bit for bit, of the same types."""
  found, expected = tree.flatten(found), tree.flatten(expected)
  assert found.keys() == expected.keys()
  for path, leaf in expected.items():
    mine = np.asarray(dense(found[path]))
    assert mine.dtype == leaf.dtype, path
    assert mine.tobytes() == leaf.tobytes(), path
