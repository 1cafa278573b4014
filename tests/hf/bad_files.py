"""Bad model directories, a row each: how a good one is damaged, which error that is, and its reason.

A row is (damage(directory), error, regular expression of the reason).  WHOLE rows start from a directory with one file of
weights, SHARDED ones from two and an index, TOKENIZER ones are met by `load_tokenizer`, VALUES ones only where weights are
read, which the doctor does not do.  To add a row, add a line: test_bad_files.py runs it through `hf.load` and the doctor.
"""

import ml_dtypes
import numpy as np
from bad_headers import HEADERS
from bad_settings import CONFIGURED, TOKENIZER  # noqa: F401
from damage import (
  INDEX,
  PICKLE,
  SHARD,
  SPECIAL,
  UP,
  WEIGHTS,
  both,
  content,
  cut,
  gone,
  index,
  instead,
  moved,
  settings,
  tensors,
  typed,
  value,
)

from jaxllm.errors import CheckpointError
from jaxllm.hf import header

PICKLES = [
  "pytorch_model.bin",
  "model.pt",
  "consolidated.00.pth",
  "model.ckpt",
  "flax.pkl",
  "w.npz",
  "w.npy",
  "m.joblib",
]
PICKLES = {
  f"only {name}": (
    both(gone(WEIGHTS), content(name, PICKLE)),
    f"found {name}, expected model.safetensors: pickles run code .*save_pretrained",
  )
  for name in [*PICKLES, "m.pickle"]
}

WHOLE = {group: (damage, CheckpointError, reason) for group, (damage, reason) in (HEADERS | PICKLES).items()}
WHOLE |= {
  f"{name} is {what}": (instead(name, make), CheckpointError, f"{name}: {reason}")
  for name in (WEIGHTS, "config.json", "generation_config.json")
  for what, (make, reason) in SPECIAL.items()
  if (name, what) not in {("config.json", "a terabyte"), ("generation_config.json", "a terabyte")}
}
WHOLE |= {
  "no weights": (gone(WEIGHTS), CheckpointError, "no model.safetensors or model.safetensors.index.json"),
  "no config.json": (gone("config.json"), CheckpointError, "no config.json; give the directory"),
  "missing": (tensors(lambda t: t.pop(UP)), CheckpointError, rf"missing: {UP} \[80, 48\]"),
  "unexpected": (
    tensors(lambda t: t.update({"model.extra": t[UP]})),
    CheckpointError,
    r"unexpected: model.extra of model.safetensors \[80, 48\]",
  ),
  "transposed": (
    tensors(lambda t: t.update({UP: t[UP].T.copy()})),
    CheckpointError,
    rf"shape: {UP} of model.safetensors is \[48, 80\], expected \[80, 48\] \(hidden_size = 48, intermediate_size = 80\)",
  ),
  "shape of the vocabulary": (
    tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:60].copy()})),
    CheckpointError,
    r"is \[60, 48\], expected \[61, 48\] \(vocab_size = 61, hidden_size = 48\)",
  ),
  "shape of k": (
    tensors(lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((64, 48), np.float32)})),
    CheckpointError,
    r"is \[64, 48\], expected \[32, 48\] \(hidden_size = 48, num_key_value_heads = 2, head_dim = 16\)",
  ),
  "a layer less": (
    tensors(lambda t: [t.pop(name) for name in list(t) if ".2." in name]),
    CheckpointError,
    r"the files hold 2 layers, expected 3 \(num_hidden_layers = 3\).*missing: model.layers.2.mlp.up_proj.weight",
  ),
  "a layer more": (
    tensors(lambda t: t.update({name.replace(".2.", ".3."): x for name, x in t.items() if ".2." in name})),
    CheckpointError,
    r"the files hold 4 layers, expected 3 \(num_hidden_layers = 3\).*unexpected: model.layers.3.mlp.up_proj.weight",
  ),
  "no head": (
    tensors(lambda t: t.pop("lm_head.weight")),
    CheckpointError,
    r"missing: lm_head.weight \[61, 48\]",
  ),
  "another head beside a tied one": (
    settings(tie_word_embeddings=True),
    CheckpointError,
    "tied: lm_head.weight of .* is not model.embed_tokens.weight .*they differ first in row 0.*tie_word_embeddings",
  ),
  "a tied head of another type": (
    both(
      settings(tie_word_embeddings=True),
      tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].astype(np.float16)})),
    ),
    CheckpointError,
    "tied: lm_head.weight of model.safetensors is float16",
  ),
} | {
  f"a tensor of {kind}": (
    typed(UP, kind),
    CheckpointError,
    f"type: {UP} of model.safetensors is .*expected float32",
  )
  for kind in header.DTYPES
  if kind not in ("F32", "F16", "BF16")
}

WHOLE |= CONFIGURED

