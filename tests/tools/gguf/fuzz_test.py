"""Damaged and hostile GGUF files: an import refuses them in one line, or writes a folder that loads."""

import struct
import warnings
from collections import Counter

import gguf_files
import numpy as np
import pytest
from gguf_files import gguf_bytes, metadata, tensors, text

from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.models.hf import Checkpoint
from dcjax.tools.convert import import_model

pytest.importorskip("gguf")

pytestmark = pytest.mark.heavy

WHOLE = gguf_bytes(
    metadata(
        general__alignment=32,
        general__name="tiny",
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__scores=[0.0] * len(gguf_files.TOKENS),
    ),
    tensors(),
)
"""A file with every kind of value."""
START = len(WHOLE) - sum(len(gguf_files.padded(tensor.data)) for tensor in tensors().values())
"""Where the tensors begin."""


COUNTS = (0, 1, 2**31, 2**60, 2**63, 2**64 - 1)


def share(every_day, of):
    """How many cases are tried, always the same ones; more with the slow tests."""
    return pytest.mark.parametrize("count", [every_day, pytest.param(of, marks=pytest.mark.slow)])


@pytest.fixture
def outcome(tmp_path):
    """Imports a file with these bytes: "refused" or "written", and nothing else may happen."""
    path, cases = tmp_path / "model.gguf", iter(range(10**6))

    def load(content):
        path.write_bytes(content)
        out = tmp_path / f"out{next(cases)}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                import_model(path, out)
        except RunError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 600, message
            assert str(path) in message or message.startswith(("model.", "lm_head.")), message
            assert [found.name for found in tmp_path.iterdir() if found.name.startswith((out.name, "."))] == []
            return "refused"
        checkpoint = Checkpoint(out)
        assert all(np.isfinite(tensor.read()).all() for tensor in checkpoint.tensors.values())
        assert len(load_tokenizer(out)) <= checkpoint.config.vocab_size
        return "written"

    return load


def flipped(content, position, bit):
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def test_the_file_itself_is_written(outcome):
    assert outcome(WHOLE) == "written"


def test_truncated_files_are_refused(outcome):
    """But for the padding behind the last tensor, which holds nothing."""
    lengths = {0, 1, 4, 8, 16, 24, START - 1, START, len(WHOLE) - gguf_files.ALIGNMENT}
    lengths |= set(np.random.default_rng(1).integers(0, len(WHOLE) - gguf_files.ALIGNMENT, 150).tolist())
    assert {outcome(WHOLE[:length]) for length in lengths} == {"refused"}


@share(150, of=4000)
def test_flipped_bits_of_the_header_are_refused_or_written(outcome, count):
    rng = np.random.default_rng(2)
    outcomes = Counter(outcome(flipped(WHOLE, int(rng.integers(START)), int(rng.integers(8)))) for _ in range(count))
    # written: another letter of a token, of a template, of a name; another number that no shape tells
    assert outcomes["refused"] > count / 3, outcomes


def test_every_bit_of_counts_types_and_shapes_is_looked_at(outcome):
    """Of the first bytes, which count, and of the table of tensors."""
    table = WHOLE.index(text("token_embd.weight"))
    end = WHOLE.index(text("output_norm.weight"))
    positions = [*range(24), *range(table, end)]
    cases = [(position, bit) for position in positions for bit in (0, 5, 7)]
    written = [case for case in cases if outcome(flipped(WHOLE, *case)) == "written"]
    # version 2 is the same as 3
    assert written == [(4, 0)], written


@share(30, of=300)
def test_flipped_bits_of_weights_are_other_weights_or_refused(outcome, count):
    rng = np.random.default_rng(3)
    outcomes = Counter(outcome(flipped(WHOLE, int(rng.integers(START, len(WHOLE))), 6)) for _ in range(count))
    assert outcomes["written"] and outcomes.total() == count


@share(60, of=3000)
def test_files_of_which_parts_are_moved_or_overwritten(outcome, count):
    rng = np.random.default_rng(4)
    outcomes = Counter()
    for _ in range(count):
        damaged = bytearray(WHOLE)
        start, size = int(rng.integers(START)), int(rng.choice([1, 4, 8, 64]))
        kind = rng.integers(4)
        if kind == 0:
            damaged[start : start + size] = rng.integers(0, 256, size, np.uint8).tobytes()
        elif kind == 1:
            del damaged[start : start + size]
        elif kind == 2:
            damaged[start:start] = damaged[start : start + size]
        else:
            damaged[start : start + 8] = struct.pack("<Q", COUNTS[rng.integers(len(COUNTS))])
        outcomes[outcome(bytes(damaged))] += 1
    assert outcomes["refused"] > count / 2, outcomes


HOSTILE = (
    0, 1, 2, ("i32", -1), 2**31, 2**32 - 1, 0.0, -1.0, 1e38, float("nan"), float("inf"), True, False, "", "gpt2",
    "llama", "a\nb", "\0", "x" * 100_000, ["a"], [""], ["a", "a"], [0], [0.5], [-1] * 999, [float("nan")] * 17,
)  # fmt: skip


@share(4, of=len(HOSTILE))
@pytest.mark.parametrize("key", [*metadata(), "general.alignment", "split.count", "qwen2.vocab_size", "qwen2.new"])
def test_hostile_values_are_refused_or_written(outcome, key, count):
    rng = np.random.default_rng(len(key))
    for place in rng.choice(len(HOSTILE), count, replace=False):
        outcome(gguf_bytes(metadata(**{key: HOSTILE[place]}), tensors()))
