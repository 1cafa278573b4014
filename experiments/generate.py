"""Continue texts or answer chats: by a checkpoint (--model), or by a model that the sweep has trained (--run).

The text goes to standard output and nothing else does; notes go to standard error.  A position method stretches the model past
the length it was trained at, and --compare shows what several of them make of the same prompt.
"""

import sys

from absl import flags

from jaxllm.errors import ConfigError, DataError
from jaxllm.study import choices, methods, prompts, run_app, samplers
from jaxllm.study.app import IO_ERROR
from jaxllm.study.stop import STOPPED

FLAGS = flags.FlagValues()
LENGTH = "max_new_tokens"


def _define() -> None:
  def flag(kind, name, default, about, *more, **kwargs):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS, **kwargs)

  flag(
    "string", "model", None, "the checkpoint: a directory or a repository of Hugging Face's", short_name="m"
  )
  flag(
    "string",
    "run",
    "runs/length_extrapolation",
    "without --model: the --out of the run that trained the model",
  )
  flag("enum", "scheme", "rope", "with --run: which of its models", enum_values=list(methods.SCHEMES))
  flag(
    "string", "prompt", None, "the text to continue; - reads standard input; default, with --run, 'def main('"
  )
  flag(
    "string", "prompts_file", None, 'a prompt a line; .jsonl: {"prompt": ...} or {"messages": [...]} a line'
  )
  flag("bool", "interactive", False, "answer one line of standard input after another; Ctrl-C ends an answer")
  flag(
    "bool",
    "chat",
    False,
    "prompts are what a user says, in the checkpoint's chat template; with --interactive a dialogue",
  )
  flag("string", "system", None, "with --chat: the system message before them")
  flag(
    "integer",
    LENGTH,
    256,
    "tokens to add, at most (of a model of --run: bytes); also -n, --tokens and --n_predict",
    short_name="n",
  )
  flag("multi_string", "stop", [], "end a text before this string; may be given several times")
  flag("bool", "ignore_eos", False, "go on after the tokens that end a text")
  flag("integer", "seed", 0, "the seed of the draws, from 0 to 2^32 - 1")
  flag("integer", "model_seed", 0, "with --run: which of the models of a scheme")
  flag("bool", "stream", None, "write text as it comes; default where standard output is a terminal")
  flag(
    "bool",
    "display_prompt",
    None,
    "write the prompt, of a chat in its template, before its continuation; default unless it is a chat",
  )
  flag(
    "bool", "json", False, "a JSON object a line and text, with ids, the reason it ended, speed and settings"
  )
  flag(
    "integer",
    "logprobs",
    None,
    "with --json: log-probabilities of the new tokens and of so many likeliest ones",
  )
  flag(
    "enum",
    "method",
    None,
    "position method; default none, with --run rerope where the model can have it",
    enum_values=list(methods.METHODS),
  )
  flag(
    "string",
    "compare",
    None,
    "position methods whose continuations are shown one after another, as none,ntk,yarn",
  )
  flag(
    "float",
    "factor",
    None,
    "context multiplier of the methods; default the whole text over the trained length, rounded up",
  )
  flag(
    "integer", "train_length", None, "with --model: tokens it was trained at; default what its settings say"
  )
  flag("integer", "batch_size", 1, "prompts of --prompts_file at once")
  flag("enum", "cache_type", "full", "the form of the key/value cache", enum_values=choices.STORES)
  flag("enum", "dtype", "auto", "with --model: type of computing and parameters; auto: what the files say",
       enum_values=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
  flag("string", "mesh", None, "with --model: devices to lay it out on, such as fsdp=2,tensor=4")
  flag("string", "rules", None, choices.RULES_HELP)
  flag("bool", "verify", True, choices.VERIFY_HELP)
  for name in ("tokens", "n_predict"):
    flags.DEFINE_alias(name, LENGTH, flag_values=FLAGS)
  samplers.define(values=FLAGS)


_define()

SETTINGS = (*samplers.FLAGS, *samplers.ALIASES, LENGTH, "tokens", "n_predict", "stop", "seed")
OF_MODEL = ("chat", "system", "train_length", "dtype", "mesh", "rules", "verify")


def check(f) -> None:
  """Refuse flags that no model could serve."""
  given = {name for name in f if f[name].present}
  problem = _contradiction(f, given)
  if problem:
    raise ConfigError(problem)
  for name in (LENGTH, "batch_size", "factor", "train_length"):
    if f[name].value is not None:
      choices.positive(name, f[name].value)
  if not 0 <= f.seed < 2**32:
    raise ConfigError(f"--seed={f.seed}: found {f.seed}, expected a whole number from 0 to {2**32 - 1}")
  if f.logprobs is not None and f.logprobs < 0:
    raise ConfigError(f"--logprobs={f.logprobs}: found {f.logprobs}, expected 0 or more")
  if "" in f.stop:
    raise ConfigError("--stop=: empty, which is in every text; leave it out")
  names = asked(f)
  for name in names:
    if f.model is None and (reason := methods.not_applicable(methods.SCHEMES[f.scheme], name)):
      flag = f"--compare={f.compare}" if f.compare else f"--method={name}"
      raise ConfigError(f"{flag} with --scheme={f.scheme}: {reason}; use --method=none")
  if f.factor is not None and not any(methods.METHODS[name].stretches for name in names):
    stretching = ", ".join(name for name, method in methods.METHODS.items() if method.stretches)
    raise ConfigError(
      f"--factor={f.factor} with --method={','.join(names)}, which takes no factor; leave it out, or use one of {stretching}"
    )
  samplers.check(f)


def _contradiction(f, given: set[str]) -> str | None:
  """Two flags of which one is too many, or one that needs another, in words."""
  if f.model is not None and (both := {"run", "scheme", "model_seed"} & given):
    return f"--model={f.model} with --{min(both)}: both name a model; give one of --model and --run"
  if f.model is None and (own := sorted(given & set(OF_MODEL))):
    return (
      f"--{own[0]} without --model: a model of --run has bytes as tokens and no such setting; leave it out"
    )
  sources = [
    name for name in ("prompt", "prompts_file", "interactive") if name in given and f[name].value is not False
  ]
  if len(sources) > 1:
    return f"--{sources[0]} with --{sources[1]}: give one of --prompt, --prompts_file and --interactive"
  if f.prompt == "":
    return "--prompt=: empty, expected text to continue"
  if f.model is not None and not sources:
    return "give one of --prompt=TEXT (- reads standard input), --prompts_file=FILE and --interactive"
  needs = {"system": "chat", "logprobs": "json", "rules": "mesh"}
  for name, other in needs.items():
    if f[name].value is not None and not f[other].value:
      return f"--{name} without --{other}: it has no effect; give --{other}, or leave it out"
  excluded = (
    *(("interactive", other) for other in ("json", "compare", "display_prompt")),
    *(("json", "stream"), ("json", "display_prompt"), ("compare", "method")),
  )
  for name, other in excluded:
    if f[name].value and f[other].value:
      return f"--{name} with --{other}: they do not go together; leave one out"
  if f.batch_size != 1 and (f.stream or f.prompts_file is None):
    other = "--stream, which shows one text at a time" if f.stream else "one prompt; it is for --prompts_file"
    return f"--batch_size={f.batch_size} with {other}; leave it out"
  return None


def asked(f) -> tuple[str, ...]:
  """The position methods that the flags name."""
  if f.compare is not None:
    return choices.choice_list("compare", f.compare, tuple(methods.METHODS))
  if f.method is not None:
    return (f.method,)
  bare = f.model is not None or methods.not_applicable(methods.SCHEMES[f.scheme], "rerope")
  return ("none" if bare else "rerope",)


def read(f) -> list[prompts.Prompt]:
  """The prompts, as messages where they are chats."""
  if f.prompts_file is not None:
    found = prompts.read_prompts(f.prompts_file, SETTINGS)
  else:
    found = [prompts.read_prompt("def main(" if f.prompt is None else f.prompt)]
  if f.model is None and any(one.messages for one in found):
    raise DataError(
      f"{f.prompts_file}: chats, which a model of --run has no template for; give --model, or prompts"
    )
  return [one.in_chat(f.system) if f.chat or one.messages else one for one in found]


def main(f) -> int:
  """Write the texts."""
  asking = [] if f.interactive else read(f)
  from experiments import texts

  try:
    return texts.write_all(f, asking, asked(f))
  except BrokenPipeError:  # the reader has seen enough
    return IO_ERROR
  except KeyboardInterrupt:
    print("\nstopped early; the same command begins anew", file=sys.stderr, flush=True)
    return STOPPED


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
