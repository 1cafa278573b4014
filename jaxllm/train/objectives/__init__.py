"""What is learned from text, by name: `causal`, `prefix_lm`, and `glm`, GLM's blank infilling."""

from jaxllm.train.objectives.causal import Causal, PrefixLm
from jaxllm.train.objectives.example import SMALLEST, Example, Objective
from jaxllm.train.objectives.infilling import BlankInfilling

OBJECTIVES = {"causal": Causal, "prefix_lm": PrefixLm, "glm": BlankInfilling}

__all__ = ["OBJECTIVES", "SMALLEST", "BlankInfilling", "Causal", "Example", "Objective", "PrefixLm"]
