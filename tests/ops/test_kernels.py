"""Kernel cores against the plain one, and the rule that chooses among all: splash attention interpreted, cuDNN on a GPU."""

import dataclasses
import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer, init_cache
from jaxllm.nn.cores import core_choice, core_report
from jaxllm.ops import call as calls
from jaxllm.ops.attention import Plain, Score, Side
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.call import PLAIN_UP_TO, Call, Device
from jaxllm.ops.choose import CORES, Auto, choose
from jaxllm.ops.head import soft_cap
from jaxllm.ops.kernels import Cudnn, Splash
from jaxllm.position import POSITIONS
from jaxllm.position.base import inner_products
from jaxllm.study import choices

B, T, N, K, H = 2, 150, 4, 2, 16  # two tiles of 128, the last one with padding
INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
SEGMENT = np.stack([np.repeat([0, 1, 2], [40, 95, 15]), np.zeros(T)]).astype(np.int32)
VALID = np.array([[T], [133]]) > INDEX
SPLASH = Splash(block=128, interpret=True)
GPU, OLD_GPU, TPU, CPU = Device("cuda", (9, 0)), Device("cuda", (8, 0)), Device("tpu"), Device("cpu")


def side(segment=None, valid=None, prefix=None):
  return Side(INDEX, INDEX, segment, valid, prefix=prefix, in_order=True)


def scores(softcap=None):
  return Score(lambda q, k, *_: soft_cap(inner_products(q, k), softcap), "Rope", None, softcap)


@functools.cache
def arrays(dtype="float32"):
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.standard_normal((B, T, heads, H)), dtype)
  return (draw(N) / 2, draw(K), draw(K)), jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32)


def attend(core, both, window=None, softcap=None, sinks=None, dtype="float32"):
  """(output, gradients of q, k, v and, where there are any, sinks), nothing of padding counted."""
  qkv, cotangent = arrays(dtype)
  real = 1.0 if both.valid is None else both.valid[:, :, None, None]

  def run(qkv, sinks):
    out = core(*qkv, both, both, window, scores(softcap), sinks)
    return jnp.sum(out * cotangent * real), out * real

  argnums = (0,) if sinks is None else (0, 1)
  with jax.numpy_rank_promotion("allow"):  # the library's own kernel promotes
    (_, out), gradients = jax.jit(jax.value_and_grad(run, argnums, has_aux=True))(qkv, sinks)
  return [np.asarray(x, np.float32) for x in (out, *jax.tree.leaves(gradients))]


CASES = {
  "causal": (side(), {}),
  "window": (side(), dict(window=70)),
  "packed": (side(SEGMENT), {}),
  "padded": (side(valid=VALID), {}),
  "packed, padded, window": (side(SEGMENT, VALID), dict(window=70)),
  "soft cap": (side(), dict(softcap=1.5)),
  "sinks": (side(), dict(sinks=np.array([-1.0, 0.0, 2.0, 4.0], np.float32))),
}


SLOW = ("causal", "padded", "soft cap")
"""Cases that the others cover, one at a time: the interpreter takes seconds for each."""


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[pytest.mark.core] * (n == "window") + [pytest.mark.slow] * (n in SLOW))
    for n in CASES
  ],
)
def test_splash_attention_is_plain(name):
  both, settings = CASES[name]
  found, expected = attend(SPLASH, both, **settings), attend(Plain(), both, **settings)
  for i, (one, other) in enumerate(zip(found, expected, strict=True)):
    error = relative_error(one, other)
    assert error <= 2e-5, (name, i)
    components.measured("splash", "the plain core, itself held to float64", error)


@pytest.mark.parametrize("name", ["causal", "window", "padded", "sinks"])
def test_tiles_skipped_by_their_number_are_plain(name):
  """Where the order is known while tracing, a wrong number would lose keys or gradients; tiles of 48 x 32 fit nothing."""
  both, settings = CASES[name]
  found, expected = attend(Blockwise(48, 32), both, **settings), attend(Plain(), both, **settings)
  for one, other in zip(found, expected, strict=True):
    assert relative_error(one, other) <= 1e-5


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("name", ["causal", "window", "padded"])
def test_cudnn_is_plain(name):
  """bfloat16 weights of attention: 2^-8 each."""
  both, settings = CASES[name]
  found = attend(Cudnn(), both, dtype="bfloat16", **settings)
  expected = attend(Plain(), both, dtype="bfloat16", **settings)
  for one, other in zip(found, expected, strict=True):
    assert relative_error(one, other) <= 2**-5, name


