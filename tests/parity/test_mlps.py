"""Activations and feed-forward layers beside torch's and transformers' own."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm.activation import ACTIVATIONS, ClampedGlu, Glu, Mlp, Xielu, split_glu
from jaxllm.config import ModelConfig
from jaxllm.nn.mlp import FeedForward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.models.apertus.modeling_apertus import ApertusMLP  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaMLP  # noqa: E402
from transformers.models.nemotron.modeling_nemotron import NemotronMLP  # noqa: E402
from transformers.models.phi3.modeling_phi3 import Phi3MLP  # noqa: E402
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense  # noqa: E402

D, F = 24, 40
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, D)).astype(np.float32)
W = {name: RNG.standard_normal((D, F)).astype(np.float32) for name in ("gate", "up")}
W["down"] = RNG.standard_normal((F, D)).astype(np.float32)
ALPHAS = {"alpha_p": np.float32([0.3]), "alpha_n": np.float32([-0.7])}
SIZE = dict(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=3)

# ours: theirs, and the function of torch where there is one
TORCH = torch.nn.functional
NAMES = {
  "relu": ("relu", TORCH.relu),
  "gelu": ("gelu", TORCH.gelu),
  "gelu_tanh": ("gelu_new", lambda x: TORCH.gelu(x, approximate="tanh")),
  "gelu_sigmoid": ("quick_gelu", None),
  "silu": ("silu", TORCH.silu),
  "swish": ("swish", None),
  "relu2": ("relu2", None),
  "sigmoid": ("sigmoid", torch.sigmoid),
  "identity": ("linear", None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
  x = np.linspace(-12, 12, 4801, dtype=np.float32)
  found = np.asarray(jax.jit(ACTIVATIONS[name])(x))
  theirs, function = NAMES[name]
  for act in filter(None, (ACT2FN[theirs], function)):
    expected = act(torch.tensor(x)).numpy()
    components.measured_close(name, "torch", found, expected, rtol=1e-6, atol=1e-6)


def test_xielu_starts_as_theirs():
  module = ACT2FN["xielu"]
  for name, (shape, init) in Xielu().params().items():
    expected = module.get_parameter(name)
    found = init(jax.random.key(0), shape, jnp.float32)
    # theirs is computed in bfloat16, log(expm1(0.30078125)) instead of that of 0.3
    np.testing.assert_allclose(found, expected.detach().float().numpy(), rtol=0.01)


@pytest.mark.parametrize("eps", [-1e-6, -0.5])
def test_xielu(eps):
  module = type(ACT2FN["xielu"])(eps=eps, dtype=torch.float32)
  with torch.no_grad():
    for name, value in ALPHAS.items():
      module.get_parameter(name).copy_(torch.tensor(value))
  x = np.concatenate([np.linspace(-12, 12, 4801), [-1e-7, 0.0, 1e-7]]).astype(np.float32)
  x_torch = torch.tensor(x, requires_grad=True)
  out = module(x_torch)
  out.sum().backward()
  mlp = Xielu(eps=eps)
  found = jax.jit(mlp)(ALPHAS, x)
  components.measured_close(mlp, "transformers", found, out.detach().numpy(), rtol=1e-6, atol=1e-6)
  slope, alphas = jax.jit(jax.grad(lambda x, p: jnp.sum(mlp(p, x)), (0, 1)))(x, ALPHAS)
  elsewhere = x != np.float32(eps)  # where the minimum's gradient is a convention
  np.testing.assert_allclose(slope[elsewhere], x_torch.grad.numpy()[elsewhere], rtol=2e-6, atol=2e-6)
  for name in ALPHAS:
    np.testing.assert_allclose(alphas[name], module.get_parameter(name).grad.numpy(), rtol=1e-5)


def ours(mlp):
  """Our feed-forward layer on X."""
  params = {name: {"w": W[name]} for name in (*mlp.inputs, "down")} | (ALPHAS if mlp.params() else {})
  layer = FeedForward(ModelConfig(embed_dim=D, mlp_dim=F, mlp=mlp, **SIZE))
  return np.asarray(jax.jit(layer.apply)({"params": params}, X))


def theirs(module, **weights):
  """Their layer, with weights as torch keeps them, [out, in]."""
  with torch.no_grad():
    for name, value in weights.items():
      module.get_parameter(name).copy_(torch.tensor(np.ascontiguousarray(value)))
    return module.eval()(torch.tensor(X)).numpy()


GATE, UP, DOWN = (W[name].T for name in ("gate", "up", "down"))


def llama():
  config = transformers.LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=2)
  return theirs(
    LlamaMLP(config), **{"gate_proj.weight": GATE, "up_proj.weight": UP, "down_proj.weight": DOWN}
  )


def phi3():
  """One weight; the first half is activated."""
  config = transformers.Phi3Config(hidden_size=D, intermediate_size=F)
  fused = np.concatenate([GATE, UP])
  for found, expected in zip(split_glu(fused.T), (W["gate"], W["up"]), strict=True):
    np.testing.assert_array_equal(found, expected)
  return theirs(Phi3MLP(config), **{"gate_up_proj.weight": fused, "down_proj.weight": DOWN})


def t5():
  config = transformers.T5Config(d_model=D, d_ff=F, feed_forward_proj="gated-gelu")
  assert config.dense_act_fn == "gelu_new"
  return theirs(T5DenseGatedActDense(config), **{"wi_0.weight": GATE, "wi_1.weight": UP, "wo.weight": DOWN})


def nemotron():
  config = transformers.NemotronConfig(hidden_size=D, intermediate_size=F)
  return theirs(NemotronMLP(config), **{"up_proj.weight": UP, "down_proj.weight": DOWN})


def apertus():
  config = transformers.ApertusConfig(hidden_size=D, intermediate_size=F, dtype=torch.float32)
  alphas = {f"act_fn.{name}": value for name, value in ALPHAS.items()}
  return theirs(ApertusMLP(config), **{"up_proj.weight": UP, "down_proj.weight": DOWN} | alphas)


LAYERS = {
  "LlamaMLP": (llama, Glu()),
  "Phi3MLP": (phi3, Glu()),
  "T5DenseGatedActDense": (t5, Glu("gelu_tanh")),
  "NemotronMLP": (nemotron, Mlp("relu2")),
  "ApertusMLP": (apertus, Xielu()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
  function, mlp = LAYERS[name]
  expected = function()
  error = relative_error(ours(mlp), expected)
  assert error <= 1e-6
  components.measured(mlp, "transformers", error)


def test_gpt_oss():
  """One expert that every token goes to; gate and up are the even and odd columns, biases included; the clamps act."""
  config = transformers.GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=1)
  module, tokens = GptOssExperts(config), X.reshape(-1, D)
  fused, bias = (3 * RNG.standard_normal((1, D, 2 * F))).astype(np.float32), RNG.standard_normal((1, 2 * F))
  weights = dict(gate_up_proj=fused, gate_up_proj_bias=bias, down_proj=W["down"][None])
  with torch.no_grad():
    for name, value in (weights | {"down_proj_bias": np.zeros((1, D))}).items():
      module.get_parameter(name).copy_(torch.tensor(value))
    ones = torch.ones(len(tokens), 1)
    expected = module(torch.tensor(tokens), torch.zeros(len(tokens), 1, dtype=torch.long), ones).numpy()
  gate, up = split_glu(tokens @ fused[0] + np.float32(bias), interleaved=True)
  assert np.mean(gate > 7) > 0.05 and np.mean(np.abs(up) > 7) > 0.1
  found = np.asarray(jax.jit(ClampedGlu())({}, gate, up)) @ W["down"]
  error = relative_error(found, expected)
  assert error <= 1e-6
  components.measured(ClampedGlu(), "transformers", error)
