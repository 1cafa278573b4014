"""Write a model that experiments.length_extrapolation has trained as a directory that transformers opens.

The model is a Llama: its embeddings are multiplied by sqrt(width) in the file, as a Llama has no multiplier for them, and its
tokenizer.json has bytes as ids.  --method stretches it first.  With --check, in place of --out, windows of the run's text are
scored here and by transformers, under plain RoPE and three methods, and a table shows both.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, methods, run_app

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  "run", "runs/length_extrapolation", "the --out of the run that trained the model", flag_values=FLAGS
)
flags.DEFINE_enum("scheme", "rope", list(methods.SCHEMES), "which of its models", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "the seed of the model", flag_values=FLAGS)
flags.DEFINE_enum(
  "method", "none", list(methods.METHODS), "position method to export it with", flag_values=FLAGS
)
flags.DEFINE_float("factor", None, "context multiplier of the method", flag_values=FLAGS)
flags.DEFINE_string("out", None, "the directory to write", flag_values=FLAGS)
flags.DEFINE_bool(
  "check",
  False,
  "compare perplexity here and in transformers (the extra `parity`); 1 where they are not equal to 1e-4",
  flag_values=FLAGS,
)
flags.DEFINE_float("times", 8.0, "--check: windows of so many times the trained length", flag_values=FLAGS)
flags.DEFINE_integer("windows", 4, "--check: how many windows", flag_values=FLAGS)

CHECKED = ("none", "pi", "yarn", "dynamic_ntk")
CLOSE = 1e-4


def check(f) -> None:
  """Refuse what no model could be written as."""
  if reason := methods.not_applicable(methods.SCHEMES[f.scheme], f.method):
    raise ConfigError(f"--method={f.method} with --scheme={f.scheme}: {reason}; use --method=none")
  stretches = methods.METHODS[f.method].stretches
  if f.factor is None and stretches:
    raise ConfigError(
      f"--method={f.method}: it takes a factor; give --factor, the context over the trained length"
    )
  if f.factor is not None:
    choices.positive("factor", f.factor)
    if not stretches:
      raise ConfigError(f"--factor={f.factor} with --method={f.method}, which takes no factor; leave it out")
  if methods.METHODS[f.method].log_n:
    raise ConfigError(
      f"--method={f.method}: transformers does not scale queries by log n; use a method without it"
    )
  if f.check == bool(f.out):
    raise ConfigError(
      "give one of --out=DIR, to write the model there, and --check, to compare it with transformers"
    )
  if f.out and (held := _model_in(Path(f.out))):
    raise ConfigError(f"--out={f.out}: holds a model already ({held}); give another --out, or remove it")
  if f.check and f.method != "none":
    raise ConfigError(
      f"--check with --method={f.method}: it has methods of its own ({', '.join(CHECKED)}); leave it out"
    )
  choices.positive("times", f.times)
  if f.times < 1:
    raise ConfigError(f"--times={f.times}: expected at least 1")
  choices.positive("windows", f.windows)


def _model_in(directory: Path) -> str | None:
  """A file of a model that is in a directory, by name."""
  files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
  return next((path.name for path in files if os.path.lexists(path)), None)


def llama_config(cfg, train_length: int):
  """The config that the parameters of `as_llama` have."""
  norm = dataclasses.replace(cfg.norm, multiply_in="input")
  return dataclasses.replace(cfg, embed_scale=1.0, norm=norm, dtype="float32", context_length=train_length)


def as_llama(cfg, params, train_length: int):
  """(cfg, params) of the same model in the form that Llama's settings can say.

  The model computes embed * sqrt(D) in float32; here that product, bit for bit, becomes the embedding.  The order of the norm's
  cast and gain is no matter in float32, which the parameters are.
  """
  import numpy as np

  embed = np.asarray(params["embed"], np.float32) * np.float32(cfg.embed_scale)
  return llama_config(cfg, train_length), {**params, "embed": embed}


def stretched(cfg, name: str, factor: float | None, train_length: int):
  """The config with a method on it, and the length that it then serves."""
  method = methods.METHODS[name]
  if method.position is None:
    return cfg
  given = {"factor": factor} if method.stretches else {}
  # transformers counts dynamic NTK from max_position_embeddings, which stays the trained length
  longer = factor if method.stretches and name != "dynamic_ntk" else 1.0
  cfg = cfg.with_position(method.position, original_length=train_length, **given)
  return dataclasses.replace(cfg, context_length=round(train_length * longer))


def main(f) -> int:
  """Write the model, or compare it."""
  from experiments.restored import load, trained_length
  from jaxllm import hf

  run = Path(f.run)
  cfg, params = load(run, f.scheme, f.seed)
  train_length = trained_length(run)
  cfg, params = as_llama(cfg, params, train_length)
  if f.check:
    return compare(run, cfg, params, train_length, f)
  cfg = stretched(cfg, f.method, f.factor, train_length)
  hf.save(f.out, cfg, params, hf.byte_tokenizer(), pinned=f.method == "dynamic_ntk")
  if f.method == "dynamic_ntk":
    print(
      "note: transformers takes one base for all of a call, here each position has its own: equal where the length is pinned"
    )
  print(f"{f.out}: {f.scheme}, seed {f.seed}, method {f.method}, for transformers and --model={f.out}")
  return 0


def compare(run: Path, cfg, params, train_length: int, f) -> int:
  """The table of --check: perplexity of the trained model here, and of what is exported in transformers, on equal windows."""
  from experiments.restored import load
  from jaxllm import hf
  from jaxllm.evaluate.windows import cut_windows

  trained, own = load(run, f.scheme, f.seed)
  trained = dataclasses.replace(trained, dtype="float32")  # as transformers computes
  length = round(f.times * train_length)
  windows = cut_windows(validation(run), length, length, f.windows)
  factors = {name: f.times if methods.METHODS[name].stretches else None for name in CHECKED}
  tables = [
    stretched(trained, name, factor, train_length).rope_tables(seq_len=length)
    for name, factor in factors.items()
  ]
  rows = []
  for (name, factor), ours in zip(factors.items(), perplexities(trained, own, windows, tables), strict=True):
    with tempfile.TemporaryDirectory() as directory:
      hf.save(directory, stretched(cfg, name, factor, train_length), params, hf.byte_tokenizer(), pinned=True)
      theirs = perplexity_in_transformers(directory, windows)
    rows.append((name, ours, theirs, abs(ours - theirs) / theirs))
  print(f"Perplexity of a byte, {f.windows} windows of {length}, trained at {train_length}:\n")
  print(f"| {'method':<22} | {'jaxllm':>10} | {'transformers':>12} | {'difference':>10} |")
  print(f"| {'-' * 22} | {'-' * 9}: | {'-' * 11}: | {'-' * 9}: |")
  for name, ours, theirs, difference in rows:
    shown = name if name == "none" else f"{name}, factor {f.times:g}"
    print(f"| {shown:<22} | {ours:>10.5f} | {theirs:>12.5f} | {difference:>10.1e} |")
  worst = max(difference for *_, difference in rows)
  print(
    f"\nThe largest relative difference is {worst:.1e}, {'within' if worst <= CLOSE else 'ABOVE'} {CLOSE:g}."
  )
  return 0 if worst <= CLOSE else 1


def validation(run: Path):
  """The validation text of a run, as its config.json names it; ConfigError where that text is another by now."""
  from experiments import restored
  from jaxllm.train import data

  corpus = data.load_corpus(restored.settings(run)["corpus"])
  restored.check_corpus(run, corpus)
  return corpus.validation


def perplexities(cfg, params, windows, tables) -> list[float]:
  """exp of the mean loss on windows [W, T + 1] under each of the tables, in one program."""
  import math

  import jax
  import numpy as np

  from jaxllm.evaluate.windows import score_windows
  from jaxllm.nn import Transformer

  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tables)
  with jax.default_matmul_precision("highest"):
    nats, _ = score_windows(Transformer(cfg), params, windows, stacked)
  return [math.exp(np.mean(one, dtype=np.float64)) for one in np.asarray(nats)]


def perplexity_in_transformers(directory: str, windows) -> float:
  """The same of a directory, by a fresh model of transformers in float32."""
  import math

  try:
    import torch
    import transformers
  except ImportError:
    raise ConfigError(
      "--check: torch and transformers are not installed; pip install -e '.[parity]'"
    ) from None
  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager"
  )
  losses = []
  with torch.no_grad():
    for window in torch.from_numpy(windows.astype("int64")):
      logits = model(window[None, :-1]).logits[0].double()
      losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
  return math.exp(math.fsum(losses) / len(losses))


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
