"""Published counts, utilisations, times and bytes."""

import dataclasses
import math

import jax
import pytest
from training_table import published

from experiments.shapes import SHAPES
from jaxllm import flops
from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm
from jaxllm.position import Rope
from jaxllm.study import choices
from jaxllm.train.step import TrainConfig, init_state
from jaxllm.wiring import Parallel

DAY = 86400
PARAMETERS = {  # of the files that were published
  "gpt3-175b": 174_604_259_328,
  "llama-7b": 6_738_415_616,
  "llama-13b": 13_015_864_320,
  "llama-65b": 65_285_660_672,
  "llama-3-8b": 8_030_261_248,
  "llama-3-70b": 70_553_706_496,
  "mistral-7b": 7_241_732_096,
  "mixtral-8x7b": 46_702_792_704,
  "gemma-2-9b": 9_241_705_984,
  "glm-130b": 128_697_794_560,
}


def gpt(h, depth, a, V=51200, **kwargs):
  """A GPT of Megatron's: 4 h wide, every matrix with a bias."""
  sizes = dict(
    vocab_size=V, embed_dim=h, num_layers=depth, num_heads=a, num_kv_heads=a, head_dim=h // a, mlp_dim=4 * h
  )
  biases = ("q", "k", "v", "o", "up", "down")
  return ModelConfig(**sizes | dict(mlp=Mlp(), norm=LayerNorm(), biases=biases, tie_embeddings=True) | kwargs)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
  published(f"{name}: parameters", flops.count(SHAPES[name], 16).parameters, PARAMETERS[name])


def test_active_parameters():
  """Mixtral: 12.9 billion of 46.7, as published; a dense model has no others."""
  published("mixtral-8x7b: active, billions", flops.count(SHAPES["mixtral-8x7b"], 16).active / 1e9, 12.9, 1)
  cost = flops.count(SHAPES["llama-7b"], 16)
  assert cost.active == cost.parameters
  one = ModelConfig(
    **dict(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=6),
    mlp=Moe(Glu(), 3, 3),
  )
  assert flops.count(one, 4).active == flops.count(one, 4).parameters


def test_worked_times():
  """13 B x 100 B tokens on 40 A100 at 180 TFLOP/s; 82 B x 150 B on 1024 at their peak; Llama's 1.4 T at 380 tokens/s."""
  days = lambda *args: flops.estimated_seconds(*args) / DAY
  published("days, 13 B of 100 B tokens on 40 A100", days(13e9, 100e9, 40, 180e12), 12.54, rel=1e-3)
  published("days, 82 B of 150 B tokens on 1024 A100", days(82e9, 150e9, 1024, 312e12), 2.67, rel=2e-3)
  published("llama-65b: days", flops.training_seconds(1.4e12, 2048, 380) / DAY, 20.8, 1)
  # Narayanan et al. (2021), section 5.1
  published("days, GPT-3 on 1024 A100", days(175e9, 300e9, 1024, 140e12, "full"), 34, 0)


def test_glm_130b():
  """4224 sequences of 2048 tokens in 88.5 s on 768 A100, layers computed again: 32.5 and 43.3 % in the paper, which rounds."""
  cost = flops.count(SHAPES["glm-130b"], 2048, remat="full")
  speed, peak = 4224 * 2048 / 88.5 / 768, flops.DEVICES["a100-40gb"].flops
  published("glm-130b: parameters, billions", cost.parameters / 1e9, 128.70, 2)
  published("glm-130b: MFU, %", 100 * cost.mfu(speed, peak), 32.36, 2)
  published("glm-130b: HFU, %", 100 * cost.hfu(speed, peak), 43.0, 1)
  assert cost.tokens_per_second(cost.mfu(speed, peak), peak) == pytest.approx(speed)


