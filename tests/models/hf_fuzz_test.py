"""Damaged and hostile folders: `load_hf` refuses them in one line, or returns exactly what was saved."""

import dataclasses
import json
import struct
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from dcjax.models import ModelConfig, abstract_params, load_hf, read_config, save_hf
from dcjax.models.rope import YarnScaling

CONFIG = ModelConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=10,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rope_scaling=YarnScaling(4.0, 64, beta_fast=16.0, attention_factor=1.5, truncate=False),
    tie_embeddings=False,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=6,
    mlp_only_layers=(1,),
)
FILE = "model.safetensors"
FREE = (
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "max_position_embeddings",
    "norm_topk_prob",
    "num_experts_per_tok",
)
"""What no tensor's shape tells, and config.json has no checksum: another value is another model of the same weights."""


def share(every_day, of):
    """How many cases are tried, always the same ones; more with the slow tests."""
    return pytest.mark.parametrize("count", [every_day, pytest.param(of, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder that every case damages and is given back whole, its params, and the bytes of its two files."""
    folder = tmp_path_factory.mktemp("fuzz") / "saved"
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(CONFIG))
    save_hf(folder, CONFIG, params)
    return folder, params, {name: (folder / name).read_bytes() for name in (FILE, "config.json")}


@pytest.fixture
def outcome(saved):
    """Loads the folder with one file replaced: "refused", "intact" or "another number", and nothing else may happen."""
    folder, params, contents = saved

    def load(name, damaged):
        (folder / name).write_bytes(damaged)
        try:
            config, loaded = load_hf(folder)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 500, message
            assert message.startswith(str(folder)), message
            return "refused"
        finally:
            (folder / name).write_bytes(contents[name])
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == theirs.tobytes()
        if name == "config.json" and config != CONFIG:
            assert dataclasses.replace(config, **{field: getattr(CONFIG, field) for field in FREE}) == CONFIG
            return "another number"
        assert config == CONFIG
        return "intact"

    return load


def split(content):
    """A safetensors file's header, as an object, and its payload."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def flipped(content, position, bit):
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def test_the_folder_itself_is_intact(saved, outcome):
    assert outcome(FILE, saved[2][FILE]) == "intact"


def test_truncated_and_extended_files_are_refused(saved, outcome):
    content = saved[2][FILE]
    lengths = {0, 1, 7, 8, 9, len(content) - 1, len(content) - 4}
    lengths |= set(np.random.default_rng(1).integers(0, len(content), 80).tolist())
    cases = [content[:length] for length in lengths] + [content + b"\0", content + content, b"\0" * len(content)]
    assert len(cases) >= 80
    assert {outcome(FILE, case) for case in cases} == {"refused"}


@share(50, of=150)
def test_every_flipped_bit_of_the_payload_is_noticed(saved, outcome, count):
    content = saved[2][FILE]
    rng = np.random.default_rng(2)
    start = len(content) - len(split(content)[1])
    cases = [(int(rng.integers(start, len(content))), int(rng.integers(8))) for _ in range(count)]
    assert {outcome(FILE, flipped(content, *case)) for case in cases} == {"refused"}


def test_flipped_bits_of_the_header_never_change_what_is_loaded(saved, outcome):
    content = saved[2][FILE]
    rng = np.random.default_rng(3)
    stop = len(content) - len(split(content)[1])
    cases = [(position, bit) for position in range(8) for bit in (0, 3, 7)]
    cases += [(int(rng.integers(8, stop)), int(rng.integers(8))) for _ in range(200)]
    outcomes = Counter(outcome(FILE, flipped(content, *case)) for case in cases)
    # intact: "format" and "pt", padding, the case of a checksum's digits
    assert outcomes["refused"] > 190, outcomes


@share(60, of=120)
def test_flipped_bits_of_the_config_are_refused_or_of_no_account(saved, outcome, count):
    content = saved[2]["config.json"]
    rng = np.random.default_rng(4)
    outcomes = Counter()
    for _ in range(count):
        damaged = flipped(content, int(rng.integers(len(content))), int(rng.integers(8)))
        outcomes[outcome("config.json", damaged)] += 1
    # intact: the names and values of fields that are not read
    assert outcomes["refused"] > count / 2 and outcomes["another number"] < count / 10, outcomes


def header_cases(header, payload):
    """Headers that contradict the payload, the format or the config, by what is wrong."""
    first, second, *_ = (name for name in header if name != "__metadata__")
    entry = header[first]
    start, stop = entry["data_offsets"]

    def change(**fields):
        return {**header, first: {**entry, **fields}}

    def rename(old, new):
        return {new if name == old else name: value for name, value in header.items()}

    names = [name for name in header if name != "__metadata__"]
    for name in names:
        yield "renamed", rename(name, f"{name}x")
        yield "left out", {other: value for other, value in header.items() if other != name}
        yield "swapped names", swapped(header, name, names[names.index(name) - 1])
        yield "transposed", {**header, name: {**header[name], "shape": [*header[name]["shape"][::-1], 1]}}
    for shape in (
        [],
        [0],
        [-1],
        [1, 2],
        [2**63],
        [2**70, 0],
        [True, 8],
        ["12", 8],
        [[12], 8],
        None,
        "12",
        {},
        [1] * 99,
    ):
        yield "shape", change(shape=shape)
    for dtype in ("F16", "F64", "BF16", "I32", "U8", "F8_E4M3", "float32", "f32", "", None, 4, [], {}, "F32\n" * 999):
        yield "dtype", change(dtype=dtype)
    for offsets in (
        [start, stop + 4], [start + 4, stop + 4], [stop, start], [0, 2**63], [-4, stop - start - 4], [start], [], None,
        [start, stop, stop], [float(start), float(stop)], ["0", "4"], [2**64, 2**64 + stop - start], {"0": 1},
    ):  # fmt: skip
        yield "offsets", change(data_offsets=offsets)
    yield "overlap", {**header, second: {**header[second], "data_offsets": entry["data_offsets"]}}
    for value in (None, 1, [], "F32", {}, {"dtype": "F32"}):
        yield "entry", {**header, first: value}
    yield "another field", {**header, first: {**entry, "more": 1}}
    yield "null metadata", {**header, "__metadata__": None}
    for metadata in (1, [], {"format": 1}, {"a": {}}, {"dcjax.crc32": "{"}, {"dcjax.crc32": "[]"}):
        yield "metadata", {**header, "__metadata__": metadata}
    for written in ({first: "zz"}, {first: 5}, {first: "00000000"}, {"nothing": "00000000"}, {first: None}):
        yield "checksums", {**header, "__metadata__": {"dcjax.crc32": json.dumps(written)}}
    text = json.dumps(header).encode()
    for change_of_it in ({}, {"shape": entry["shape"][::-1]}, {"dtype": "I32"}, {"data_offsets": [start, stop + 4]}):
        again = json.dumps({first: {**entry, **change_of_it}})[1:-1].encode()
        # the reader takes the last of the two
        yield ("twice, the last wrong" if change_of_it else "twice"), text[:-1] + b"," + again + b"}"
        yield "twice", b"{" + again + b"," + text[1:]
    yield "not utf-8", text.replace(b"model.norm", b"model.n\xffrm")
    yield "surrogates", text.replace(b"model.norm", b"model.n\\ud800rm")
    for broken in (b"", b"{", b"[]", b"null", b"NaN", b"{" * 90_000, b"[" * 90_000, b'{"a":' * 90_000, b"9" * 9000):
        yield "no JSON", broken
    yield "empty", {}
    yield "metadata only", {"__metadata__": {"format": "pt"}}


def swapped(header, left, right):
    names = {left: right, right: left}
    return {names.get(name, name): value for name, value in header.items()}


def test_contradictory_headers_are_refused(saved, outcome):
    header, payload = split(saved[2][FILE])
    outcomes = {}
    for kind, case in header_cases(header, payload):
        outcomes.setdefault(kind, Counter())[outcome(FILE, join(case, payload))] += 1
    assert sum(counts.total() for counts in outcomes.values()) > 150
    # three things the library's reader passes over, none of which changes a weight
    harmless = {"twice", "another field", "null metadata"}
    assert {kind for kind, counts in outcomes.items() if counts["intact"]} == harmless
    assert all(outcomes[kind]["refused"] == 0 for kind in harmless)


@pytest.mark.parametrize("length", [0, 1, 2, 2**27, 2**31, 2**32 - 8, 2**63, 2**64 - 8, 2**64 - 1])
def test_header_lengths_that_are_not_the_headers_are_refused(saved, outcome, length):
    assert outcome(FILE, struct.pack("<Q", length) + saved[2][FILE][8:]) == "refused"


HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, 8.0, 1e308, -1e308, 2**31, 2**31 + 1, 2**63, 2**64, 10**30, 10**4000, "",
    "8", "silu", "\u0000", "x" * 100_000, "a\nb", "\ud800", [], [8], [[]], [None], [2**70], {}, {"rope_type": "yarn"},
    {"rope_type": ["default"]}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**63},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 1e-300, "low_freq_factor": [], "high_freq_factor": 10**400},
    {"a": {"b": {"c": [1, 2, {"d": None}]}}},
)  # fmt: skip


