import io
import re

from jaxllm.study.progress import Progress, duration, short


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Loss:
  """Stands in for an array on a device: counts how often its value is fetched."""

  fetched = 0

  def __float__(self):
    Loss.fetched += 1
    return 2.5


def train(start, total, first=30.0, step=0.5, tokens=1000, every=5.0):
  """Lines of a run whose first step (with its compilation) takes `first` seconds and the others `step`."""
  clock, stream = Clock(), io.StringIO()
  with Progress(stream, every, clock) as progress:
    training = progress.training("rope", total, start, tokens)
    for done in range(start + 1, total + 1):
      clock.now += first if done == start + 1 else step
      training.update(done, Loss())
  return stream.getvalue().splitlines()


def test_off_a_terminal_there_is_a_line_every_few_seconds_and_the_first_and_last():
  Loss.fetched = 0
  lines = train(0, 34)
  assert lines == [
    "rope: 1/34  loss 2.5000",
    "rope: 11/34  loss 2.5000  2k tokens/s  12s left",
    "rope: 21/34  loss 2.5000  2k tokens/s  6s left",
    "rope: 31/34  loss 2.5000  2k tokens/s  2s left",
    "rope: 34/34  loss 2.5000  2k tokens/s",
  ]
  assert Loss.fetched == len(lines)  # fetching it stalls the device: only for a line


def test_the_rate_counts_neither_the_compilation_nor_an_earlier_run():
  assert train(990, 1001)[-1] == "rope: 1001/1001  loss 2.5000  2k tokens/s"
  assert train(990, 1010)[1] == "rope: 1001/1010  loss 2.5000  2k tokens/s  4s left"
  assert train(0, 20, tokens=0)[1] == "rope: 11/20  loss 2.5000  2.0 steps/s  4s left"


def test_time_that_is_not_trained_in_is_not_in_the_rate():
  shown, trained, stream = Clock(), Clock(), io.StringIO()
  with Progress(stream, clock=shown) as progress:
    training = progress.training("rope", 3, tokens_per_step=1000, clock=trained)
    for done, looked in ((1, 0), (2, 100), (3, 0)):
      trained.now += 0.5
      shown.now += 0.5 + looked  # at held-out text, say
      training.update(done, 2.5)
  assert stream.getvalue().splitlines()[1:] == [
    "rope: 2/3  loss 2.5000  2k tokens/s  0s left",
    "rope: 3/3  loss 2.5000  2k tokens/s",
  ]


def test_a_run_of_one_step_is_one_line():
  assert train(9, 10) == ["rope: 10/10  loss 2.5000"]


def test_cells():
  clock, stream = Clock(), io.StringIO()
  with Progress(stream, clock=clock) as progress:
    sweep = progress.cells("sweep", total=10, done=6)
    for name in ("a", "b", "c", "d"):
      clock.now += 100
      sweep.update(name)
    progress.note("one [bold]failed")
  assert stream.getvalue().splitlines() == [
    "sweep: 7/10  a",
    "sweep: 8/10  b  3m20s left",
    "sweep: 9/10  c  1m40s left",
    "sweep: 10/10  d",
    "one [bold]failed",
  ]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_on_a_terminal_there_is_a_live_display(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream, clock = Terminal(), Clock()
  with Progress(stream, clock=clock) as progress:
    training = progress.training("rope [x]", total=3, tokens_per_step=100)
    for step in range(1, 4):
      clock.now += 1
      training.update(step, 1.25)
    progress.note("careful [/]")
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
  assert "rope [x]" in text and "3/3 loss 1.2500  100 tokens/s" in text and "careful [/]" in text


def test_durations_and_large_numbers():
  assert [duration(s) for s in (0.4, 59.4, 59.6, 185, 3599, 7440)] == [
    "0s",
    "59s",
    "1m00s",
    "3m05s",
    "59m59s",
    "2h04m",
  ]
  assert [short(x) for x in (12.3, 950, 1234, 45_600, 7.89e6)] == ["12", "950", "1.23k", "45.6k", "7.89M"]
