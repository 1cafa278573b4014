"""What the step of a run needs, on devices that need not be there: nothing is read but settings, and nothing is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.compiling import report_training, target
from experiments.training.begin import shapes_of
from experiments.training.settings import Settings
from experiments.training.setup import GLM_IDS, model_config, train_config
from jaxllm import hf, parallel
from jaxllm.config import ModelConfig
from jaxllm.hf import hub
from jaxllm.ops.choose import CORES
from jaxllm.train.tokens import BYTES, open_text


def run(s: Settings) -> int:
  """Compile, print, and write the report; 0."""
  on = target(s.mesh or "fsdp=-1", s.topology)  # before anything else touches a device
  cfg = _config(s)
  cfg.check_length(s.length, "--length")
  config = train_config(s, "bf16" if s.topology else None)
  rules = s.rules or parallel.default_rules(on.mesh)
  found = report_training(cfg, config, rules, on, scan=s.scan, params=shapes_of(s, cfg))
  found.write(Path(s.out) / "compiled", s.name, "train")
  return 0


def _config(s: Settings) -> ModelConfig:
  """The model's, of the settings alone; the vocabulary of one from scratch is that of --text's header, or bytes."""
  if s.model is not None:
    cfg = hf.load_config(hub.find(s.model, weights=False))[1]
    cfg = cfg if s.dtype == "auto" else dataclasses.replace(cfg, dtype=s.dtype)
    return dataclasses.replace(cfg, attention=CORES[s.attention]())
  given = s.text is not None and s.text.endswith(".bin")
  more = GLM_IDS if s.objective == "glm" and s.glm_ids is None else 0
  return model_config(s, (open_text(s.text).vocab_size if given else BYTES) + more)
