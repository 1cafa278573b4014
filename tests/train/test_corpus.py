"""The text of a run: what is read, how it is split, what is refused, and the batches cut from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import DataError
from jaxllm.train import data


@pytest.fixture
def folder(tmp_path):
  """60 files of 100 bytes, the number of a file being in every line of it."""
  for i in range(60):
    path = tmp_path / f"part{i % 3}" / f"{i:02d}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"file {i:02d} ±\n" * 10)
  return tmp_path


def lines(part):
  return {line for line in part.tobytes().decode().split("\n") if line}


@pytest.mark.core
def test_whole_files_are_for_training_or_for_validation(folder):
  corpus = data.load_corpus(str(folder))
  train, validation = lines(corpus.train), lines(corpus.validation)
  assert not train & validation
  assert train | validation == {f"file {i:02d} ±" for i in range(60)}
  assert 0.04 <= len(corpus.validation) / corpus.about["bytes"] <= 0.08
  assert corpus.about["split"] == "by file"
  assert corpus.about["validation_files"] == len(validation)
  assert corpus.about["files"] == 60


def test_the_same_files_give_the_same_corpus(folder):
  one, two = data.load_corpus(str(folder)), data.load_corpus(str(folder))
  assert one.about == two.about
  assert one.train.tobytes() == two.train.tobytes()
  assert one.validation.tobytes() == two.validation.tobytes()


def test_one_byte_more_or_other_changes_the_hash(folder):
  before = data.load_corpus(str(folder)).about["sha256"]
  path = folder / "part0" / "00.txt"
  text = path.read_bytes()
  found = {before}
  for changed in (text[:-1] + b"x", text + b"x", text[:-1]):
    path.write_bytes(changed)
    found.add(data.load_corpus(str(folder)).about["sha256"])
  assert len(found) == 4


def test_a_single_file_gives_its_end_to_validation(tmp_path):
  text = bytes(range(32, 127)) * 20
  (tmp_path / "book.txt").write_bytes(text)
  corpus = data.load_corpus(str(tmp_path / "book.txt"))
  assert corpus.train.tobytes() + corpus.validation.tobytes() == text
  assert len(corpus.validation) == len(text) // 20
  assert corpus.about["validation_files"] == 0
  assert "last twentieth" in corpus.about["split"]


def test_a_few_uneven_files_are_split_by_bytes(tmp_path):
  (tmp_path / "a").write_bytes(b"a" * 1000)
  (tmp_path / "b").write_bytes(b"b" * 10)
  corpus = data.load_corpus(str(tmp_path))
  assert corpus.train.tobytes() + corpus.validation.tobytes() == b"a" * 1000 + b"\n" + b"b" * 10


def test_hidden_files_are_left_out_and_links_to_files_are_read(tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("of a link")
  folder = tmp_path / "folder"
  (folder / ".git").mkdir(parents=True)
  (folder / ".git" / "blob").write_bytes(b"\xff\x00")
  (folder / ".hidden").write_bytes(b"\xff")
  (folder / "seen").write_text("seen")
  (folder / "link").symlink_to(outside)
  (folder / "dangling").symlink_to(tmp_path / "nowhere")
  corpus = data.load_corpus(str(folder))
  assert corpus.train.tobytes() + corpus.validation.tobytes() == b"of a link\nseen"
  assert corpus.about["files"] == 2


@pytest.mark.parametrize(
  ("content", "named"),
  [
    pytest.param(
      b"abc\xff def", ["byte 3 of 8", "0xff", "UTF-8", "iconv -f latin1 -t utf-8"], id="not UTF-8"
    ),
    pytest.param("né".encode("utf-16-le"), ["of 4"], id="UTF-16"),
    pytest.param(b"abcdef\xc3", ["byte 6 of 7", "0xc3"], id="cut in a character"),
    pytest.param(b"ab\0c", ["byte 2 of 4", "0x00"], id="NUL"),
  ],
)
def test_what_is_not_text_is_refused_with_file_and_byte(tmp_path, content, named):
  (tmp_path / "good.txt").write_text("good")
  (tmp_path / "bad.txt").write_bytes(content)
  with pytest.raises(DataError) as e:
    data.load_corpus(str(tmp_path))
  for words in (str(tmp_path / "bad.txt"), *named):
    assert words in str(e.value)
  assert "good.txt" not in str(e.value)


@pytest.mark.parametrize("names", [[], ["empty.txt"], [".hidden"]])
def test_no_text_is_refused(tmp_path, names):
  for name in names:
    (tmp_path / name).write_bytes(b"x" if name.startswith(".") else b"")
  with pytest.raises(DataError, match="0 bytes of text") as e:
    data.load_corpus(str(tmp_path))
  assert str(tmp_path) in str(e.value)


def test_the_default_is_the_standard_library_without_its_tests():
  corpus = data.load_corpus()
  assert corpus.about["split"] == "by file"
  assert corpus.about["bytes"] > 5_000_000
  text = corpus.train.tobytes() + corpus.validation.tobytes()
  assert b"def namedtuple(" in text and b"class Thread:" in text
  assert b"class TestNamedTuple" not in text


@given(
  seed=st.integers(0, 2**32),
  step=st.integers(0, 2**32),
  size=st.integers(1, 9),
  length=st.integers(1, 40),
  spare=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_batches_are_stretches_of_the_text_and_depend_on_seed_and_step_only(seed, step, size, length, spare):
  text = np.arange(length + spare).astype(np.uint8)  # at most 240 bytes, each its own place
  tokens = data.batch(text, seed, step, size, length)
  assert tokens.dtype == np.int32 and tokens.shape == (size, length + 1)
  assert tokens.min() >= 0 and tokens.max() < length + spare
  assert (np.diff(tokens, axis=1) == 1).all()
  data.batch(text, seed, step + 1, size, length)
  np.random.default_rng(0).random(3)
  assert (data.batch(text, seed, step, size, length) == tokens).all()


def test_batches_are_those_of_checkpoints_that_there_are():
  """A run goes on from its checkpoint in other versions too, so these numbers stay."""
  found = data.batch(np.arange(200, dtype=np.uint8), 3, 7, 3, 2)
  assert found.tolist() == [[11, 12, 13], [31, 32, 33], [179, 180, 181]]


def test_batches_of_other_steps_and_seeds_are_others_and_reach_all_of_the_text():
  text = np.arange(256, dtype=np.uint8)
  starts = [tuple(data.batch(text, seed, step, 8, 16)[:, 0]) for seed in range(5) for step in range(60)]
  assert len(set(starts)) == 300
  assert {start for row in starts for start in row} == set(range(256 - 16))