@share(5, of=14)
def test_hostile_values_in_the_config_are_refused_or_of_no_account(saved, outcome, count):
    """Each field set to values of every kind; what loads is the original, but for the fields that no tensor tells."""
    fields = json.loads(saved[2]["config.json"])
    outcomes = {}
    rng = np.random.default_rng(5)
    for name in fields:
        for value in rng.choice(len(HOSTILE), count, replace=False):
            damaged = json.dumps({**fields, name: HOSTILE[value]}).encode()
            outcomes.setdefault(name, Counter())[outcome("config.json", damaged)] += 1
    total = sum(outcomes.values(), Counter())
    assert total.total() >= 28 * count and total["refused"] > total.total() / 2, total
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "num_experts")
    for name in sizes:
        assert outcomes[name]["another number"] == 0, (name, outcomes[name])
        assert outcomes[name]["refused"] >= count - 2, (name, outcomes[name])


def test_hostile_values_in_a_scaling_are_refused_or_scale_by_numbers(tmp_path, saved):
    """Each field set to values of every kind, in both styles alike; what is read turns pairs by finite frequencies."""
    fields = json.loads(saved[2]["config.json"])
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    outcomes = Counter()
    for scaling in (fields["rope_scaling"], llama3 | {"original_max_position_embeddings": 64}):
        for name in scaling:
            for value in (*HOSTILE, 1e-30, 1e29, 2**31 - 1):
                damaged = {"rope_theta": 10_000.0, **scaling, name: value}
                (tmp_path / "config.json").write_text(
                    json.dumps(fields | {"rope_parameters": damaged, "rope_scaling": damaged})
                )
                try:
                    config = read_config(tmp_path)
                except ValueError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500, error
                    outcomes["refused"] += 1
                    continue
                outcomes["read"] += 1
                if config.rope_scaling is not None:
                    found = config.rope_scaling.multipliers(config.rope_theta, config.head_dim)
                    assert ((found > 0) & (found <= 1)).all() and 0 < config.rope_scaling.amplitude < np.inf
    assert outcomes["refused"] > outcomes["read"] > 20, outcomes


def test_configs_that_are_no_json_objects_are_refused(saved, outcome):
    text = saved[2]["config.json"]
    twice = text.rstrip()[:-1] + b', "hidden_size": 8}'
    deep = json.dumps(json.loads(text) | {"x": 1}).encode()
    deep = deep.replace(b'"x": 1', b'"x": ' + b"[" * 50_000 + b"]" * 50_000)
    odd = [text[:cut] for cut in range(0, len(text) - 2, 37)]
    odd += [
        b"",
        b"\xff" + text,
        text.decode().encode("utf-16"),
        twice,
        deep,
        b"[" + text + b"]",
        b'"text"',
        b"1",
        b"null",
    ]
    odd += [text.replace(b"1e-06", b"NaN"), text.replace(b"1e-06", b"Infinity"), text.replace(b"1e-06", b"1e999")]
    odd += [text.replace(b"1e-06", b"-1e-06"), text + text, b" " * (1 << 21) + text]
    assert {outcome("config.json", case) for case in odd} == {"refused"}
    assert sys.getrecursionlimit() < 50_000
