"""Small checkpoints as the experiments load them, with random weights that make attention sharp."""

import jax
import numpy as np
import tokenizers

from jaxllm import hf
from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.norm import RMSNorm
from jaxllm.position import Rope
from jaxllm.tree import flatten, unflatten

LENGTH = 16
TEXT = "the quick brown fox jumps over the lazy dog, and señor Müller naïvely counts: 1, 2, 3; "


def config(**changes):
  """A Llama of 256 ids, trained at LENGTH."""
  fields = dict(
    vocab_size=256,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=32,
    layers=(Layer(Rope(original_length=LENGTH)),),
    norm=RMSNorm(multiply_in="input"),
    context_length=LENGTH,
  )
  return ModelConfig(**fields | changes)


def params(cfg, seed=0):
  """Random parameters, matrices at 1.5 times their usual size."""
  shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  rng = np.random.default_rng(seed)

  def draw(leaf):
    scale = 1.5 * leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 1.0
    return (rng.standard_normal(leaf.shape) * scale).astype(np.float32)

  return unflatten({path: draw(leaf) for path, leaf in flatten(shapes).items()})


def text(count=60):
  """Lines that differ, some kilobytes of them."""
  return "".join(f"{i} {TEXT[i % 7 :]}\n" for i in range(count))


def word_tokenizer(directory):
  """Writes a byte-level BPE of 256 to 300 ids whose texts begin with <s>; the number of its ids."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
  )
  backend.train_from_iterator([text()], trainer)
  bos = backend.token_to_id("<s>")
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", bos)]
  )
  directory.mkdir(parents=True, exist_ok=True)
  backend.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
  return backend.get_vocab_size()


def save(directory, cfg, seed=0):
  """A directory of a model of bytes."""
  hf.save(directory, cfg, params(cfg, seed), hf.byte_tokenizer())
  return directory
