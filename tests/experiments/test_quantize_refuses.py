"""experiments.quantize: schemes by name, which of them can hold a model's weights, and flags that are refused."""

import dataclasses
import re

import loaded_case
import pytest
import quantize_case
from quantize_case import QUICK, call, rows

from experiments.quantization import schemes
from jaxllm import hf, quant
from jaxllm.activation import Mlp
from jaxllm.config import Layer
from jaxllm.errors import ConfigError, QuantError
from jaxllm.norm import LayerNorm
from jaxllm.position import Learned
from jaxllm.quant import Int8


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  return quantize_case.save(tmp_path_factory.mktemp("quantize"))


@dataclasses.dataclass(frozen=True)
class Picky(Int8):
  """Int8 of widths that a group divides."""

  group: int = 128

  def quantize(self, w):
    if w.shape[-2] % self.group:
      raise QuantError(f"found a width of {w.shape[-2]}, expected a multiple of {self.group}")
    return super().quantize(w)


@dataclasses.dataclass(frozen=True)
class Never(Int8):
  """Int8 of no width."""

  def quantize(self, w):
    raise QuantError(f"found a width of {w.shape[-2]}")


def test_a_scheme_that_cannot_hold_the_weights_is_refused_by_name_and_in_all_has_smaller_groups_or_is_left_out(
  case, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(quant, "SCHEMES", {"picky": Picky, "never": Never})
  base = (f"--model={case[0]}", f"--text={case[1]}", *QUICK, f"--out={tmp_path / 'out'}")
  assert call(*base, "--schemes=picky:group=64,picky") == 2
  error = capfd.readouterr().err
  assert (
    "picky:group=64 cannot hold the weights of the model: layers/0/attn/k/w: found a width of 32, expected a multiple of 64"
    in error
  )
  assert not (tmp_path / "out").exists()
  assert call(*base, "--schemes=all") == 0
  shown, text = capfd.readouterr().out, (tmp_path / "out" / "report.md").read_text()
  reasons = (
    "picky: layers/0/attn/k/w: found a width of 32, expected a multiple of 128; in its place picky:group=32\n",
    "never: layers/0/attn/k/w: found a width of 32\n",
  )
  for reason in reasons:
    assert f"--schemes=all without {reason}" in shown and f"- left out: {reason}" in text
  assert {row["quant"] for row in rows(tmp_path / "out")} == {"none", "picky:group=32"}
  monkeypatch.setattr(quant, "SCHEMES", {"never": Never})
  assert call(*base, "--schemes=all") == 2
  assert "no scheme can hold the weights" in capfd.readouterr().err


def test_schemes_are_judged_by_the_shapes_of_the_model():
  """Wider than any group, and with a vocabulary that columns in a byte do not divide."""
  cfg = loaded_case.config(
    embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=512, tie_embeddings=True
  )
  flags = lambda **given: type("Flags", (), {"quantize_head": True, "weights": [], **given})
  kept, left_out = schemes.fitting(flags(schemes="int4:group=512"), cfg)
  assert list(kept) == ["int4:group=512"] and not left_out
  odd = dataclasses.replace(cfg, vocab_size=257)
  with pytest.raises(
    ConfigError, match=r"int4:group=512 cannot hold .*: embed: found the shape \(512, 257\)"
  ):
    schemes.fitting(flags(schemes="int4:group=512"), odd)
  assert list(schemes.fitting(flags(schemes="int4", quantize_head=False), odd)[0]) == ["int4"]
  assert list(schemes.fitting(flags(schemes="int4", weights=["embed=int8"]), odd)[0]) == ["int4"]
  with pytest.raises(ConfigError, match="--weights: rules: 'heads' matches no parameter"):
    schemes.fitting(flags(schemes="int4", weights=["heads=no"]), odd)


def test_a_checkpoint_that_is_quantized_already_is_refused(case, tmp_path, capfd):
  cfg, params = hf.load(case[0])
  hf.save(tmp_path / "int8", cfg, quant.apply(params, Int8()), hf.byte_tokenizer())
  assert call(f"--model={tmp_path / 'int8'}", f"--text={case[1]}", f"--out={tmp_path / 'out'}", *QUICK) == 2
  assert "layers/0/attn/k/w is quantized already (Int8(" in capfd.readouterr().err


def test_fields_of_a_scheme_are_read_and_wrong_ones_named():
  found = schemes.parse("int8, int8_tensor:symmetric=False,nf4:double_quant=True:block=32,none")
  assert found == {
    "int8": Int8(),
    "int8_tensor:symmetric=False": Int8(per="tensor", symmetric=False),
    "nf4:double_quant=True:block=32": quant.SCHEMES["nf4"](double_quant=True, block=32),
  }
  true, kept = schemes.parse("nf4:double_quant=true,llm_int8:features=3+50").values()
  assert true == quant.SCHEMES["nf4"](double_quant=True) and kept.features == (3, 50)
  assert list(schemes.parse("all")) == list(quant.SCHEMES)
  for text, words in {
    "int8:per=row": "found 'row', expected one of column, tensor",
    "int8:bits=4": "unexpected keyword argument 'bits'",
    "int8:per": "found 'per', expected field=value",
    "int4:bits=3:group=32": "int4:bits=3:group=32 is what the name int3 says; give int3:group=32",
    "int4_asym:symmetric=True": "give int4",
    "int8:symmetric=False": "give int8_asym",
    "int4:group=32:group=64": "a field is there twice",
    "nf4:levels=fp4": "give fp4",
    "glm_int8:bits=4": "give glm_int4",
  }.items():
    with pytest.raises(ConfigError, match=f"--schemes={text}: .*{re.escape(words.split(': ')[-1])}$"):
      schemes.parse(text)


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(
      ["--schemes=int9"],
      2,
      ["--schemes=int9", "'int9'", "did you mean int8 or", "int8_asym"],
      marks=pytest.mark.core,
    ),
    (["--schemes=int8,int8"], 2, ["'int8' is there twice"]),
    (["--schemes="], 2, ["--schemes=", "empty item"]),
    (["--schemes=none"], 2, ["--schemes=none", "nothing to compare"]),
    (["--text=no/such/text"], 2, ["--text=no/such/text", "no such file"]),
    (["--weights=embed"], 2, ["--weights=embed", "PATTERN=yes"]),
    (["--weights=embed=int4:bits=3"], 2, ["--weights=embed=int4:bits=3", "give int3"]),
    (["--weights=(=no"], 2, ["--weights=(=no", "regular expression"]),
    (["--weights=wte=no"], 2, ["--weights", "'wte' matches no parameter"]),
    (["--rules=fsdp"], 2, ["--rules=fsdp without --mesh"]),
    (["--batch=0"], 2, ["--batch=0", "at least 1"]),
    (["--batch=200"], 65, ["text: found 401 tokens, expected at least 800"]),
    (["--rounds=1"], 2, ["--rounds=1", "at least 2"]),
    (["--new=1"], 2, ["--new=1", "at least 2"]),
    (["--seconds=-1"], 2, ["--seconds=-1", "at least 0"]),
    (["--windows=3"], 2, ["--windows=3", "--lengths"]),
    (["--methods=yarn"], 2, ["--methods=yarn", "--lengths"]),
    (["--lengths=32", "--methods=yarm"], 2, ["--methods=yarm", "did you mean yarn"]),
    (["--lengths=8"], 2, ["--lengths=8", "8 is below --train_length=16"]),
    (["--lengths=16", "--methods=pi"], 2, ["--methods=pi", "changes nothing"]),
    (["--lengths=x"], 2, ["--lengths=x", "found 'x'"]),
    (["--run=runs/some"], 2, ["--model", "--run=runs/some", "give one of them"]),
    (["--model=no/such/place/here"], 65, ["no/such/place/here"]),
    (["--lengths=4096"], 65, ["--text", "tokens, expected at least"]),
  ],
)
def test_what_is_refused(case, tmp_path, capfd, args, code, named):
  assert call(f"--model={case[0]}", f"--text={case[1]}", *QUICK, f"--out={tmp_path / 'out'}", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    (["--model=DIR"], 2, ["--model=DIR without --text", "give --text=FILE"]),
    (["--text=README.md"], 2, ["--text=README.md without --model"]),
    (["--mesh=tensor=2"], 2, ["--mesh=tensor=2 without --model"]),
    (["--dtype=bfloat16"], 2, ["--dtype=bfloat16 without --model"]),
    (
      ["--run=no/such/run"],
      65,
      ["no/such/run/config.json", "experiments.length_extrapolation --out=no/such/run"],
    ),
  ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capfd, args, code, named):
  assert call(f"--out={tmp_path / 'out'}", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and all(words in error for words in named), error
  assert not (tmp_path / "out").exists()


def test_lengths_beyond_learned_positions_are_refused_before_the_weights_are_read(
  case, tmp_path, capfd, monkeypatch
):
  cfg = loaded_case.config(
    **dict(layers=(Layer(Learned(32)),), norm=LayerNorm(), mlp=Mlp("gelu_tanh"), mlp_dim=128),
    **dict(biases=("q", "k", "v", "o", "up", "down"), tie_embeddings=True, context_length=32),
  )
  loaded_case.save(tmp_path / "gpt2", cfg)
  base = (
    f"--model={tmp_path / 'gpt2'}",
    f"--text={case[1]}",
    "--schemes=int8",
    *QUICK,
    f"--out={tmp_path / 'out'}",
  )
  monkeypatch.setattr("experiments.checkpoint.Checkpoint.params", lambda *_: pytest.fail("weights were read"))
  for args, words in {
    ("--lengths=32,64", "--methods=none"): "--lengths=32,64: 64: learned positions end at 32",
    ("--window=33",): "--window: found 33, expected at most",
    ("--new=33",): "--prompt and --new: found 37, expected at most",
  }.items():
    assert call(*base, *args) == 2
    assert words in capfd.readouterr().err
  assert not (tmp_path / "out").exists()
