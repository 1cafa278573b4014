"""One setting for all tests: eight CPU devices, exact products, no implicit rank promotion, quick compilation; tables."""

import gc
import importlib
import os
from importlib.metadata import version
from pathlib import Path

# The tests compile much and compute little: LLVM's optimizations would cost more than they save.  What XLA
# rewrites and fuses stays as it is, and flags of the user come last and win.  One LLVM module a program, in place of up to
# 32 for as many threads, takes a quarter off: each test has a core to itself.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
  # the older emitter compiles in half the time; later ones do not have it
  FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

from jaxllm.study import compile_cache  # noqa: E402

compile_cache.turn_on()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # TF32 or bf16 passes would be judged otherwise


MOST_MAPS = 30_000
"""Of the 65,530 pieces of memory that Linux gives a process: a program takes dozens, and XLA crashes where there is no more."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten_in_time():
  """After a module, where it and those before it have compiled very much."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


TABLES = {
  "components": ("components", "a row a component: file, source, golden error, tests"),
  "families": ("family_table", "a row a model family: file, variants, errors, of `pytest tests/hf`"),
  "generation": ("generation_table", "what was measured of generated text, in numbered tables"),
  "quantization": ("quantization_table", "what was measured of quantized weights, in numbered tables"),
  "training": ("training_table", "what was measured of training, in numbered tables"),
}
"""Each option that prints tables after a run: the module that makes them, and what is in them."""


def pytest_addoption(parser):
  for option, (_, text) in TABLES.items():
    text = f"after the run, print {text}; --{option}=FILE.md writes it too"
    parser.addoption(f"--{option}", nargs="?", const="", metavar="FILE.md", help=text)


def pytest_itemcollected(item):
  """A slow row is not of the core, whatever its test is."""
  if item.get_closest_marker("slow"):
    item.own_markers = [mark for mark in item.own_markers if mark.name != "core"]


def pytest_configure(config):
  for option, (module, _) in TABLES.items():
    path = config.getoption(f"--{option}")
    if path is None:
      continue
    if path and not path.endswith(".md"):
      raise pytest.UsageError(
        f"--{option}: found {path!r}, expected --{option} or --{option}=FILE.md; write it last, or with ="
      )
    config.pluginmanager.register(importlib.import_module(module).Table(path), option)
