"""The flags of samplers: what each stands for, in which order, and what is refused."""

import re

import pytest
from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.sampling import (
  Dry,
  Epsilon,
  Eta,
  FrequencyPenalty,
  MinP,
  Mirostat,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Temperature,
  TopK,
  TopNSigma,
  TopP,
  Typical,
  Xtc,
)
from jaxllm.sampling.order import ORDERS
from jaxllm.study import samplers

core = pytest.mark.core


@pytest.fixture
def parse():
  """parse(*arguments): the flags' values, in a set of flags of their own."""

  def parsed(*arguments):
    values = flags.FlagValues()
    samplers.define(values=values)
    values(["program", *arguments])
    return values

  return parsed


ON = [  # arguments, the sampler they add to temperature and top-p
  (["--top_k=3"], TopK(3)),
  (["--min_p=0.1"], MinP(0.1)),
  (["--typical_p=0.9"], Typical(0.9)),
  (["--epsilon_cutoff=3e-4"], Epsilon(3e-4)),
  (["--eta_cutoff=4e-3"], Eta(4e-3)),
  (["--top_n_sigma=1"], TopNSigma(1.0)),
  (["--repetition_penalty=1.1", "--repeat_last_n=64"], RepetitionPenalty(1.1, 64)),
  (["--presence_penalty=-0.5"], PresencePenalty(-0.5)),
  (["--frequency_penalty=0.5", "--repeat_last_n=0"], FrequencyPenalty(0.5, 0)),
  (["--no_repeat_ngram_size=4"], NoRepeatNgram(4)),
  (["--dry_multiplier=0.8"], Dry(0.8, 1.75, 2, -1)),
  (
    ["--dry_multiplier=1", "--dry_base=2", "--dry_allowed_length=3", "--dry_penalty_last_n=9"],
    Dry(1.0, 2.0, 3, 9),
  ),
  (["--xtc_probability=0.5"], Xtc(0.5, 0.1)),
  (["--xtc_probability=0.5", "--xtc_threshold=0.2"], Xtc(0.5, 0.2)),
  (["--mirostat_tau=5"], Mirostat(5.0, 0.1)),
  (["--mirostat_tau=5", "--mirostat_eta=0.2"], Mirostat(5.0, 0.2)),
]


@pytest.mark.parametrize(("arguments", "added"), ON)
def test_a_flag_adds_its_sampler(parse, arguments, added):
  usual = {Temperature(0.7), TopP(0.95)}
  values = parse(*arguments)
  samplers.check(values)
  assert set(samplers.sampler(values).samplers) == usual | {added}


def test_defaults_and_the_order_of_each_project(parse):
  assert samplers.sampler(parse()).samplers == (Temperature(0.7), TopP(0.95))
  assert samplers.sampler(parse("--top_p=1", "--temperature=0")).samplers == (Temperature(0.0),)
  last = samplers.sampler(parse("--sampler_order=llama.cpp", "--min_p=0.1")).samplers
  assert last == (TopP(0.95), MinP(0.1), Temperature(0.7))
  assert tuple(ORDERS) == samplers.ORDERS


REFUSED = [
  (flag, value)
  for flag, values in {
    "temperature": ("-1", "nan", "inf"),
    "top_k": ("-2",),
    "top_p": ("1.1", "-0.1", "nan"),
    "min_p": ("2",),
    "typical_p": ("1.5",),
    "epsilon_cutoff": ("-1",),
    "eta_cutoff": ("nan",),
    "top_n_sigma": ("-1", "inf"),
    "repetition_penalty": ("0", "-1", "inf", "1e-40", "1e39"),
    "presence_penalty": ("inf", "nan"),
    "frequency_penalty": ("-inf",),
    "repeat_last_n": ("-2",),
    "no_repeat_ngram_size": ("-1",),
    "dry_multiplier": ("-0.1",),
    "dry_base": ("0.99",),
    "dry_allowed_length": ("0",),
    "dry_penalty_last_n": ("-2",),
    "xtc_probability": ("1.01",),
    "xtc_threshold": ("-0.5",),
    "mirostat_tau": ("-1",),
    "mirostat_eta": ("-1",),
  }.items()
  for value in values
]


@pytest.mark.parametrize(("flag", "value"), REFUSED)
def test_a_bad_value_is_refused_with_flag_value_and_what_is_allowed(parse, flag, value):
  values = parse(f"--{flag}={value}")
  with pytest.raises(
    ConfigError, match=rf"^--{flag}={re.escape(f'{float(value):g}')}(\.0)?: expected .*(number|more)"
  ):
    samplers.check(values)


def test_every_flag_is_refused_somewhere_and_a_default_nowhere(parse):
  assert {flag for flag, _ in REFUSED} == set(samplers.FLAGS)
  samplers.check(parse())


def test_names_of_llama_cpp_are_the_same_flags(parse):
  found = parse("--temp=1.5", "--repeat_penalty=1.5", "--typical=0.9", "--top_k=-1")
  assert (found.temperature, found.repetition_penalty, found.typical_p) == (1.5, 1.5, 0.9)
  samplers.check(found)
  assert [type(one) for one in samplers.sampler(found).samplers if isinstance(one, TopK)] == []


def test_mirostat_of_llama_cpp_is_beside_the_temperature_alone(parse):
  kinds = lambda *arguments: [type(one) for one in samplers.sampler(parse(*arguments)).samplers]
  penalty = "--repetition_penalty=1.1"
  assert kinds("--mirostat_tau=5", penalty) == [RepetitionPenalty, Temperature, TopP, Mirostat]
  alone = ("--mirostat_tau=5", "--sampler_order=llama.cpp")
  assert kinds(*alone) == [Temperature, Mirostat]
  for flag in (penalty, "--dry_multiplier=1", "--top_k=5"):
    with pytest.raises(
      ConfigError, match=rf"^{flag.split('=')[0]} with --mirostat_tau=5.* leave one of them out"
    ):
      samplers.check(parse(*alone, flag))


def test_a_breaker_that_is_in_no_token_is_refused(parse):
  decode = lambda ids: "".join("ab:"[i] for i in ids)
  assert samplers.breakers(parse("--dry_multiplier=1"), decode, 3).tolist() == [False, False, True]
  found = parse("--dry_multiplier=1", "--dry_sequence_breaker=a", "--dry_sequence_breaker=ab")
  with pytest.raises(ConfigError, match=r"^--dry_sequence_breaker='ab': no token's text has it"):
    samplers.breakers(found, decode, 3)
