"""experiments.generate on a checkpoint: each flag does something, what streams is the whole text, and the figures agree."""

import json

import loaded_case
import numpy as np
import pytest
import sweep_case
import tokenizers
from absl import flags

from experiments import continuing, generate
from jaxllm import hf
from jaxllm.generate import loop

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
GREEDY = ("--temperature=0", "--top_p=1", "-n=12")


def call(*args):
  return sweep_case.run(*args, script=generate, check=generate.check)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A directory whose tokens are parts of words, with a chat template, trained at 16 tokens."""
  directory = tmp_path_factory.mktemp("generate") / "model"
  size = loaded_case.word_tokenizer(directory)
  backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE})
  )
  cfg = loaded_case.config(vocab_size=size, num_layers=1)
  loaded_case.hf.save(directory, cfg, loaded_case.params(cfg, seed=3))
  return directory


@pytest.fixture
def ask(model, capfdbinary):
  """ask(*args): what is written to standard output."""

  def asked(*args, prompt="the quick", code=0):
    own = (f"--prompt={prompt}",) if prompt else ()
    assert call(f"--model={model}", *own, *GREEDY, *args) == code
    asked.out, asked.err = (one.decode() for one in capfdbinary.readouterr())
    return asked.out

  return asked


def rows(text):
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.core
def test_the_text_is_the_same_whole_streamed_and_in_json(model, ask):
  whole = ask()
  assert whole.startswith("the quick") and len(whole) > len("the quick\n") and whole.endswith("\n")
  assert "[length: " in ask.err and "12 new" in ask.err
  assert ask("--stream") == whole
  (row,) = rows(ask("--json", "--logprobs=3"))
  assert row["prompt"] + row["text"] + "\n" == whole
  assert ask("--nodisplay_prompt") == row["text"] + "\n"
  # the model's own word for it, by the library
  cfg, params = hf.load(model)
  tokenizer = hf.load_tokenizer(model, cfg)
  ids = tokenizer.encode("the quick")
  out = loop.generate(loop.Transformer(cfg), params, [ids], max_new_tokens=12, logprobs=3)
  assert row["ids"] == out.tokens[0] and tokenizer.decode(ids[1:] + row["ids"]) == row["prompt"] + row["text"]
  assert (row["prompt_tokens"], row["tokens"], row["finish_reason"], row["stopped_by"]) == (
    len(ids),
    12,
    "length",
    None,
  )
  assert [one["id"] for one in row["logprobs"]] == row["ids"]
  np.testing.assert_allclose([one["logprob"] for one in row["logprobs"]], out.logprobs[0], rtol=1e-5)
  for one, best in zip(row["logprobs"], out.likeliest[0], strict=True):
    assert len(one["top"]) == 3 and one["top"][0]["id"] == one["id"] == best[0][0]
  assert 0 < row["first_token_seconds"] < row["seconds"] and row["compile_seconds"] < row["seconds"]
  assert row["prompt_tokens_per_second"] > 0 and row["tokens_per_second"] > 11 / row["seconds"]
  assert row["settings"]["temperature"] == 0 and row["settings"]["model"] == str(model)


def test_figures_are_those_of_the_clock(model, ask, monkeypatch):
  """0.2 s before the first token, and 0.3 s after it, nothing of which is compiling."""
  told = []

  def slow(*args, on_tokens, **kwargs):
    told.append(kwargs)
    continuing.time.sleep(0.2)
    on_tokens(0, [70])
    continuing.time.sleep(0.3)
    on_tokens(0, [71, 72, 73])
    return loop.Generated([[70, 71, 72, 73]], ["length"])

  monkeypatch.setattr(loop, "generate", slow)
  (row,) = rows(ask("--json"))
  assert row["first_token_seconds"] == pytest.approx(0.2, abs=0.05) and row["seconds"] == pytest.approx(
    0.5, abs=0.1
  )
  assert row["prompt_tokens_per_second"] == pytest.approx(row["prompt_tokens"] / 0.2, rel=0.25)
  assert row["tokens_per_second"] == pytest.approx(3 / 0.3, rel=0.25) and row["compile_seconds"] < 0.05


def test_spans_of_compiling_count_once():
  spans = [(1.0, 2.0), (1.5, 1.75), (1.9, 2.5), (4.0, 9.0)]
  assert continuing.covered(spans, 0.0, 5.0) == pytest.approx(2.5)
  assert continuing.covered(spans, 2.0, 3.0) == pytest.approx(0.5) and continuing.covered([], 0, 1) == 0


def test_a_stop_string_ends_the_text_before_it(ask):
  (row,) = rows(ask("--json"))
  text = row["text"]
  stop = text[3:5]  # within the text, wherever tokens end
  (cut,) = rows(ask("--json", f"--stop={stop}", "--stop=never"))
  assert cut["text"] == text[: text.index(stop)] and cut["ids"] == row["ids"][: cut["tokens"]]
  assert (cut["finish_reason"], cut["stopped_by"]) == ("stop", stop) and cut["tokens"] < 12
  assert ask("--stream", f"--stop={stop}") == "the quick" + cut["text"] + "\n" == ask(f"--stop={stop}")


def test_a_stop_string_that_is_a_token_is_one_and_ignore_eos_goes_on(ask, monkeypatch):
  seen = []
  own = loop.generate
  monkeypatch.setattr(
    loop, "generate", lambda *a, stop_ids, **k: seen.append(stop_ids) or own(*a, stop_ids=stop_ids, **k)
  )
  ask("--stop=<s>")
  ask("--ignore_eos", "--stop=<s>")
  ask("--ignore_eos")
  assert len(seen[0]) == 1 and seen[1] == seen[0] and seen[2] == ()


def test_flags_of_drawing_change_the_text(ask):
  greedy = ask()
  hot = [ask("--temperature=2", f"--seed={seed}") for seed in (0, 0, 1)]
  assert hot[0] == hot[1] != hot[2] != greedy
  assert (
    len(rows(ask("--json", "--n_predict=3"))[0]["ids"])
    == 3
    == len(rows(ask("--json", "--tokens=3"))[0]["ids"])
  )
  assert rows(ask("--json", "--cache_type=int4"))[0]["settings"]["cache_type"] == "int4"


def test_prompts_of_a_file_are_each_as_alone(ask, tmp_path):
  texts = ["the quick", "lazy dog 1, 2", "señor"]
  alone = [ask(prompt=text) for text in texts]
  plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
  plain.write_text("\r\n\n".join(texts) + "\n")
  lines.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
  for path in (plain, lines):
    assert ask(f"--prompts_file={path}", prompt=None) == "".join(alone)
    assert "== prompt 2, none ==" in ask.err
  found = rows(ask(f"--prompts_file={plain}", "--json", "--batch_size=2", prompt=None))
  assert [row["prompt"] + row["text"] + "\n" for row in found] == alone and [row["row"] for row in found] == [
    0,
    1,
    2,
  ]
  hot = ("--json", "--temperature=1.5", f"--prompts_file={plain}")
  together, apart = (rows(ask(*hot, f"--batch_size={n}", prompt=None)) for n in (3, 1))
  assert [row["ids"] for row in together] == [row["ids"] for row in apart]  # draws of a row are its own


def test_figures_of_a_batch_are_of_its_real_rows(ask, tmp_path):
  plain = tmp_path / "prompts.txt"
  plain.write_text("the quick\nlazy dog\nthe quick\n")
  ask(f"--prompts_file={plain}", "--batch_size=2", prompt=None)
  notes = [line for line in ask.err.splitlines() if line.startswith("[")]
  assert ["24 new" in note for note in notes] == [True, False] and "12 new" in notes[1]
  assert notes[0].startswith("[length, length: ") and notes[1].startswith("[length: ")
  ask(f"--prompts_file={plain}", "--batch_size=20000", prompt=None)
  assert "36 new" in ask.err


def test_a_mark_of_byte_order_is_no_text(ask, tmp_path):
  plain = tmp_path / "prompts.txt"
  plain.write_bytes(b"\xef\xbb\xbfthe quick")
  assert ask(f"--prompts_file={plain}", prompt=None) == ask()


def test_the_prompt_of_a_chat_is_shown_where_it_is_asked_for(ask):
  bare = ask("--chat")
  assert ask("--chat", "--display_prompt") == f"[user] the quick\n[assistant]{bare}"


def test_a_text_beyond_the_trained_length_is_noted(ask):
  ask("-n=60")
  assert "times the trained length of 16, as loaded (--method puts" in ask.err
  ask("-n=10")
  assert "trained length" not in ask.err


def test_dry_breaks_at_the_texts_of_its_flag(ask, model):
  cfg, _ = hf.load(model)
  from jaxllm.study import samplers

  def parsed(*breakers):
    values = flags.FlagValues()
    samplers.define(values=values)
    values(["", "--dry_multiplier=1", *(f"--dry_sequence_breaker={text}" for text in breakers)])
    return values

  decode = hf.load_tokenizer(model, cfg).decode
  found = samplers.breakers(parsed("\n", ":"), decode, cfg.vocab_size)
  assert found.any() and all(found[i] == any(x in decode([i]) for x in "\n:") for i in range(cfg.vocab_size))
  assert samplers.breakers(parsed("none"), decode, cfg.vocab_size) is None


def test_chats_are_in_the_template(ask, tmp_path):
  (row,) = rows(ask("--chat", "--system=be kind", "--json", prompt="hello"))
  assert row["prompt"] == "[system] be kind\n[user] hello\n[assistant]"
  assert row["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
  assert ask("--chat", "--system=be kind", prompt="hello") == row["text"] + "\n"
  path = tmp_path / "chats.jsonl"
  path.write_text(json.dumps({"messages": row["messages"]}))
  assert rows(ask("--json", f"--prompts_file={path}", prompt=None))[0]["ids"] == row["ids"]


@pytest.mark.parametrize(
  ("more", "programs"),
  [
    pytest.param((), 0, marks=pytest.mark.core),
    pytest.param(("dynamic_ntk", "rerope"), 2, marks=pytest.mark.slow),
  ],
)
def test_methods_beside_each_other_are_as_each_alone_and_share_a_program(ask, more, programs):
  """ntk and yarn have that of none; dynamic NTK has rows of tables, and ReRoPE scores of its own."""
  names = ("none", "ntk", "yarn", *more)
  args = ("-n=20", "--factor=4")
  ask("-n=20")
  compiled = (loop.prefill._cache_size(), loop.decode._cache_size())
  found = rows(ask(*args, "--json", f"--compare={','.join(names)}"))
  assert [row["method"] for row in found] == list(names)
  assert [row["factor"] for row in found] == [None, 4, 4, 4, None][: len(names)]
  assert len({tuple(row["ids"]) for row in found}) > 2
  assert loop.prefill._cache_size() - compiled[0] == programs == loop.decode._cache_size() - compiled[1]
  for row in found[2:]:
    own = ("--factor=4",) if row["factor"] else ()
    assert rows(ask("-n=20", "--json", f"--method={row['method']}", *own))[0]["ids"] == row["ids"], row[
      "method"
    ]
  assert ask(*args, "--compare=none,yarn") == "".join(
    f"the quick{row['text']}\n" for row in (found[0], found[2])
  )
  assert "== prompt 1, yarn, factor 4 ==" in ask.err


@pytest.mark.slow
def test_a_model_on_a_mesh_writes_the_same(ask):
  assert ask("--mesh=fsdp=2,tensor=4") == ask("--dtype=float32")


@pytest.mark.slow
def test_rules_and_verify_reach_the_checkpoint(ask):
  row = rows(ask("--json", "--mesh=data=8", "--rules=data", "--noverify"))[0]
  assert row["settings"]["mesh"] == "data=8"