NAMES = [
  *(
    "../x.safetensors",
    "/abs.safetensors",
    "a/x.safetensors",
    "a/../../x.safetensors",
    "..\\x.safetensors",
    "a\\x.safetensors",
  ),
  *(
    "C:x.safetensors",
    "C:\\x.safetensors",
    "\\\\host\\x.safetensors",
    "//host/x.safetensors",
    "./x.safetensors",
    "x.bin",
    "",
  ),
  *(
    ".",
    "..",
    "...",
    "/",
    "\\",
    "~",
    "~/x.safetensors",
    "~root/x.safetensors",
    "$HOME/x.safetensors",
    "%2e%2e/x.safetensors",
  ),
  *(
    3,
    None,
    True,
    1.5,
    [],
    ["x.safetensors"],
    {},
    {"a": 1},
    "x\0.safetensors",
    "x.safetensors\0",
    "\0",
    ".safetensors",
  ),
  *(
    "x.safetensors\n",
    "\nx.safetensors",
    " x.safetensors",
    "x.safetensors ",
    "x y.safetensors",
    "x.safetensors/",
    "x.SAFETENSORS",
  ),
  *(
    "http://x/y.safetensors",
    "file:///x.safetensors",
    "hf://o/n/x.safetensors",
    "n" * 300 + ".safetensors",
    "n" * 10_000,
  ),
  *(
    "\uff0e\uff0e/x.safetensors",
    "\uff0e\uff0e.safetensors",
    "\u2025/x.safetensors",
    "x\u2215y.safetensors",
    "x\u202e.safetensors",
  ),
  *(
    "é.safetensors",
    "-x.safetensors",
    ".x.safetensors",
    "..x.safetensors",
    "x.safetensors.bin",
    "config.json",
    "x.safetensors:stream",
  ),
  *(
    "CON:",
    "|id.safetensors",
    "x;id.safetensors",
    "`id`.safetensors",
    "/dev/zero",
    "/proc/self/environ",
    "../canary.safetensors",
  ),
]
"""What is no plain name of a file of weights."""

SHARDED = (
  {
    f"{name} is {what}": (instead(name, make), CheckpointError, f"{name}: {reason}")
    for name in (INDEX, SHARD)
    for what, (make, reason) in SPECIAL.items()
    if (name, what) != (SHARD, "a link to nothing")
  }
  | {
    "a shard is missing": (
      gone(SHARD),
      CheckpointError,
      rf"{SHARD}: no such file; it should hold \d+ tensors \(.*, \.\.\.\)",
    ),
    "a shard is cut short": (
      cut(SHARD, 9),
      CheckpointError,
      rf"{SHARD}: found [0-9,]+ bytes, expected [0-9,]+: cut short, from model",
    ),
    "a shard twice": (
      lambda directory: (directory / SHARD).write_bytes(
        (directory / SHARD.replace("2-of", "1-of")).read_bytes()
      ),
      CheckpointError,
      rf"{SHARD}: lacks .*, which the index has there.*{SHARD}: holds .*, which the index has in model-00001",
    ),
    "a tensor more than the index has": (
      moved(SHARD, UP, None),
      CheckpointError,
      f"holds {UP}, not in the index",
    ),
    "a tensor elsewhere": (moved(SHARD, UP, "x.safetensors"), CheckpointError, "x.safetensors: no such file"),
    "an index of no tensors": (index({}), CheckpointError, f"{INDEX}: found no weight_map"),
    "an index that is a list": (index([]), CheckpointError, f"{INDEX}: found no weight_map"),
    "an index of nothing": (content(INDEX, "{}"), CheckpointError, f"{INDEX}: found no weight_map"),
    "an index that is not JSON": (content(INDEX, "x"), CheckpointError, f"{INDEX}: not JSON"),
    "an index with a tensor twice": (
      content(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'),
      CheckpointError,
      f"{INDEX}: found the key 'a' twice",
    ),
    "an index with a name that does not print": (
      index({"a\n": SHARD}),
      CheckpointError,
      "weight_map: 'a.n': .*do not print",
    ),
  }
  | {
    f"weight_map {i}": (
      index({"a": name}),
      CheckpointError,
      rf"{INDEX}: weight_map has 'a' in .*, expected the plain name",
    )
    for i, name in enumerate(NAMES[::8])  # all of them where openings are watched
  }
)

BF16 = ml_dtypes.bfloat16
VALUES = {
  "nan": (
    value(UP, (7, 5), np.nan),
    rf"{UP} of model.safetensors: 1 value is NaN or infinite, the first at \[7, 5\]: nan",
  ),
  "infinities": (
    both(value(UP, np.s_[70:, 3], -np.inf), value(UP, (79, 47), np.inf)),
    r"11 values are NaN or infinite, the first at \[70, 3\]: -inf",
  ),
  "nan of bfloat16": (
    tensors(lambda t: t.update({UP: np.full((80, 48), np.nan, BF16)})),
    rf"{UP} of model.safetensors: 3,840 values are NaN or infinite, the first at \[0, 0\]: nan",
  ),
  "infinity of float16": (
    tensors(lambda t: t.update({UP: np.full((80, 48), np.inf, np.float16)})),
    rf"{UP} of model.safetensors: 3,840 values",
  ),
}
VALUES = {name: (damage, CheckpointError, reason) for name, (damage, reason) in VALUES.items()}
