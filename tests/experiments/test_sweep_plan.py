"""The plan of a sweep: every cell once, in groups that the configuration alone decides."""

import collections
import re

import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS, Rope
from jaxllm.study import methods

ALL = tuple(methods.METHODS)
SCHEMES = methods.SCHEMES
LENGTHS = (128, 256, 512, 1024, 2048)


def plan(schemes=tuple(SCHEMES), names=ALL, metrics=methods.METRICS, factors=None, lengths=LENGTHS, seeds=2):
  return methods.plan(of(schemes), names, metrics, factors, 128, lengths, seeds, windows=3)


def of(names):
  """The schemes of these names."""
  return [SCHEMES[name] for name in names]


def key(cell):
  return tuple(cell[name] for name in ("scheme", "method", "factor", "length", "metric", "seed"))


@pytest.mark.parametrize(
  ("names", "factors"),
  [
    pytest.param(ALL, None, marks=pytest.mark.core),
    (ALL, (2.0, 8.0)),
    (("none", "yarn"), (1.0, 2.0, 4.0)),
    (("rerope",), None),
  ],
)
def test_every_cell_is_there_once(names, factors):
  cells = [cell for group in plan(names=names, factors=factors) for cell in group.cells]
  wanted = {
    (scheme, name, factor, length, metric, seed)
    for scheme in SCHEMES
    for name in names
    for length in LENGTHS
    for factor in ((factors or (length / 128,)) if methods.METHODS[name].stretches else (1.0,))
    for metric in methods.METRICS
    for seed in (0, 1)
  }
  found = collections.Counter(key(cell) for cell in cells if cell["metric"] in methods.METRICS)
  assert set(found) == wanted
  assert set(found.values()) == {1}


@pytest.mark.parametrize(
  ("metric", "column", "places", "lengths"),
  [
    (methods.BY_POSITION, "position", range(0, 2048, 64), (2048,)),
    (methods.BY_WINDOW, "window", range(3), LENGTHS),
  ],
)
def test_details_cover_every_place_of_every_method_once(metric, column, places, lengths):
  found = collections.Counter(
    (cell["scheme"], cell["method"], cell["seed"], cell["length"], cell[column])
    for group in plan()
    for cell in group.cells
    if cell["metric"] == metric
  )
  applicable = [(s, m) for s in SCHEMES for m in ALL if not methods.not_applicable(SCHEMES[s], m)]
  wanted = {
    (s, m, seed, length, place)
    for s, m in applicable
    for seed in (0, 1)
    for length in lengths
    if not methods.beyond_table(SCHEMES[s], 128, length)
    for place in places
  }
  assert set(found) == wanted
  assert set(found.values()) == {1}


def test_learned_positions_end_at_the_training_length():
  """Beyond it every cell of the scheme is in a group without a program; within it, none of `none` is."""
  programs = {
    (int(name.split("/")[2]), name.split("/")[3])
    for name in (group.name for group in plan(schemes=("learned",), names=("none", "logn")))
  }
  assert programs == {(128, "in_length"), (128, "tables"), *((length, "none") for length in LENGTHS[1:])}
  assert not any(methods.beyond_table(how, 128, 2048) for name, how in SCHEMES.items() if name != "learned")


def test_groups_have_their_own_names_and_at_most_the_size_of_their_program():
  groups = plan(factors=(1.0, 2.0, 4.0, 8.0, 16.0))
  assert len({group.name for group in groups}) == len(groups)
  for group in groups:
    scheme, seed, length, program, _ = group.name.split("/")
    assert {(c["scheme"], c["seed"], c["length"]) for c in group.cells} == {(scheme, int(seed), int(length))}
    if program not in ("none", "in_length"):
      members = {(cell["method"], cell["factor"]) for cell in group.cells}
      assert len(members) <= methods.program_size(SCHEMES[scheme], program) <= methods.GROUP_SIZE


def test_a_group_depends_on_nothing_but_the_configuration():
  assert plan() == plan()
  # one more seed, or one more length in the middle, leaves every group as it is
  fewer = plan(lengths=(128, 512, 2048), seeds=1)
  more = {group.name: group for group in plan(seeds=3)}
  assert [more[group.name] for group in fewer] == fewer
  # and how many tables a program takes does not depend on the methods asked for
  assert (
    methods.program_size(SCHEMES["rope"], "tables")
    == methods.program_size(SCHEMES["rope_logn"], "tables")
    == methods.GROUP_SIZE
  )


