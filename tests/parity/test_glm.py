"""GLM-130B's block and ChatGLM-6B's against their published formulas, written out in torch."""

import math

import components
import jax
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm.activation import Glu, Mlp, join_glu
from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Context, Transformer
from jaxllm.norm import LayerNorm
from jaxllm.position import Rope
from jaxllm.tree import flatten, unflatten
from jaxllm.wiring import GlmDeepNorm, deepnorm_coefficients

torch = pytest.importorskip("torch")

B, T, V, D, N, F, L = 2, 48, 37, 64, 4, 96, 3
H = D // N
CONTEXT = 20


def config(mlp):
  return ModelConfig(
    **dict(vocab_size=V, embed_dim=D, num_layers=L, num_heads=N, num_kv_heads=N, head_dim=H, mlp_dim=F),
    layers=(Layer(Rope()),),
    norm=LayerNorm(1e-5),
    mlp=mlp,
    wiring=GlmDeepNorm(*deepnorm_coefficients(L, optimizer="adam")["decoder"]),
    biases=("q", "k", "v", "o", *mlp.inputs, "down"),
    tie_embeddings=True,
    layer_scaling=True,
    embed_gradient=0.1,
  )


def random_params(cfg):
  init = lambda key: Transformer(cfg).init(key, np.zeros((1, 1), np.int32))["params"]
  rng = np.random.default_rng(0)
  shapes = flatten(jax.eval_shape(init, jax.random.key(0)))
  draw = lambda path, x: (path.endswith("norm/scale") + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)
  return {path: draw(path, leaf) for path, leaf in shapes.items()}


def glm(flat, ids, gated):
  """Logits as SwissArmyTransformer computes them: fused matrices [out, in], additive -10000 mask, float32 softmax."""
  w = {path: torch.tensor(np.asarray(x)) for path, x in flat.items()}
  alpha = math.sqrt(2 * L)
  x = w["embed"][torch.tensor(ids).long()]
  order = torch.arange(T)
  blocked = (order[:, None] < order[None]) & (order[None] >= CONTEXT)
  inv_freq = 1.0 / 10000 ** (torch.arange(0, H, 2).float() / H)
  angle = torch.cat([order[:, None] * inv_freq] * 2, -1)
  rotate_half = lambda x: torch.cat([-x[..., H // 2 :], x[..., : H // 2]], -1)
  turn = lambda x: x * angle.cos() + rotate_half(x) * angle.sin()
  layer_norm = lambda x, path: torch.nn.functional.layer_norm(
    x, (D,), w[f"{path}/scale"], w[f"{path}/bias"], 1e-5
  )
  for i in range(L):
    at = lambda name, i=i: f"layers/{i}/{name}"
    fused = torch.cat([w[at(f"attn/{n}/w")] for n in "qkv"], 1).T
    fused_bias = torch.cat([w[at(f"attn/{n}/bias")] for n in "qkv"])
    a = layer_norm(x, at("attn_norm"))
    mixed = torch.nn.functional.linear(a, fused, fused_bias)
    q, k, v = (part.view(B, T, N, H).transpose(1, 2) for part in mixed.chunk(3, -1))
    scores = (turn(q) / (math.sqrt(H) * (i + 1))) @ turn(k).transpose(-1, -2)
    probs = torch.softmax(scores.masked_fill(blocked, -10000.0).float() * (i + 1), -1)
    out = (probs @ v).transpose(1, 2).reshape(B, T, D)
    h = alpha * a + torch.nn.functional.linear(out, w[at("attn/o/w")].T, w[at("attn/o/bias")])
    m = layer_norm(h, at("mlp_norm"))
    if gated:
      # the second half is the activated one
      up = torch.tensor(np.asarray(join_glu(*(flat[at(f"mlp/{n}/w")] for n in ("gate", "up")), "second"))).T
      bias = torch.cat([w[at("mlp/up/bias")], w[at("mlp/gate/bias")]])
      x1, x2 = torch.nn.functional.linear(m, up, bias).chunk(2, -1)
      inner = x1 * torch.nn.functional.gelu(x2)
    else:
      inner = torch.nn.functional.linear(m, w[at("mlp/up/w")].T, w[at("mlp/up/bias")])
      inner = torch.nn.functional.gelu(inner, approximate="tanh")
    x = alpha * m + torch.nn.functional.linear(inner, w[at("mlp/down/w")].T, w[at("mlp/down/bias")])
  return torch.nn.functional.linear(layer_norm(x, "final_norm"), w["embed"]).numpy()


@pytest.mark.parametrize("gated", [True, False])
def test_the_block_of_glm_130b(gated):
  """DeepNorm with its residual after the norm, layer-scaled scores, a prefix of CONTEXT tokens, GEGLU by erf (tanh MLP: 6B)."""
  cfg = config(Glu("gelu") if gated else Mlp("gelu_tanh"))
  flat = random_params(cfg)
  ids = np.random.default_rng(1).integers(0, V, (B, T), np.int32)
  context = Context(prefix=np.full(B, CONTEXT, np.int32))
  logits = jax.jit(lambda p: Transformer(cfg).apply({"params": p}, ids, context)[0])(unflatten(flat))
  expected = glm(flat, ids, gated)
  assert np.abs(expected).max() > 1
  error = relative_error(logits, expected)
  assert error <= 2e-5
  components.measured(["deepnorm_glm", "layer_scaling", "prefix"], "GLM in torch", error)