MEGATRON = {  # h, l, a; sequences, devices, seconds a step, MFU: Korthikanti et al. (2022), tables 3 and 5
  "22B": ((6144, 48, 64), (4, 8, 1.10), 41.5),
  "175B": ((12288, 96, 96), (64, 64, 13.75), 51.4),
  "530B": ((20480, 105, 128), (280, 280, 37.83), 56.0),
  "1T": ((25600, 128, 160), (512, 512, 71.49), 56.3),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatrons_utilisation(name):
  shape, (batch, devices, seconds), expected = MEGATRON[name]
  cost = flops.count(gpt(*shape), 2048, remat="selective")
  speed = batch * 2048 / seconds / devices
  published(
    f"Megatron {name}: MFU, %", 100 * cost.mfu(speed, 312e12), expected, abs=0.25
  )  # seconds have three digits
  assert cost.mfu(speed, 312e12) < cost.hfu(speed, 312e12)


def test_palms_utilisation():
  """PaLM 540B: 238,300 tokens/s on 6144 TPU v4, 46.2 %.  Source: Chowdhery et al. (2022), section 4.1, appendix B."""
  sizes = dict(vocab_size=256000, embed_dim=18432, num_layers=118, num_heads=48, num_kv_heads=1, head_dim=256)
  cfg = ModelConfig(**sizes, mlp_dim=4 * 18432, wiring=Parallel(), tie_embeddings=True)
  cost = flops.count(cfg, 2048)
  published("PaLM 540B: parameters, billions", cost.parameters / 1e9, 540.35, abs=0.01)
  published("PaLM 540B: MFU, %", 100 * cost.mfu(238_300 / 6144, flops.DEVICES["tpu-v4"].flops), 46.2, 1)


@pytest.mark.parametrize("h, depth, a, s, V", [(64, 3, 4, 16, 100), (12288, 96, 96, 2048, 51200)])
def test_published_forms_are_this_one(h, depth, a, s, V):
  """PaLM's 6 (12 l h^2 + V h) + 12 l h s a token, Megatron's 72 B s l h^2 (1 + s / 6h + V / 12lh), 96 with V / 16lh."""
  cost = flops.count(gpt(h, depth, a, V), s, remat="full")
  assert 3 * sum(cost.forward.values()) == s * (6 * (12 * depth * h**2 + V * h) + 12 * depth * h * s)
  assert cost.model * s == pytest.approx(
    72 * s * depth * h**2 * (1 + s / (6 * h) + V / (12 * depth * h)), rel=1e-12
  )
  assert cost.hardware * s == pytest.approx(
    96 * s * depth * h**2 * (1 + s / (6 * h) + V / (16 * depth * h)), rel=1e-12
  )


def test_six_a_parameter():
  """LLaMA-13B at 2048 tokens: that of its layers is 0.926 of all."""
  cost, cfg = flops.count(SHAPES["llama-13b"], 2048), SHAPES["llama-13b"]
  layers = cost.parameters - 2 * cfg.vocab_size * cfg.embed_dim
  published("llama-13b: 6 a parameter of its layers over all", 6 * layers / cost.model, 0.926, abs=1e-3)


def test_only_attention_grows_with_the_length():
  """Twice the length: twice the scores a token; with a window in the causal convention nearly none more."""
  one, two = (flops.forward(SHAPES["llama-7b"], length) for length in (2048, 4096))
  assert two["attention"] == 4 * one["attention"]
  assert all(two[part] == 2 * one[part] for part in ("projections", "mlp", "head"))
  one, two = (flops.forward(SHAPES["mistral-7b"], n, "causal")["attention"] / n for n in (65536, 131072))
  assert two / one == pytest.approx(1, abs=0.02)
  full, causal = (flops.count(SHAPES["llama-7b"], 2048, attention=a) for a in flops.ATTENTION)
  assert causal.forward["attention"] / full.forward["attention"] == (2048 + 1) / 2 / 2048


@pytest.mark.parametrize("remat", flops.REMAT)
def test_hfu_is_never_below_mfu(remat):
  cost = flops.count(SHAPES["llama-7b"], 2048, remat=remat)
  assert cost.mfu(1, 1) <= cost.hfu(1, 1)
  assert (cost.mfu(1, 1) == cost.hfu(1, 1)) == (remat == "none")


@pytest.mark.parametrize("h, a, extra, saved", [(12288, 96, 2.7, 70), (20480, 128, 1.6, 65)])
def test_selective_recomputation(h, a, extra, saved):
  """GPT-3 and MT-NLG: 2.7 and 1.6 % of a forward pass, for 70 and 65 % of the activations.

  Source: Korthikanti et al. (2022), section 5, which does not say of what the former are a share.
  """
  cfg = gpt(h, 96 if a == 96 else 105, a)
  parts = flops.forward(cfg, 2048)
  again = 100 * flops.recomputed(parts, "selective") / sum(parts.values())
  published(f"Megatron, width {h}: selective recomputation, %", again, extra, 1)
  kept, left = (
    flops.layer_activations(cfg, cfg.layers[0], 2048, remat=one, dropout=True)
    for one in ("none", "selective")
  )
  published(f"Megatron, width {h}: activations that it spares, %", 100 * (1 - left / kept), saved, 0)


@pytest.mark.parametrize("h, a, s", [(64, 4, 32), (12288, 96, 2048)])
def test_activations_of_a_layer(h, a, s):
  """s h (34 + 5 a s / h), 34 s h selective, 2 s h full.  Source: Korthikanti et al. (2022), equations 1 to 6, table 2."""
  cfg = gpt(h, 2, a)
  bytes_of = lambda remat: flops.layer_activations(cfg, cfg.layers[0], s, remat=remat, dropout=True)
  assert [bytes_of(one) for one in flops.REMAT] == [34 * s * h + 5 * a * s * s, 34 * s * h, 2 * s * h]
  ends = 2 * s * 2 * h + 2 * 4 * s * 51200
  assert flops.activations(cfg, s, remat="none", dropout=True) == 2 * bytes_of("none") + ends
  assert flops.activations(cfg, s, remat="full", dropout=True) == 2 * s * h + bytes_of("none") + ends


@pytest.mark.parametrize("stage, expected", [*enumerate([120, 31.4, 16.6, 1.88])])
def test_zero(stage, expected):
  """7.5 B parameters on 64 devices, GB.  Source: Rajbhandari et al. (2019), figure 1."""
  found = sum(flops.states(7.5e9, 64, stage).values()) / 1e9
  published(f"ZeRO {stage}: 7.5 B on 64 devices, GB", found, expected, rel=3e-3)


def test_a_distributed_optimizer():
  """18 bytes a parameter, and 6 + 12 / d.  Source: Megatron-LM's documentation of it."""
  published("Megatron: bytes a parameter", sum(flops.states(1, precision="megatron").values()), 18)
  assert sum(flops.states(1, 8, 1, "megatron").values()) == 6 + 12 / 8


def test_float32_is_what_is_trained_here():
  """Parameters and moments of the real state, beside them counters only; gradients are of the parameters' size."""
  cfg = gpt(32, 2, 4, 64)
  state = jax.eval_shape(lambda: init_state(Transformer(cfg), TrainConfig(4, 1, 8), 0))
  held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
  counted = flops.states(flops.count(cfg, 8).parameters, precision="float32")
  assert 0 <= held - counted["parameters"] - counted["optimizer"] <= 16


def test_caches():
  """OPT-13B: 800 KB a token (Kwon et al., 2023, section 3); Mistral's window at 32k tokens: an eighth (its paper, 2)."""
  opt = gpt(5120, 40, 40, 50272, dtype="float16")
  assert flops.cache(opt, 100, 3) == 100 * 3 * 800 * 1024
  mistral = SHAPES["mistral-7b"]
  whole = dataclasses.replace(mistral, layers=(Layer(Rope()),))
  assert flops.cache(whole, 32768) / flops.cache(mistral, 32768, call=1) == pytest.approx(8, rel=1e-3)
  assert flops.cache(SHAPES["llama-3-70b"], 1) == 2 * 80 * 8 * 128 * 2
  small = flops.cache(whole, 32768, store="int4") / flops.cache(whole, 32768)
  assert small == pytest.approx((128 / 2 + 8) / (2 * 128), rel=1e-2)  # 4 bits, and two float32 a head


BAD = {
  "length": lambda cfg: flops.count(cfg, 0),
  "attention": lambda cfg: flops.count(cfg, 8, attention="half"),
  "remat": lambda cfg: flops.count(cfg, 8, remat="some"),
  "stage": lambda cfg: flops.states(1, 1, 4),
  "precision": lambda cfg: flops.states(1, precision="int8"),
  "store": lambda cfg: flops.cache(cfg, 8, store="int2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_there_is_not_is_told(name):
  with pytest.raises(ConfigError, match=f"^{name}: found .*expected"):
    BAD[name](gpt(8, 1, 2, 16))


def test_devices():
  """Published peaks; all have a source, and the flags know them."""
  peaks = {"a100": 312, "h100": 989.4, "h200": 989.4, "tpu-v3": 123, "tpu-v4": 275, "v5e": 197}
  assert {name: flops.DEVICES[name].flops / 1e12 for name in peaks} == peaks
  assert tuple(flops.DEVICES) == choices.DEVICES
  assert all(one.source and one.memory >= 16e9 for one in flops.DEVICES.values())