def test_methods_that_build_a_factor_in_have_a_program_a_factor():
  """self_extend's groups are part of its program; the factors of all others are data."""
  groups = plan(schemes=("rope",), names=("yarn", "self_extend"), factors=(2.0, 4.0), lengths=(256,), seeds=1)
  programs = {group.name.split("/")[3]: {cell["factor"] for cell in group.cells} for group in groups}
  assert programs == {
    "in_length": {1.0},
    "tables": {2.0, 4.0},
    "self_extend x2.0": {2.0},
    "self_extend x4.0": {4.0},
  }
  sizes = [methods.program_size(SCHEMES["rope"], program) for program in ("self_extend x2.0", "rerope")]
  assert sizes == [1, 2]


DEFAULT = "none logn pi ntk_old ntk ntk_logn ntk_fixed ntk_fixed_logn ntk_mixed ntk_mixed_logn dynamic_ntk"
DEFAULT += " yarn rerope rerope_logn"


@pytest.mark.core
def test_default_and_all():
  """The published run has the first, and `all` is every method that applies to a scheme."""
  assert methods.choose("default", of(["rope"])) == tuple(DEFAULT.split())
  assert methods.choose("all", of(["rope", "alibi"])) == ALL
  assert set(ALL) - set(DEFAULT.split()) == {
    "ntk_by_parts",
    "llama3",
    "leaky_rerope",
    "self_extend",
    "streaming",
  }
  for name in ("default", "all"):
    assert methods.choose(name, of(["alibi", "nope"])) == ("none", "logn")
    assert not any("logn" in m for m in methods.choose(name, of(["rope_logn"])))
  assert methods.choose("streaming, pi", of(["rope"])) == ("streaming", "pi")


def test_every_rope_method_can_be_swept_or_has_a_reason():
  ropes = {name for name, cls in POSITIONS.items() if issubclass(cls, Rope) and cls is not Rope}
  assert (
    ropes == {method.position for method in methods.METHODS.values()} - {None} | methods.TRAINED_WITH.keys()
  )
  assert not methods.TRAINED_WITH.keys() & methods.METHODS.keys()
  for name, reason in methods.TRAINED_WITH.items():
    with pytest.raises(
      ConfigError,
      match=re.escape(f"--methods=yarn,{name}: {name} cannot be put on a trained model: {reason}"),
    ):
      methods.choose(f"yarn,{name}", of(["rope"]))


@pytest.mark.parametrize(
  ("scheme", "skipped"),
  [
    ("rope", set()),
    ("rope_logn", {"logn", "ntk_logn", "ntk_fixed_logn", "ntk_mixed_logn", "rerope_logn"}),
    ("alibi", set(ALL) - {"none", "logn"}),
    ("nope", set(ALL) - {"none", "logn"}),
  ],
)
def test_methods_that_do_not_apply_have_a_reason_and_a_group_without_a_program(scheme, skipped):
  assert {name for name in ALL if methods.not_applicable(SCHEMES[scheme], name)} == skipped
  for group in plan(schemes=(scheme,)):
    is_none = group.name.split("/")[3] == "none"
    assert {cell["method"] in skipped for cell in group.cells} == {is_none}


def test_methods_are_off_at_the_trained_length_and_given_factors_apply_everywhere():
  for length, on in ((128, False), (256, True)):
    for variant in methods.variants(ALL, None, 128, length):
      assert methods.is_on(variant, None, 128, length) == (on and variant.method != "none"), variant
    for variant in methods.variants(ALL, (1.0, 4.0), 128, length):
      stretches = methods.METHODS[variant.method].stretches
      assert methods.is_on(variant, (1.0, 4.0), 128, length) == (
        stretches or (on and variant.method != "none")
      ), variant
  programs = {group.name.split("/")[3] for group in plan(schemes=("rope",), lengths=(128,))}
  assert programs == {"tables", "in_length"}


@pytest.mark.parametrize(
  ("names", "factors", "lengths", "refused"),
  [
    (("none", "yarn"), None, (128,), "yarn"),
    (("none", "rerope"), (4.0,), (128,), "rerope"),
    (("logn",), None, (128,), "logn"),
    (("none",), None, (128,), None),
    (("yarn",), (1.0,), (128,), None),
    (("yarn", "rerope"), None, (128, 129), None),
  ],
)
def test_a_method_that_changes_nothing_is_refused_but_for_controls(names, factors, lengths, refused):
  if refused is None:
    methods.check_methods_matter(of(["rope", "alibi"]), names, factors, 128, lengths)
    return
  with pytest.raises(ConfigError, match=f"--methods={refused} .*changes nothing"):
    methods.check_methods_matter(of(["rope", "alibi"]), names, factors, 128, lengths)


def test_a_method_that_applies_to_no_scheme_is_refused():
  with pytest.raises(ConfigError, match="--methods=pi with --schemes=alibi,nope: pi changes RoPE"):
    methods.check_methods_matter(of(["alibi", "nope"]), ("none", "pi"), None, 128, LENGTHS)
