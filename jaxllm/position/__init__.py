"""Position methods: each is a frozen dataclass that overrides the hooks of `base.Position` it changes.

POSITIONS names them for the command line and for JSON; adding one is a class in one of these files and a line here.
"""

from jaxllm.position.absolute import Learned, Sinusoidal
from jaxllm.position.base import NoPE, Position
from jaxllm.position.bias import Alibi, T5Bias, alibi_slopes
from jaxllm.position.query_scale import Llama4Scale, LogN
from jaxllm.position.rope import (
  DynamicNtkRope,
  NtkFixedRope,
  NtkMixedRope,
  NtkOldRope,
  NtkRope,
  PiRope,
  Rope,
  YarnRope,
)
from jaxllm.position.rope_2d import Rope2d, glm_positions, next_glm_positions
from jaxllm.position.scalings import Llama3Rope, LongRope, NtkByPartsRope, ProportionalRope
from jaxllm.position.tables import PositionTables, RopeTable
from jaxllm.position.window import (
  InvLeakyReRope,
  LeakyReRope,
  ReRope,
  SelfExtendRope,
  StreamingRope,
  XPosRope,
)

POSITIONS: dict[str, type[Position]] = {
  "nope": NoPE,
  "sinusoidal": Sinusoidal,
  "learned": Learned,
  "t5": T5Bias,
  "alibi": Alibi,
  "rope": Rope,
  "pi": PiRope,
  "ntk_old": NtkOldRope,
  "ntk": NtkRope,
  "ntk_fixed": NtkFixedRope,
  "ntk_mixed": NtkMixedRope,
  "ntk_by_parts": NtkByPartsRope,
  "dynamic_ntk": DynamicNtkRope,
  "yarn": YarnRope,
  "longrope": LongRope,
  "llama3": Llama3Rope,
  "proportional": ProportionalRope,
  "xpos": XPosRope,
  "rerope": ReRope,
  "leaky_rerope": LeakyReRope,
  "inv_leaky_rerope": InvLeakyReRope,
  "self_extend": SelfExtendRope,
  "streaming": StreamingRope,
  "rope_2d": Rope2d,
}

__all__ = [
  "POSITIONS",
  "Alibi",
  "Llama4Scale",
  "LogN",
  "NoPE",
  "Position",
  "PositionTables",
  "ReRope",
  "Rope",
  "RopeTable",
  "alibi_slopes",
  "glm_positions",
  "next_glm_positions",
]
