"""The other side of `experiments.decoding --llama_cpp`: a Llama of Hugging Face's as a GGUF file in Q8_0, decoded by llama.cpp.

Needs llama-cpp-python, which pip builds from source, and gguf.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from pathlib import Path

from jaxllm.errors import ConfigError

NAMES = {
  r"model\.embed_tokens\.weight": "token_embd.weight",
  r"model\.norm\.weight": "output_norm.weight",
  r"lm_head\.weight": "output.weight",
  r"model\.layers\.(\d+)\.input_layernorm\.weight": r"blk.\1.attn_norm.weight",
  r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"blk.\1.ffn_norm.weight",
  r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight": r"blk.\1.attn_\2.weight",
  r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight": r"blk.\1.attn_output.weight",
  r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight": r"blk.\1.ffn_\2.weight",
}
"""Names of a Llama's tensors in GGUF, by those of Hugging Face."""

NORM = 1e-6
"""LlamaConfig's rms_norm_eps, where config.json has none."""


def missing() -> list[str]:
  """The packages that it needs and that are not installed."""
  needed = {"llama-cpp-python": "llama_cpp", "gguf": "gguf"}
  return [package for package, module in needed.items() if importlib.util.find_spec(module) is None]


def gguf_names(directory: str) -> dict[str, str]:
  """Its tensors' names in GGUF, by those of Hugging Face; raises ConfigError for what llama.cpp would compute otherwise.

  Without the head beside a tied embedding, which llama.cpp takes for both where a file has no output.weight.
  """
  from jaxllm.hf.files import Checkpoint

  def refused(found: str, expected: str) -> ConfigError:
    return ConfigError(f"--llama_cpp: {directory}: found {found}, expected {expected}; leave the flag out")

  plain = _config(directory)
  if (kind := plain.get("model_type")) != "llama":
    raise refused(f"model_type = {kind!r}", "'llama'")
  scaling = _rope(plain).get("rope_scaling") or _rope(plain)
  if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
    raise refused(f"RoPE of {kind}", "the default")
  if (act := plain.get("hidden_act", "silu")) != "silu":
    raise refused(f"hidden_act = {act!r}", "'silu'")
  found = {}
  for name in Checkpoint(directory).tensors:
    pattern = next((pattern for pattern in NAMES if re.fullmatch(pattern, name)), None)
    if pattern is None:
      raise refused(name, "the tensors of a Llama")
    if not (name == "lm_head.weight" and plain.get("tie_word_embeddings")):
      found[name] = re.sub(pattern, NAMES[pattern], name)
  return found


def _config(directory: str) -> dict:
  return json.loads((Path(directory) / "config.json").read_text())


def _rope(plain: dict) -> dict:
  """Where config.json has RoPE's settings: apart, or among the others as older ones do."""
  return plain.get("rope_parameters") or plain


def write(directory: str, path: str) -> None:
  """The checkpoint as the GGUF file `path`, all its matrices in Q8_0: 32 numbers of 8 bits with a scale of 16.

  llama.cpp turns neighbouring coordinates where Hugging Face turns halves of a head, so rows of q and k change places.
  Raises ConfigError as `gguf_names` does.
  """
  theirs = gguf_names(directory)
  import gguf
  import numpy as np

  from jaxllm.hf.files import Checkpoint

  plain = _config(directory)
  heads = {"q": plain["num_attention_heads"], "k": plain["num_key_value_heads"]}
  head_dim = plain.get("head_dim") or plain["hidden_size"] // heads["q"]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_vocab_size(plain["vocab_size"])
  writer.add_tokenizer_model("none")
  writer.add_context_length(plain["max_position_embeddings"])
  writer.add_embedding_length(plain["hidden_size"])
  writer.add_feed_forward_length(plain["intermediate_size"])
  writer.add_block_count(plain["num_hidden_layers"])
  writer.add_head_count(heads["q"])
  writer.add_head_count_kv(heads["k"])
  writer.add_rope_dimension_count(head_dim)
  writer.add_key_length(head_dim)
  writer.add_value_length(head_dim)
  writer.add_rope_freq_base(_rope(plain).get("rope_theta", 10_000.0))
  writer.add_layer_norm_rms_eps(plain.get("rms_norm_eps", NORM))
  checkpoint = Checkpoint(directory)
  for name, own in theirs.items():
    value = checkpoint.view(name).astype(np.float32)
    if turned := re.search(r"attn_([qk])\.", own):
      halves = value.reshape(heads[turned[1]], 2, head_dim // 2, -1)
      value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
    if value.ndim == 1:
      writer.add_tensor(own, value)
    else:
      q8 = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(own, gguf.quantize(value, q8), raw_dtype=q8)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def side(path: str, ids: list[int], new: int, reads: int, started: float) -> dict:
  """Seconds to the first token and for the others, of each read, and from `started` (of the process) to the very first.

  Greedily: ids, of one prompt, are read in one call, later tokens one at a time.  tokens: those of the last read.
  """
  import llama_cpp
  import numpy as np

  threads = len(os.sched_getaffinity(0))
  llama_cpp.llama_backend_init()
  quiet = llama_cpp.llama_log_callback(lambda *_: None)  # it is called as long as the process lives
  llama_cpp.llama_log_set(quiet, None)
  model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
  settings = llama_cpp.llama_context_default_params()
  settings.n_ctx = settings.n_batch = len(ids) + new
  settings.n_threads = settings.n_threads_batch = threads
  vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

  def next_token(context, tokens: list[int]) -> int:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
    if code := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
      raise RuntimeError(f"llama_decode: found {code}, expected 0")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(vocab_size,))))

  def read() -> tuple[float, float, list[int]]:
    context = llama_cpp.llama_init_from_model(model, settings)
    start = time.perf_counter()
    tokens = [next_token(context, ids)]
    first = time.perf_counter()
    for _ in range(new - 1):
      tokens.append(next_token(context, tokens[-1:]))
    end = time.perf_counter()
    llama_cpp.llama_free(context)
    return first - start, end - first, tokens

  before = time.time() - started
  prefill, _, _ = read()
  found = [read() for _ in range(reads)]
  return {"first": before + prefill, "reads": [one[:2] for one in found], "tokens": found[-1][2]}
