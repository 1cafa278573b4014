"""Where the models of a sweep come from: what the sweep asks of them, whether they are trained here or loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.evaluate.text import Text
from jaxllm.study import methods
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag


class Models:
  """The models of a sweep, by scheme and seed, and the text that they are tested on.

  schemes: what can be put on each.  configs: the models as they were trained; tested: as they are tested.  text: what they have
  not seen, as they read it.  unit: what a token is called.  in_length: up to how many windows measure a model within its
  trained length.
  """

  schemes: dict[str, methods.Scheme]
  configs: dict[str, ModelConfig]
  tested: dict[str, ModelConfig]
  text: Text
  unit: str
  in_length: int

  def begin(self, progress: Progress, stop: StopFlag, left: int) -> None:
    """Told before the first model is asked for: where to show work, what asks for its end, how many groups are to compute.

    Raises what keeps all of them from being computed.
    """

  def params(self, scheme: str, seed: int):
    """The parameters of a model; raises the error of a training that failed, again each time it is asked for."""
    raise NotImplementedError

  def keep(self, scheme: str, seed: int) -> None:
    """See that a model whose cells are all recorded is where it belongs."""

  def scope(self) -> contextlib.AbstractContextManager:
    """What computing with the models happens in: their mesh, if they have one."""
    return contextlib.nullcontext()

  def record(self) -> dict:
    """What config.json holds of the models and the text, so that the run can be repeated."""
    raise NotImplementedError

  def name(self, scheme: str) -> str:
    """How tables and figures name a scheme."""
    return scheme

  def learnt(self, values: dict[str, Sequence[float]], windows: np.ndarray) -> str:
    """A sentence: what the models reach within their trained length; `values` are bits per byte on `windows`, by scheme."""
    raise NotImplementedError

  def lines(self, config: dict) -> list[str]:
    """What the report says of text, training and models, a line each."""
    raise NotImplementedError
