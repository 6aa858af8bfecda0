"""Damaged and hostile GGUF files: an import refuses them in one line, or writes a folder that loads."""

import struct
import warnings
from collections import Counter

import gguf_files
import numpy as np
import pytest
from gguf_files import Sizes, Tensor, gguf_bytes, metadata, tensors, text

from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.models.hf import Checkpoint
from dcjax.tools.convert import import_model

pytest.importorskip("gguf")

pytestmark = pytest.mark.heavy

BYTES = metadata(general__alignment=32, tokenizer__ggml__bos_token_id=1, tokenizer__ggml__add_bos_token=True)
WIDE = Sizes(hidden=32)
PIECES = metadata(
    "llama",
    WIDE,
    general__name="tiny",
    llama__rope__scaling__factor=1.0,
    tokenizer__ggml__model="llama",
    tokenizer__ggml__merges=None,
    tokenizer__ggml__scores=[-float(number) for number in range(len(gguf_files.TOKENS))],
    tokenizer__ggml__bos_token_id=1,
)
PACKED = {
    "token_embd.weight": Tensor(8, (WIDE.vocabulary, WIDE.hidden), b"\1\2" + bytes(range(32)) + bytes(34 * 16)),
    "rope_freqs.weight": gguf_files.f32(np.ones(WIDE.head_dim // 2)),
}
FILES = {"bytes": (BYTES, tensors()), "pieces": (PIECES, tensors("llama", WIDE) | PACKED)}
"""Of the two kinds of tokenizers; in one of them a tensor is of blocks."""
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


@pytest.fixture(params=FILES)
def parts(request):
    """Of a file that nothing is wrong with."""
    return FILES[request.param]


@pytest.fixture
def whole(parts):
    """That file."""
    return gguf_bytes(*parts)


@pytest.fixture
def start(parts, whole):
    """Where its tensors begin."""
    return len(whole) - sum(len(gguf_files.padded(tensor.data)) for tensor in parts[1].values())


def test_the_files_themselves_are_written(outcome, whole):
    assert outcome(whole) == "written"


def test_truncated_files_are_refused(outcome, whole, start):
    """But for the padding behind the last tensor, which holds nothing."""
    end = len(whole) - gguf_files.ALIGNMENT
    lengths = {0, 1, 4, 8, 16, 24, start - 1, start, end, *np.random.default_rng(1).integers(0, end, 100).tolist()}
    assert {outcome(whole[:length]) for length in lengths} == {"refused"}


@share(100, of=4000)
def test_flipped_bits_of_the_header_are_refused_or_written(outcome, whole, start, count):
    rng = np.random.default_rng(2)
    outcomes = Counter(outcome(flipped(whole, int(rng.integers(start)), int(rng.integers(8)))) for _ in range(count))
    # written: another letter of a token, of a template, of a name; another number that no shape tells
    assert outcomes["refused"] > count / 3, outcomes


def test_every_bit_of_counts_types_and_shapes_is_looked_at(outcome, whole):
    """Of the first bytes, which count, and of the table of tensors."""
    table, end = whole.index(text("token_embd.weight")), whole.index(text("output_norm.weight"))
    cases = [(position, bit) for position in (*range(24), *range(table, end)) for bit in (0, 5, 7)]
    written = [case for case in cases if outcome(flipped(whole, *case)) == "written"]
    # version 2 is the same as 3
    assert written == [(4, 0)], written


@share(30, of=300)
def test_flipped_bits_of_weights_are_other_weights_or_refused(outcome, whole, start, count):
    rng = np.random.default_rng(3)
    outcomes = Counter(outcome(flipped(whole, int(rng.integers(start, len(whole))), 6)) for _ in range(count))
    assert outcomes["written"] and outcomes.total() == count


@share(50, of=3000)
def test_files_of_which_parts_are_moved_or_overwritten(outcome, whole, start, count):
    rng = np.random.default_rng(4)
    outcomes = Counter()
    for _ in range(count):
        damaged = bytearray(whole)
        at, size = int(rng.integers(start)), int(rng.choice([1, 4, 8, 64]))
        kind = rng.integers(4)
        if kind == 0:
            damaged[at : at + size] = rng.integers(0, 256, size, np.uint8).tobytes()
        elif kind == 1:
            del damaged[at : at + size]
        elif kind == 2:
            damaged[at:at] = damaged[at : at + size]
        else:
            damaged[at : at + 8] = struct.pack("<Q", COUNTS[rng.integers(len(COUNTS))])
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
