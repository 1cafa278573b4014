"""RoPE as a number in base beta: published digits, and the angle that is the same quotient."""

import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS
from jaxllm.position.beta import beta_base, rope_beta


@pytest.mark.core
@pytest.mark.parametrize(
  ("base", "digits"), [(10, [1, 7, 4, 9]), (16, [6, 13, 5]), (13, [10, 4, 7])], ids=str
)
def test_1749(base, digits):
  """kexue.fm 9675: three digits of base 13 hold what takes four of base 10."""
  assert beta_base(1749, base) == digits
  assert beta_base(1749, base, 6) == [0] * (6 - len(digits)) + digits


def test_three_digits_that_cover_2000_take_base_13():
  assert beta_base(1999, 13, 3) == [11, 10, 10]
  with pytest.raises(ConfigError, match="digits: found 3, expected at least 4 in base 12"):
    beta_base(1999, 12, 3)


@pytest.mark.parametrize(("beta", "R"), [(2, 16), (4, 8), (10, 6)])
def test_a_digit_is_a_rope_angle_without_its_fraction(beta, R):
  """floor(angle_m) mod beta is digit m of n, for every n that R / 2 digits can write."""
  base = beta ** (R // 2)
  assert rope_beta(base, R) == pytest.approx(beta, rel=1e-14)
  inv_freq, _ = POSITIONS["rope"](base=float(base)).frequencies(R)
  for n in range(base):
    angles = n * inv_freq * (1 + 1e-12)  # a quotient that is whole may be rounded to just below
    assert [int(a) % beta for a in angles][::-1] == beta_base(n, beta, R // 2)


def test_a_larger_base_is_ntk():
  """k times as many positions in as many digits: beta k^(2/R), which is RoPE's base times k."""
  old, _ = POSITIONS["ntk_old"](base=10000.0, factor=8.0).frequencies(128)
  beta = rope_beta(10000.0, 128) * 8 ** (2 / 128)
  np.testing.assert_allclose(old, beta ** -np.arange(64.0), rtol=1e-12)


@pytest.mark.parametrize(("n", "base", "name"), [(5, 1, "base"), (5, 2.5, "base"), (-1, 10, "n")])
def test_bad_arguments(n, base, name):
  with pytest.raises(ConfigError, match=rf"^{name}: found"):
    beta_base(n, base)
