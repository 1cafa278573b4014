"""Wirings: DeepNorm's coefficients and initialisation, and what its name promises of the size of updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, tokens
from model_checks import full

from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.norm import LayerNorm
from jaxllm.ops.losses import cross_entropy
from jaxllm.position import NoPE, Rope
from jaxllm.tree import flatten, unflatten
from jaxllm.wiring import WIRINGS, DeepNorm, GlmDeepNorm, Post, Pre, deepnorm_coefficients

COEFFICIENTS = [
  # layers, topology, optimizer: alpha and beta as printed in DeepNet's and GLM-130B's papers and in kexue.fm/archives/8978
  *(
    (n, "decoder", "paper", a, b)
    for n, a, b in ((6, 1.8612, 0.3799), (12, 2.2134, 0.3195), (24, 2.6321, 0.2686))
  ),
  *((n, "encoder", "paper", a, b) for n, a, b in ((200, 4.4721, 0.1581), (1000, 6.6874, 0.1057))),
  (70, "decoder", "adam", 11.8322, 0.0845),
  (28, "decoder", "adam", 7.4833, 0.1336),
  (8, "decoder", "sgd", 2.0, 0.5),
  (8, "encoder", "lamb", 1.0, 0.25),
]


@pytest.mark.parametrize(("layers", "topology", "optimizer", "alpha", "beta"), COEFFICIENTS)
def test_published_coefficients(layers, topology, optimizer, alpha, beta):
  found = deepnorm_coefficients(layers, topology, optimizer)
  assert found.keys() == {topology}
  np.testing.assert_allclose(found[topology], (alpha, beta), rtol=0, atol=5e-5)


def test_coefficients_of_an_encoder_decoder():
  """Six and six layers: 0.81 * 7776 ** (1/16) and 0.87 / it, then 18 ** (1/4) and 72 ** (-1/4)."""
  found = deepnorm_coefficients(6, "encoder_decoder", decoder_layers=6)
  np.testing.assert_allclose(found["encoder"], (1.41795, 0.49699), rtol=0, atol=5e-5)
  np.testing.assert_allclose(found["decoder"], (2.05977, 0.34329), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0,), "num_layers: found 0, expected an integer of at least 1"),
    ((6, "tree"), "topology: found 'tree', expected one of decoder, encoder, encoder_decoder"),
    ((6, "decoder", "adamw"), "optimizer: found 'adamw', expected one of paper, sgd, adam, lamb"),
    ((6, "encoder_decoder"), "decoder_layers: found None, expected an integer of at least 1"),
    ((6, "decoder", "paper", 6), "decoder_layers: found 6, expected None for topology 'decoder'"),
    ((6, "encoder_decoder", "adam", 6), "optimizer: found 'adam', expected 'paper' for topology"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ConfigError, match=message):
    deepnorm_coefficients(*arguments)


def test_bad_fields():
  with pytest.raises(ConfigError, match=r"DeepNorm.alpha: found 0, expected a finite number above 0"):
    DeepNorm(0, 1)
  with pytest.raises(ConfigError, match=r"GlmDeepNorm.beta: found nan, expected a finite number above 0"):
    GlmDeepNorm(1, float("nan"))


def narrow(**kwargs):
  sizes = dict(
    vocab_size=32, embed_dim=96, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=24, mlp_dim=256
  )
  return ModelConfig(**sizes | dict(norm=LayerNorm()) | kwargs)


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_has_its_norms_and_no_other(name):
  cfg = narrow(wiring=WIRINGS[name]())
  shapes = jax.eval_shape(lambda key: Transformer(cfg).init(key, tokens())["params"], jax.random.key(0))
  assert sorted(n for n in shapes["layers"]["0"] if n.endswith("norm")) == sorted(cfg.wiring.norms)
  assert ("final_norm" in shapes) == cfg.wiring.final_norm


def test_deepnorm_starts_as_xavier_with_gain_beta():
  """q and k keep gain 1, and the halves of a GLU are two matrices; all biases are 0 and all norms the identity."""
  cfg = narrow(
    wiring=GlmDeepNorm(2.0, 0.25), mlp=Glu("gelu"), biases=("q", "k", "v", "o", "gate", "up", "down")
  )
  init = jax.jit(lambda key: Transformer(cfg).init(key, tokens())["params"])
  for path, x in flatten(init(jax.random.key(0))["layers"]["0"]).items():
    if path.endswith("/w"):
      gain = 1.0 if path in ("attn/q/w", "attn/k/w") else 0.25
      assert abs(np.std(x) / (gain * np.sqrt(2 / sum(x.shape))) - 1) < 0.03, path
    else:
      np.testing.assert_array_equal(x, 1.0 if path.endswith("scale") else 0.0, err_msg=path)


def test_alpha_and_beta_of_1_are_post_norm():
  post, deep = (dataclasses.replace(MODELS["post"], wiring=wiring) for wiring in (Post(), DeepNorm(1.0, 1.0)))
  np.testing.assert_array_equal(full(deep, tokens()), full(post, tokens()))


def test_the_size_of_glm_130b():
  """128.70 B parameters: L (4 h^2 + 4 h + 3 h f + 2 f + h + 4 h) + V h + 2 h."""
  h, f, layers, vocab = 12288, 32768, 70, 150528
  cfg = ModelConfig(
    **dict(vocab_size=vocab, embed_dim=h, num_layers=layers, num_heads=96, num_kv_heads=96, head_dim=128),
    mlp_dim=f,
    norm=LayerNorm(),
    mlp=Glu("gelu"),
    wiring=GlmDeepNorm(*deepnorm_coefficients(layers, optimizer="adam")["decoder"]),
    biases=("q", "k", "v", "o", "gate", "up", "down"),
    tie_embeddings=True,
    layer_scaling=True,
    embed_gradient=0.1,
    layers=(Layer(Rope()),),
  )
  init = lambda key: Transformer(cfg, scan=True).init(key, np.zeros((1, 1), np.int32))
  shapes = jax.eval_shape(init, jax.random.key(0))
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  assert count == layers * (4 * h * h + 4 * h + 3 * h * f + 2 * f + h + 4 * h) + vocab * h + 2 * h
  assert round(count / 1e9, 2) == 128.70


DEPTHS = (4, 64)
STEPS = {"sgd": 1e-2, "sign": 1e-5}


@functools.cache
def update_sizes(wiring):
  """RMS change of the last hidden state after one step of each optimizer, for each of DEPTHS; two seeds."""

  def change(depth):
    alpha, beta = deepnorm_coefficients(depth, optimizer=wiring)["decoder"] if wiring else (1.0, 1.0)
    cfg = narrow(
      **dict(
        embed_dim=64, head_dim=16, mlp_dim=128, num_layers=depth, vocab_size=64, layers=(Layer(NoPE()),)
      ),
      wiring=Pre() if wiring is None else DeepNorm(alpha, beta),
      mlp=Mlp("gelu"),
    )
    model = Transformer(cfg, scan=True)

    @jax.jit
    def run(key):
      key, data = jax.random.split(key)
      ids = jax.random.randint(data, (4, 17), 0, cfg.vocab_size)
      p = model.init(key, ids[:, :-1])["params"]
      hidden = lambda p: model.apply({"params": p}, ids[:, :-1], logits=None)[0]

      def loss(p):
        hidden_BTD = hidden(p)
        nll, _ = cross_entropy(hidden_BTD, head(cfg, p), ids[:, 1:])
        return jnp.mean(nll), hidden_BTD

      # the theory is of the matrices of the layers; the weights of the norms multiply up over the depth whatever alpha is
      inner = lambda path, update: update if path.endswith("/w") else 0 * update
      gradient, start = jax.grad(loss, has_aux=True)(p)
      gradient = flatten(gradient)

      def size(step, is_sign):
        direction = {path: jnp.where(is_sign, jnp.sign(g), g) for path, g in gradient.items()}
        moved = {path: x - step * inner(path, direction[path]) for path, x in flatten(p).items()}
        return jnp.sqrt(jnp.mean((hidden(unflatten(moved)) - start) ** 2))

      # one after the other, so that the model after a step is compiled once
      steps = jnp.array(list(STEPS.values())), jnp.array([optimizer == "sign" for optimizer in STEPS])
      return jax.lax.map(lambda step: size(*step), steps)

    return np.mean([run(jax.random.key(seed, impl="unsafe_rbg")) for seed in range(2)], axis=0)

  return dict(zip(STEPS, np.transpose([change(depth) for depth in DEPTHS]), strict=True))


def spread(sizes):
  return max(sizes) / min(sizes)


def test_the_update_of_deepnorm_does_not_grow_for_the_optimizer_it_was_made_for():
  """The paper's coefficients under gradient descent, GLM's under steps of one size (as Adam's): flat, and not otherwise."""
  paper, adam = update_sizes("paper"), update_sizes("adam")
  assert spread(paper["sgd"]) < 1.3 and spread(adam["sign"]) < 1.3, (paper, adam)
  assert paper["sign"][-1] > 2 * paper["sign"][0], paper
  assert adam["sgd"][-1] < adam["sgd"][0] / 4, adam


def test_the_update_of_pre_norm_grows():
  sizes = update_sizes(None)["sign"]
  assert sizes[-1] > 3 * sizes[0], sizes
