"""All texts of a call of experiments.generate: each prompt by each method."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.continuing import Drawing, continued
from experiments.dialogue import talk
from experiments.showing import Asked, note, record, summary, write
from experiments.source import On, Source, put_on, put_on_all
from jaxllm.errors import ConfigError, DataError, JaxllmError, TokenizerError
from jaxllm.generate.text import StopStrings, Stream
from jaxllm.study import samplers
from jaxllm.study.prompts import Prompt

CHUNK = 32
"""Tokens drawn between two looks at them, where they are not shown one by one."""


def write_all(f: Any, prompts: Sequence[Prompt], names: Sequence[str]) -> int:
  """Everything that the flags ask for: texts, JSON lines or a dialogue; 0."""
  source = Source.of_checkpoint(f) if f.model else Source.of_run(Path(f.run), f.scheme, f.model_seed)
  if f.chat and source.tokenizer.template is None:
    raise TokenizerError(
      f"{source.tokenizer.source}: no chat template; leave --chat out, or take a model tuned for chats"
    )
  streams = f.interactive or (
    not f.json and f.batch_size == 1 and (sys.stdout.isatty() if f.stream is None else f.stream)
  )
  drawing = Drawing(
    samplers.sampler(f, samplers.breakers(f, source.decode, source.cfg.vocab_size)),
    f.max_new_tokens,
    source.stop_ids(f.stop, eos=not f.ignore_eos),
    1 if streams else CHUNK,
    f.cache_type,
    f.logprobs,
  )
  asked = [_encoded(source, number, prompt) for number, prompt in enumerate(prompts)]
  longest = max((len(one.ids) for one in asked), default=0)
  length = None if f.interactive else longest + f.max_new_tokens
  source.cfg.check_length(length or 1 + f.max_new_tokens, "longest prompt and --max_new_tokens")
  if f.logprobs is not None and f.logprobs > source.cfg.vocab_size:
    raise ConfigError(
      f"--logprobs={f.logprobs}: expected at most {source.cfg.vocab_size}, the ids of the model"
    )
  if f.compare is None:
    factor = f.factor
    ons = [put_on(source, names[0], factor, length, f"--method={names[0]}", f.method is not None)[0]]
  else:
    ons = put_on_all(source, names, f.factor, length)
  if not f.interactive and source.trained is not None and length > source.trained:
    for on in ons:
      if on.name == "none":
        note(
          f"note: up to {length} tokens, {length / source.trained:.3g} times the trained length of {source.trained}, as "
          "loaded (--method puts a position method on)"
        )
  params, key = source.params(), jax.random.key(f.seed)
  if f.interactive:
    return talk(source, params, ons[0], drawing, key, f.stop, f.chat, f.system)
  size = min(f.batch_size, len(asked))
  show = functools.partial(_batch, f, source, params, drawing, key, streams, size)
  for start in range(0, len(asked), size):
    for on in ons:
      show(on, asked[start : start + size], several=len(asked) > 1 or len(ons) > 1)
  return 0


def _encoded(source: Source, number: int, prompt: Prompt) -> Asked:
  try:
    if prompt.messages is not None:
      if source.tokenizer.template is None:
        raise TokenizerError(
          "a chat, and the model has no chat template; give a prompt, or take a model tuned for chats"
        )
      text = source.tokenizer.chat_text(prompt.messages)
      ids = source.tokenizer.encode(text, special_tokens=False)
    else:
      text = prompt.text
      ids = source.tokenizer.encode(text)
  except JaxllmError as e:
    raise type(e)(f"{prompt.source}: {e}") from None
  if not ids:
    raise DataError(f"{prompt.source}: {text!r} has no tokens, expected at least one")
  return Asked(number, prompt, text, ids)


def _batch(
  f: Any,
  source: Source,
  params: Any,
  drawing: Drawing,
  key: jax.Array,
  streams: bool,
  size: int,
  on: On,
  asked: Sequence[Asked],
  several: bool,
) -> None:
  """Continue some prompts at once, and write what comes of them."""
  # the last batch is as large as the others, so that there is one program
  rows = [*asked, *[asked[-1]] * (size - len(asked))]
  stop = StopStrings(f.stop, source.decode, broken=source.broken, prompts=[one.ids for one in rows])
  texts = [Stream(source.decode, source.broken, one.ids, stop) for one in rows]
  numbers = np.array([one.number for one in rows])
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
  displayed = lambda one: one.prompt.messages is None if f.display_prompt is None else f.display_prompt
  begin = lambda one: one.text if displayed(one) else ""
  heading = lambda one: note(f"== prompt {one.number + 1}, {on} ==") if several and not f.json else None

  def told(row: int, ids: list[int]) -> None:
    new = texts[row].push(ids)
    if streams:
      write(new)

  if streams:
    heading(asked[0])
    write(begin(asked[0]))
  out, figures = continued(
    source, params, on, drawing, [one.ids for one in rows], keys, stop, told, count=len(asked)
  )
  for row, one in enumerate(asked):
    rest = texts[row].finish()
    if f.json:
      more = _settings(f, source, drawing)
      write(record(source, on, one, row, texts[row], out, figures, more))
    elif streams:
      write(rest + "\n")
    else:
      heading(one)
      write(begin(one) + texts[row].text + "\n")
    if not f.json and size == 1:
      note(summary(figures, out.reasons[row]))
  if not f.json and size > 1:
    note(summary(figures, ", ".join(out.reasons[: len(asked)])))


def _settings(f: Any, source: Source, drawing: Drawing) -> dict[str, Any]:
  """What made the text, beside its prompt, method and factor."""
  model = {"model": f.model} if f.model else {"run": f.run, "scheme": f.scheme, "model_seed": f.model_seed}
  return {
    **model,
    "trained_length": source.trained,
    "dtype": source.cfg.dtype,
    "mesh": f.mesh,
    "cache_type": f.cache_type,
    "seed": f.seed,
    "max_new_tokens": f.max_new_tokens,
    "stop": list(f.stop),
    "stop_ids": list(drawing.stop_ids),
    "batch_size": f.batch_size,
    **{name: f[name].value for name in samplers.FLAGS},
    "dry_sequence_breaker": list(f.dry_sequence_breaker),
    "sampler_order": f.sampler_order,
  }
