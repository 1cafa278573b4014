"""How fast are training and evaluation, beside the same model in transformers and torch on this machine?

Both sides take turns in one run, so that a machine whose speed drifts still gives a fair ratio; figures are medians over
the rounds.  Without torch and transformers (the `parity` extra) only this side is measured.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app

flags.DEFINE_string("lengths", "128,512,2048", "sequence lengths")
flags.DEFINE_integer("tokens", 2048, "tokens a step; the batch is tokens / length")
flags.DEFINE_integer("rounds", 7, "rounds; each side runs once a round")
flags.DEFINE_string("dtypes", "float32", "compute types: float32, bfloat16")
flags.DEFINE_enum("attention", "auto", choices.CORES, "attention core; auto: by device, method and length")
flags.DEFINE_integer("embed_dim", 128, "model width")
flags.DEFINE_integer("num_layers", 3, "layers")
flags.DEFINE_integer("num_heads", 2, "attention heads")
flags.DEFINE_integer("mlp_dim", 352, "hidden width of the feed-forward layers")


@dataclasses.dataclass(frozen=True)
class Timing:
  """Tokens a second of both sides, and the median of the rounds' ratios; other is None where torch is absent."""

  ours: float
  other: float | None
  ratio: float | None


def check(f) -> None:
  """Refuse what cannot be measured."""
  for name in ("tokens", "rounds", "embed_dim", "num_layers", "num_heads", "mlp_dim"):
    choices.positive(name, f[name].value)
  for length in choices.number_list("lengths", f.lengths):
    if f.tokens % length:
      raise ConfigError(f"--lengths={f.lengths}: {length} does not divide --tokens={f.tokens}")
  choices.choice_list("dtypes", f.dtypes, ("float32", "bfloat16"))
  if f.embed_dim % (2 * f.num_heads):
    raise ConfigError(
      f"--num_heads={f.num_heads}: expected a divisor of --embed_dim={f.embed_dim} with an even head_dim"
    )


def model_config(f, dtype: str):
  """The decoder that both sides run."""
  from jaxllm.config import Layer, ModelConfig
  from jaxllm.ops.choose import CORES
  from jaxllm.position import Rope

  return ModelConfig(
    vocab_size=256,
    embed_dim=f.embed_dim,
    num_layers=f.num_layers,
    num_heads=f.num_heads,
    num_kv_heads=f.num_heads,
    head_dim=f.embed_dim // f.num_heads,
    mlp_dim=f.mlp_dim,
    layers=(Layer(Rope()),),
    attention=CORES[f.attention](),
    dtype=dtype,
  )


def core_reports(f) -> str:
  """A line for each dtype and length: which attention core runs, and why; ConfigError where a forced one cannot."""
  from jaxllm.nn.cores import core_report

  return "\n".join(
    f"- {dtype}, {length}: {core_report(model_config(f, dtype), length)}"
    for dtype in choices.choice_list("dtypes", f.dtypes, ("float32", "bfloat16"))
    for length in choices.number_list("lengths", f.lengths)
  )


def our_side(f, length: int, dtype: str) -> tuple[Callable[[], None], Callable[[], None]]:
  """(one training step, one evaluation) of this project, each waiting for its result."""
  import jax
  import numpy as np

  from jaxllm.evaluate.windows import score_windows
  from jaxllm.nn import Transformer
  from jaxllm.train.step import TrainConfig, init_state, make_step

  cfg = model_config(f, dtype)
  model = Transformer(cfg)
  config = TrainConfig(steps=1000, batch_size=f.tokens // length, length=length)
  state, step = init_state(model, config, 0), make_step(model, config)
  tokens = np.random.default_rng(0).integers(0, 256, (config.batch_size, length + 1)).astype(np.int32)
  tables = jax.tree.map(lambda x: np.asarray(x)[None], cfg.rope_tables())
  held = {"state": state}

  def train():
    held["state"], loss = step(held["state"], tokens)
    jax.block_until_ready(loss)

  def evaluate():
    jax.block_until_ready(score_windows(model, held["state"]["params"], tokens, tables))

  return train, evaluate


def torch_side(f, length: int, dtype: str) -> tuple[Callable[[], None], Callable[[], None]] | None:
  """The same for transformers' Llama of the same shape (scaled dot-product attention, fused AdamW), or None."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  config = transformers.LlamaConfig(
    vocab_size=256,
    hidden_size=f.embed_dim,
    intermediate_size=f.mlp_dim,
    num_hidden_layers=f.num_layers,
    num_attention_heads=f.num_heads,
    num_key_value_heads=f.num_heads,
    head_dim=f.embed_dim // f.num_heads,
    max_position_embeddings=length,
    attn_implementation="sdpa",
    use_cache=False,
  )
  model = transformers.LlamaForCausalLM(config)  # float32 parameters, as on this side
  compute = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
  tokens = torch.randint(0, 256, (f.tokens // length, length + 1))

  def loss():
    with compute:
      logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

  def train():
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

  def evaluate():
    with torch.inference_mode():
      loss()

  return train, evaluate


def measure(ours: Callable[[], None], other: Callable[[], None] | None, rounds: int, tokens: int) -> Timing:
  """Both sides in turn, `rounds` times, after one warm-up each."""
  sides = [side for side in (ours, other) if side is not None]
  seconds: list[list[float]] = [[] for _ in sides]
  for round_number in range(rounds + 1):
    for own, side in zip(seconds, sides, strict=True):
      start = time.perf_counter()
      for _ in range(3):
        side()
      if round_number:
        own.append((time.perf_counter() - start) / 3)
  speeds = [tokens / statistics.median(own) for own in seconds]
  if other is None:
    return Timing(speeds[0], None, None)
  return Timing(*speeds, statistics.median(b / a for a, b in zip(*seconds, strict=True)))


def main(f) -> None:
  """Print one Markdown row for each dtype, length and task."""
  import jax

  print(
    f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}\n"
  )
  print(f"attention of this side:\n{core_reports(f)}\n")
  print("| dtype | length | task | jaxllm tokens/s | torch tokens/s | ratio |")
  print("|---|---:|---|---:|---:|---:|")
  for dtype in choices.choice_list("dtypes", f.dtypes, ("float32", "bfloat16")):
    for length in choices.number_list("lengths", f.lengths):
      ours, other = our_side(f, length, dtype), torch_side(f, length, dtype)
      for i, task in enumerate(("train", "evaluate")):
        t = measure(ours[i], None if other is None else other[i], f.rounds, f.tokens)
        beside = ("-", "-") if t.other is None else (f"{t.other:,.0f}", f"{t.ratio:.2f}")
        print(f"| {dtype} | {length} | {task} | {t.ours:,.0f} | {beside[0]} | {beside[1]} |", flush=True)


if __name__ == "__main__":
  run_app(main, check=check)
