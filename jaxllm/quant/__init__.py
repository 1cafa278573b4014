"""Weights held as integers: schemes by name, `apply`, which puts them on a tree, and what a tree then takes.

int8          8 bits, a scale a column       Dettmers et al. (2022), LLM.int8(), section 2.1 (vector-wise)
int8_tensor   8 bits, one scale a matrix     the same (absmax)
int8_asym     8 bits, a scale and a zero point a column    the same (zeropoint)
"""

from jaxllm.leaf import QTensor
from jaxllm.leaf import dense as dequantize
from jaxllm.quant.int8 import Int8
from jaxllm.quant.quantize import DEFAULT, apply, report

SCHEMES = {
  "int8": Int8,
  "int8_tensor": lambda: Int8(per="tensor"),
  "int8_asym": lambda: Int8(symmetric=False),
}

__all__ = ["DEFAULT", "SCHEMES", "QTensor", "apply", "dequantize", "report"]
