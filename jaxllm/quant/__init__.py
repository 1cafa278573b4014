"""Weights held as integers: schemes by name, `apply`, which puts them on a tree, and what a tree then takes.

int8          8 bits, a scale a column       Dettmers et al. (2022), LLM.int8(), section 2.1 (vector-wise)
int8_tensor   8 bits, one scale a matrix     the same (absmax)
int8_asym     8 bits, a scale and a zero point a column    the same (zeropoint)
int4, int3    4 or 3 bits, a scale a group of 128            Frantar et al. (2022), GPTQ, section 4 (round to nearest)
int4_asym, int3_asym    a scale and a zero point a group     the same
w8a8          8 bits by column, and rows by 8 bits as they come    Dettmers et al. (2022), section 2.1 (vector-wise)
zeroquant     8 bits by groups of 128, and rows by 8 bits    Yao et al. (2022), ZeroQuant, section 4
llm_int8      w8a8 with outlier features in full precision   Dettmers et al. (2022), LLM.int8(), section 3
nf4, fp4      4 bits, a scale a block of 64; double_quant=True: of 8 bits    Dettmers et al. (2023), QLoRA, section 3
glm_int8, glm_int4    8 or 4 bits, a half-precision scale a column    Zeng et al. (2022), GLM-130B
"""

import functools

from jaxllm.leaf import QTensor
from jaxllm.leaf import dense as dequantize
from jaxllm.quant.codebook import Codebook
from jaxllm.quant.glm import GlmRows
from jaxllm.quant.groups import Groups
from jaxllm.quant.int8 import Int8
from jaxllm.quant.llm_int8 import LlmInt8
from jaxllm.quant.quantize import DEFAULT, apply, report
from jaxllm.quant.w8a8 import W8A8
from jaxllm.quant.zeroquant import ZeroQuant

SCHEMES = {
  "int8": Int8,
  "int8_tensor": functools.partial(Int8, per="tensor"),
  "int8_asym": functools.partial(Int8, symmetric=False),
  "int4": functools.partial(Groups, bits=4),
  "int4_asym": functools.partial(Groups, bits=4, symmetric=False),
  "int3": functools.partial(Groups, bits=3),
  "int3_asym": functools.partial(Groups, bits=3, symmetric=False),
  "w8a8": W8A8,
  "zeroquant": ZeroQuant,
  "llm_int8": LlmInt8,
  "nf4": Codebook,
  "fp4": functools.partial(Codebook, levels="fp4"),
  "glm_int8": GlmRows,
  "glm_int4": functools.partial(GlmRows, bits=4),
}

__all__ = ["DEFAULT", "SCHEMES", "QTensor", "apply", "dequantize", "report"]