def test_what_cudnn_is_asked_for(monkeypatch):
  """On any machine: its arguments, computed by JAX's own code for them, give the plain core's result."""
  monkeypatch.setattr(calls, "current_device", lambda: GPU)
  real, asked = jax.nn.dot_product_attention, []

  def library(q, k, v, implementation, **kwargs):
    asked.append((implementation, q.dtype))
    with jax.numpy_rank_promotion("allow"):
      return real(q, k, v, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", library)
  for name in ("causal", "window", "padded"):
    both, settings = CASES[name]
    found = attend(Cudnn(), both, dtype="bfloat16", **settings)[0]
    expected = attend(Plain(), both, dtype="bfloat16", **settings)[0]
    error = relative_error(found, expected)
    assert error <= 2**-6, name
    components.measured("cudnn", "JAX's own code for the same arguments, bfloat16", error)
  assert set(asked) == {("cudnn", jnp.dtype("bfloat16"))}


FITS = Call(GPU, "bfloat16", 128, 4096, "Rope")
change = functools.partial(dataclasses.replace, FITS)
REFUSED = {
  "bias": (change(method="Alibi", hooks="it adds a bias to the scores"), "it adds a bias", Cudnn, Splash),
  "prefix": (change(prefix=True), "prefix", Cudnn, Splash),
  "traced window": (change(fixed_window=False), "window", Cudnn, Splash),
  "packed": (change(segments=True), "packed", Cudnn),
  "soft cap": (change(softcap=5.0), "soft cap", Cudnn),
  "sinks": (change(sinks=True), "sinks", Cudnn),
  "float32": (change(dtype="float32"), "found dtype float32", Cudnn),
  "float16": (change(dtype="float16"), "found dtype float16", Splash),
  "wide heads": (change(head_dim=264), "at most 256, found 264", Cudnn),
  "wide heads before Hopper": (change(head_dim=256, device=OLD_GPU), "at most 128, found 256", Cudnn),
  "heads of 12": (change(head_dim=12), "multiple of 8", Cudnn),
  "before Ampere": (change(device=Device("cuda", (7, 5))), "found cuda of compute capability 7.5", Cudnn),
  "on a CPU": (change(device=CPU), "found cpu", Cudnn, Splash),
  "over a mesh": (change(device=Device("tpu", partitioned=True)), "mesh", Splash),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_kernel_that_cannot_serve_a_call_says_why(name):
  call, words, *kernels = REFUSED[name]
  for kernel in kernels:
    own = kernel()
    if kernel is Splash and call.device is GPU:
      call = dataclasses.replace(call, device=TPU)
    with pytest.raises(ConfigError, match=words) as error:
      own.check(call)
    assert f"found {own.name!r} with {call.method}" in str(error.value)
    assert isinstance(choose(call).core, (Plain, Blockwise))


def test_what_the_kernels_serve():
  for call in (FITS, change(dtype="float16", head_dim=256), change(device=OLD_GPU)):
    assert choose(call).core == Cudnn()
  served = change(device=TPU, dtype="float32", head_dim=80)
  for call in (served, dataclasses.replace(served, softcap=5.0, segments=True)):
    assert choose(call).core == Splash()


def test_the_length_decides_where_no_kernel_serves():
  for keys, core in ((1, Plain()), (PLAIN_UP_TO, Plain()), (PLAIN_UP_TO + 1, Blockwise())):
    for call in (change(device=CPU), change(in_order=False), change(hooks="a bias")):
      choice = choose(dataclasses.replace(call, keys=keys))
      assert choice.core == core and f"{keys} keys" in choice.why


SHAPE = dict(vocab_size=11, embed_dim=16, num_layers=1, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=16)
PLAIN_SCORES = ("nope", "sinusoidal", "learned", "rope", "pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed")
PLAIN_SCORES += ("ntk_by_parts", "yarn", "llama3", "proportional", "rope_2d")
OWN = dict(original_length=8, max_length=512, beta_slow=0.2, sinks=2, window=4)
OWN |= dict(short_factor=(1.0,) * 8, long_factor=(2.0,) * 8, factor=4.0)


def config(name, **kwargs):
  known = {field.name for field in dataclasses.fields(POSITIONS[name])}
  method = POSITIONS[name](**{key: value for key, value in OWN.items() if key in known})
  return ModelConfig(**SHAPE | dict(layers=(Layer(method),)) | kwargs)


@pytest.mark.parametrize("name", POSITIONS)
def test_which_methods_a_kernel_serves(monkeypatch, name):
  """What is reported before a run is what the program then does."""
  monkeypatch.setattr(calls, "current_device", lambda: GPU)
  ran = []
  for kind in (Cudnn, Plain, Blockwise):
    spy = lambda self, q, *rest, kind=kind: ran.append(kind) or jnp.zeros_like(q)
    monkeypatch.setattr(kind, "__call__", spy)
  cfg = config(name, attention=Auto(), dtype="bfloat16")
  for pinned in (None, 300):
    choice = core_choice(cfg, cfg.layers[0], 300, seq_len=pinned)
    run = functools.partial(Transformer(cfg).init_with_output, rope=cfg.rope_tables(300, pinned))
    ran.clear()
    jax.eval_shape(run, jax.random.key(0), np.zeros((1, 300), np.int32))
    assert ran == [type(choice.core)]
    serves = name in PLAIN_SCORES or (pinned and name in ("dynamic_ntk", "longrope"))
    assert isinstance(choice.core, Cudnn) == bool(serves), choice.why


@pytest.mark.parametrize(
  ("name", "words"), [("alibi", "Alibi, which .* adds a bias"), ("rerope", "ReRope, which .* unrotated keys")]
)
def test_a_forced_kernel_names_the_method_it_cannot_serve(name, words):
  run = lambda: Transformer(config(name, attention=SPLASH)).init(
    jax.random.key(0), np.zeros((1, 4), np.int32)
  )
  with pytest.raises(ConfigError, match=f"'splash' with {words}"):
    jax.eval_shape(run)


def test_a_kernel_takes_no_bare_function():
  (q, k, v), _ = arrays()
  with pytest.raises(ConfigError, match=r"attention\.Score"):
    SPLASH(q, k, v, side(), side(), None, lambda q, k, *_: inner_products(q, k))


def test_flags_list_the_cores():
  assert tuple(CORES) == choices.CORES


def test_layer_scaling_is_no_plain_inner_product(monkeypatch):
  monkeypatch.setattr(calls, "current_device", lambda: GPU)
  with pytest.raises(ConfigError, match="layer_scaling"):
    core_report(config("rope", attention=Cudnn(), dtype="bfloat16", layer_scaling=True), 8)


def test_the_report_names_each_kind_of_layer(monkeypatch):
  monkeypatch.setattr(calls, "current_device", lambda: TPU)
  layers = (Layer(POSITIONS["rope"](), 7), Layer(POSITIONS["alibi"]()))
  report = core_report(config("rope", layers=layers, num_layers=2, attention=Auto()), 4096)
  assert report.startswith("Rope, window 7: splash (tpu")
  assert "Alibi: blockwise (not splash: it adds a bias to the scores; 4096 keys" in report


def test_a_forced_kernel_serves_decoding_by_a_reference_core(monkeypatch):
  """With a cache the order is data: the logits are those of the plain core, to the last bit."""
  monkeypatch.setattr(calls, "current_device", lambda: GPU)
  ids = np.arange(9, dtype=np.int32)[None]
  cfg = config("rope", dtype="bfloat16", attention=Plain())
  params = jax.jit(Transformer(cfg).init)(jax.random.key(0), ids[:, :1])["params"]

  def run(core):
    model = Transformer(dataclasses.replace(cfg, attention=core))
    return jax.jit(lambda p: model.apply({"params": p}, ids, cache=init_cache(cfg, 1, 16))[0])(params)

  np.testing.assert_array_equal(run(Cudnn()), run(Plain()))


@pytest.mark.parametrize("name", CORES)
def test_json_names_a_core(name):
  cfg = config("rope", attention=CORES[name]())
  assert cfg.to_dict()["attention"]["name"] == name
  assert ModelConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize("bad", [0, 100, 128.0, True])
def test_bad_blocks(bad):
  with pytest.raises(ConfigError, match=r"Splash\.block: found .*, expected a multiple of 128"):
    Splash(block=bad)
