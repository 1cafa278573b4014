"""Train a language model: from scratch or from a checkpoint, in full, in part, or by LoRA and QLoRA, on any mesh of devices.

Text is a file of tokens (experiments.token_file), bytes for a model from scratch, or what the tokenizer of --model makes of it;
the order of its rows is a function of --seed and the step, so a run that is stopped or killed goes on, by the same command, to
the very numbers of one that was not.  In --out: metrics.jsonl and metrics.csv (a row every --log_every steps), checkpoints,
results, a figure of the loss, and at the end the model as a directory for transformers and for --model of every script, where
there is a family for it.

Several processes (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) run the same command on one mesh and --out.
"""

from absl import flags

from experiments.training import settings
from jaxllm.study import choices, run_app

FLAGS = flags.FlagValues()


def _define() -> None:
  def flag(kind, name, default, about, *more):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS)

  flag("string", "model", None, "the checkpoint to begin with: a directory or a repository of Hugging Face's")
  flag("string", "shape", None, "from scratch: a shape of experiments.shapes, such as llama-3-8b")
  flag("integer", "num_layers", 4, "from scratch: layers")
  flag("integer", "embed_dim", 128, "from scratch: width")
  flag("integer", "num_heads", 4, "from scratch: query heads")
  flag("integer", "num_kv_heads", None, "from scratch: heads of keys and values; default --num_heads")
  flag(
    "integer",
    "mlp_dim",
    None,
    "from scratch: hidden width of the SwiGLU; default 8/3 of the width, up to a multiple of 64",
  )
  flag("string", "position", None, "from scratch: a name of position.POSITIONS; default rope (glm: rope_2d)")
  flag("float", "base", None, "from scratch: the base of its frequencies; default the method's")
  flag("bool", "tie_embeddings", False, "from scratch: the head is the embedding")
  flag(
    "string",
    "text",
    None,
    "a .bin of tokens, or UTF-8 text: a file, or a directory; default Python's own sources",
  )
  flag(
    "string",
    "tokenizer",
    None,
    "from scratch, with a .bin: whose tokenizer is written beside the model; default the one that its header names",
  )
  flag(
    "integer",
    "separator",
    None,
    "the byte that ends each document of a file of bytes; then documents are packed",
  )
  flag("enum", "objective", "causal", "what is learned", settings.OBJECTIVES)
  flag(
    "string",
    "glm_ids",
    None,
    "--objective=glm: ids of [MASK], <sop>, <eop>; default, from scratch, three more than the text has",
  )
  flag("integer", "length", 128, "tokens of a row")
  flag("integer", "batch_size", 16, "rows of a step, over all devices")
  flag("integer", "steps", 1000, "steps of the whole run")
  flag("integer", "accumulate", 1, "parts of a batch that are computed one after the other")
  flag("enum", "optimizer", "adamw", "rule of the update", settings.OPTIMIZERS)
  flag("enum", "schedule", "cosine", "the rate after the warm-up", settings.SCHEDULES)
  flag("float", "learning_rate", 2e-3, "its peak")
  flag("float", "final_ratio", 0.02, "the rate at the end over the peak")
  flag("float", "warmup", 0.05, "share of the steps")
  flag("float", "weight_decay", 0.1, "of matrices inside the layers")
  flag("float", "beta1", 0.9, "decay of the first moment")
  flag("float", "beta2", 0.98, "decay of the second moment")
  flag("float", "clip_norm", 1.0, "largest norm of a gradient")
  flag("float", "z_loss", 0.0, "coefficient of log(sum exp logits)^2")
  flag("enum", "precision", "auto", "types of computing; auto: model on CPUs, else bf16", settings.PRECISIONS)
  flag("enum", "remat", "none", "what a layer keeps for its gradient", settings.REMATS)
  flag("bool", "scan", False, "layers as one compiled body: less to compile for deep models")
  flag("enum", "attention", "auto", "attention core; auto: by device, method and length", choices.CORES)
  flag(
    "enum",
    "train",
    "full",
    "all parameters, or the factors of LoRA on them as they are, or on them in nf4",
    settings.WHAT,
  )
  flag(
    "multi_string",
    "trained",
    [],
    "with --train=full: a rule, PATTERN=yes or PATTERN=no, of the parameters that are trained, where PATTERN is a regular "
    "expression of whole paths, as embed or layers/0/.+; the first that matches counts, and each has to match",
  )
  flag("integer", "lora_rank", 8, "columns of LoRA's factors")
  flag("float", "lora_alpha", 16.0, "LoRA's products are multiplied by alpha / rank")
  flag(
    "string",
    "lora_targets",
    None,
    "regular expression of the paths that get LoRA; default all matrices of layers",
  )
  flag(
    "enum",
    "dtype",
    "auto",
    "with --model: type of parameters as they are read",
    ["auto", "float32", "bfloat16", "float16"],
  )
  flag("bool", "verify", True, f"with --model: {choices.VERIFY_HELP}")
  flag("string", "mesh", None, "devices to train on, such as data=2,tensor=4")
  flag("string", "rules", None, choices.RULES_HELP)
  flag("integer", "seed", 0, "of parameters and of the order of the text")
  flag("integer", "save_every", 100, "steps between checkpoints")
  flag("integer", "keep", 2, "checkpoints that stay, at least 2")
  flag("integer", "log_every", 10, "steps between rows of the metrics")
  flag("integer", "eval_every", 100, "steps between looks at held-out text, 0: at the end only")
  flag("float", "eval_share", 0.05, "share of the text that is held out, where the text does not say")
  flag("integer", "eval_rows", 64, "rows of it that are looked at, at most")
  flag(
    "string",
    "profile",
    None,
    "steps to trace, as 20:23 for those after the 20th up to the 23rd, into --out/profile",
  )
  flag(
    "bool",
    "tensorboard",
    False,
    "metrics for TensorBoard too, in --out/tensorboard (the extra `tensorboard`)",
  )
  flag("enum", "device", None, "the chip, for MFU and HFU; default what jax says it is", choices.DEVICES)
  flag("bool", "compile_only", False, "compile the step, print what it needs, and train nothing")
  flag(
    "string",
    "topology",
    None,
    "with --compile_only: a TPU slice that is not there, as v5e:4x4 (the extra `tpu`)",
  )
  flag(
    "string",
    "out",
    None,
    "directory of the run; default runs/train (with the name of --model or --shape, _smoke)",
  )
  flag("bool", "smoke", False, "a tiny run that goes through everything")


_define()


def main(f) -> int:
  """The whole run."""
  s = settings.read(f)
  if s.compile_only:
    from experiments.training import compile_only

    return compile_only.run(s)
  from experiments.training import run

  return run.run(s)


if __name__ == "__main__":
  run_app(main, settings.read, values=FLAGS)
