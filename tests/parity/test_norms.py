"""Norms beside torch's and transformers' own."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.norm import BatchNorm, L2Norm, LayerNorm, RMSNorm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from transformers.models.cohere.modeling_cohere import CohereLayerNorm  # noqa: E402
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm  # noqa: E402
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P  # noqa: E402
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm  # noqa: E402

D = 96
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((8, 16, D)) * np.exp(RNG.standard_normal((8, 16, 1)))).astype(np.float32)
SCALE, BIAS = (RNG.standard_normal(D).astype(np.float32) for _ in range(2))
P = {"scale": SCALE, "bias": BIAS}
F = torch.nn.functional

# name: our norm, and torch's of (x, w, b)
FUNCTIONS = {
  "layer_norm": (LayerNorm(1e-3), lambda x, w, b: F.layer_norm(x, (D,), w, b, 1e-3)),
  "layer_norm without bias": (LayerNorm(bias=False), lambda x, w, b: F.layer_norm(x, (D,), w)),
  "rms_norm": (RMSNorm(1e-3), lambda x, w, b: F.rms_norm(x, (D,), w, 1e-3)),
  "normalize": (L2Norm(), lambda x, w, b: F.normalize(x, dim=-1)),
  "normalize, eps above some": (L2Norm(9.0), lambda x, w, b: F.normalize(x, dim=-1, eps=9.0)),
  "batch_norm": (
    BatchNorm(1e-3),
    lambda x, w, b: F.batch_norm(x.reshape(-1, D), None, None, w, b, True, 0.0, 1e-3).reshape(x.shape),
  ),
}
# name: our norm, and a module of transformers with SCALE and BIAS where it has them
MODULES = {
  "Llama": (RMSNorm(1e-5, multiply_in="input"), lambda: LlamaRMSNorm(D, 1e-5)),
  "Gemma": (RMSNorm(1e-5, scale="1+w"), lambda: GemmaRMSNorm(D, 1e-5)),
  "Llama 4, queries and keys": (RMSNorm(1e-5, scale=None), lambda: Llama4TextL2Norm(1e-5)),
  "Nemotron": (LayerNorm(1e-4, scale="1+w"), lambda: NemotronLayerNorm1P(D, 1e-4)),
  "OLMo": (LayerNorm(scale=None, bias=False), lambda: OlmoLayerNorm(D)),
  "Cohere": (LayerNorm(1e-4, bias=False), lambda: CohereLayerNorm(D, 1e-4)),
}
# Nemotron adds 1 to its weights in bfloat16, which loses up to eight bits of them
BITWISE = [name for name in MODULES if name != "Nemotron"]


def ours(kind, x, dtype=jnp.float32):
  p = {name: jnp.asarray(P[name], dtype) for name in kind.params(D)}
  return np.asarray(jax.jit(kind)(p, jnp.asarray(x, dtype)), np.float32)


def theirs(name, dtype):
  module = MODULES[name][1]()
  with torch.no_grad():
    for key, parameter in module.named_parameters():
      parameter.copy_(torch.tensor(P["scale" if key == "weight" else key]))
    return module.to(dtype)(torch.tensor(X).to(dtype)).float().numpy()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
  kind, function = FUNCTIONS[name]
  expected = function(*map(torch.tensor, (X, SCALE, BIAS))).numpy()
  components.measured_close(kind, "torch", ours(kind, X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
  kind = MODULES[name][0]
  expected = theirs(name, torch.float32)
  components.measured_close(kind, "transformers", ours(kind, X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BITWISE)
def test_bits_in_bfloat16(name):
  """But where the float32 result before the rounding is a tie within float32's own error: one in 10,000."""
  found, expected = ours(MODULES[name][0], X, jnp.bfloat16), theirs(name, torch.bfloat16)
  assert np.mean(found != expected) <= 1e-4
  np.testing.assert_allclose(found, expected, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize(
  ("name", "wrong"), [("Llama", RMSNorm(1e-5)), ("Gemma", RMSNorm(1e-5, "1+w", "input"))]
)
def test_the_other_order_has_other_bits(name, wrong):
  assert np.mean(ours(wrong, X, jnp.bfloat16) != theirs(name, torch.bfloat16)) > 0.1
