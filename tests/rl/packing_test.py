"""Packing: every row in one place, nothing over anything else, prompts where their responses can read them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rl import Packing
from dcjax.types import Batch, Bins, Places

P, T = 5, 9


def batch_of(prompts, responses, *, experts=None):
    """Rows of these prompts, lists of tokens, and numbers of response tokens."""
    rows = len(responses)
    tokens, mask = np.zeros((rows, P + T), np.int32), np.zeros((rows, P + T), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, P - len(prompt) : P] = prompt
        mask[row, P - len(prompt) : P + response] = True
    zeros = np.zeros((rows, T), np.float32)
    scalars = np.zeros(rows, np.float32)
    return Batch(tokens, mask, mask[:, P:], zeros, scalars + 1, scalars, scalars[:, None], experts=experts)


@st.composite
def cases(draw):
    """A packing and a batch for it; a group has one prompt, mostly."""
    group, updates, shares = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 1, 2), (2, 2, 1), (3, 2, 3)]))
    rows = group * updates * shares * draw(st.integers(1, 4))
    prompt = st.lists(st.integers(1, 3), min_size=1, max_size=P)
    prompts = [drawn for _ in range(rows // group) for drawn in [draw(prompt)] * group]
    if draw(st.booleans()):
        prompts[0] = draw(prompt)
    responses = draw(st.lists(st.integers(0, T), min_size=rows, max_size=rows))
    # one bin, several, those with a narrow last one that holds prompts alone, and some that may be halved
    bins = draw(st.sampled_from([(P + T - 1,) * 2, (2 * T, T), (2 * T + P - 1, T), (T + P - 1, T), (40, 40), (50, 20)]))
    bins = Bins(*bins, draw(st.sampled_from([P - 1, T])), draw(st.integers(1, 9)), shared=draw(st.booleans()))
    if bins.width == 20:
        bins = bins._replace(gathered=16, halvings=2)
    return Packing(bins, shares, updates, group), batch_of(prompts, responses)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_row_has_its_columns_to_itself_and_its_prompt_at_hand(case):
    packing, batch = case
    rows, updates = len(batch.rewards), packing.updates
    packed = packing(batch)
    microbatches, minibatches = packed.microbatches, minibatches_of(packing, rows)
    seen = []
    for share, update in np.ndindex(packing.shares, updates):
        mine = minibatches[update].reshape(packing.shares, -1)[share]
        count = microbatches.count[share, update]
        assert (microbatches.rows[share, update, count:] == -1).all()
        for at in range(count):
            cut = jax.tree.map(lambda x, at=(share, update, at): x[at], microbatches.places)
            numbers = microbatches.rows[share, update, at]
            assert (cut.present == (numbers >= 0)).all() and cut.present.any()
            seen += mine[numbers[cut.present]].tolist()
            where = Places(*(x[cut.present] for x in tuple(vars(cut).values())[:-1]), cut.halvings)
            check_microbatch(packed, packing.bins, mine[numbers[cut.present]], where)
    assert sorted(seen) == list(range(rows))
    jax.tree.map(np.testing.assert_array_equal, packing(batch), packed)


def minibatches_of(packing, rows):
    """Which rows each update takes, [updates, B / updates]."""
    dealt = np.arange(rows).reshape(-1, packing.updates, packing.group_size).swapaxes(0, 1)
    return dealt.reshape(packing.updates, -1)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_rows_move_within_their_minibatch_all_fields_alike_and_none_on_one_device(case):
    packing, batch = case
    rows = len(batch.rewards)
    batch = dataclasses.replace(
        batch, rewards=np.arange(rows, dtype=np.float32), experts=batch.tokens[:, 1:, None, None]
    )
    packed = packing(batch)
    moved, minibatches = packed.rewards.astype(int), minibatches_of(packing, rows)
    # what is left in each minibatch's places are its own rows
    assert (np.sort(moved[minibatches], axis=1) == minibatches).all()
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs[moved]),
        dataclasses.replace(packed, microbatches=None),
        batch,
    )
    order = packed.microbatches.order
    if packing.shares == 1:
        assert order is None and packed.tokens is batch.tokens
    else:
        np.testing.assert_array_equal(order.swapaxes(0, 1).reshape(packing.updates, -1), moved[minibatches])
    most = packed.microbatches.count.max(axis=0)
    before = most_of_shares(packing, batch)
    assert (most <= before).all()
    # where nothing is gained, nothing moves
    for update in np.flatnonzero(most == before):
        assert (moved[minibatches[update]] == minibatches[update]).all()


def most_of_shares(packing, batch):
    """Microbatches of the fullest share of each update, where each share is packed alone in the batch's order."""
    alone, most = Packing(packing.bins), []
    for minibatch in minibatches_of(packing, len(batch.rewards)):
        parts = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in np.split(minibatch, packing.shares)]
        most.append(max(int(alone(part).microbatches.count[0, 0]) for part in parts))
    return np.array(most)


@pytest.mark.parametrize("seed", range(40))
def test_balanced_shares_need_as_many_microbatches_as_columns_alone_say(seed):
    """By a table of columns: the longest row goes to the share that then has fewest; a share fills one bin after the
    other, each with the longest rows that fit. Where a prompt is already, it needs none."""
    rng = np.random.default_rng(seed)
    shares, each, width = int(rng.integers(2, 6)), int(rng.integers(1, 7)), P + T - 1
    rows, group = shares * each, int(rng.integers(1, 4))
    responses, groups = rng.integers(0, T + 1, rows), np.arange(rows) // group
    contexts = rng.integers(0, P, rows)[groups]
    batch = batch_of([[of + 1] * (context + 1) for of, context in zip(groups, contexts, strict=True)], responses)
    packing = Packing(Bins(width, width, width, each, shared=True), shares)

    def columns(rows):
        one_of_each = np.array(rows)[np.unique(groups[rows], return_index=True)[1]]
        return responses[rows].sum() + contexts[one_of_each].sum()

    given = [[] for _ in range(shares)]
    for row in np.argsort(-responses, kind="stable"):
        given[np.argmin([columns([*rows, row]) if len(rows) < each else np.inf for rows in given])].append(row)
    balanced = max(map(len, (fill(rows, columns, width) for rows in given)))
    expected = min(balanced, most_of_shares(packing, batch)[0])
    assert packing(batch).microbatches.count.max() == expected


def fill(rows, columns, width):
    """The rows of each bin, in turn."""
    bins = []
    while rows:
        bins.append([])
        for row in rows:
            if columns([*bins[-1], row]) <= width:
                bins[-1].append(row)
        rows = [row for row in rows if row not in bins[-1]]
    return bins


def test_two_shares_by_hand():
    """In order, share 0 has the two long rows, and needs two microbatches; with a long and a short one each, one."""
    batch = batch_of([[1, 2, 3]] * 4, [9, 8, 1, 2])
    packing = Packing(Bins(13, 13, 13, 2), shares=2, group_size=4)
    packed = packing(batch)
    assert packed.microbatches.count.tolist() == [[1], [1]]
    assert packed.microbatches.order.tolist() == [[[0, 2]], [[1, 3]]]
    assert packed.response_mask.sum(axis=1).tolist() == [9, 1, 8, 2]
    assert packing.filled(packed) == (9 + 8 + 1 + 2 + 2) / (2 * 13)


def check_microbatch(batch, bins, rows, places):
    bins, shared = bins.halved(int(places.halvings)), {}
    used = np.zeros(bins.columns, int)
    gathered = np.zeros(bins.number * bins.gathered, int)
    contexts = {}
    for row, response, prompt, into in zip(rows, places.responses, places.prompts, places.gathered, strict=True):
        mask = batch.attention_mask[row]
        columns, context = int(mask[P:].sum()), int(mask[:P].sum()) - 1
        used[response : response + columns] += 1
        prompt_tokens = batch.tokens[row, :P][mask[:P]].tobytes()
        if not bins.shared or shared.setdefault((prompt_tokens, into // bins.gathered), row) == row:
            gathered[into : into + context] += 1
        else:
            # as for the first row of the prompt that reads in this bin
            assert into == places.gathered[list(rows).index(shared[prompt_tokens, into // bins.gathered])]
        own = response // bins.width
        if columns:
            assert own == (response + columns - 1) // bins.width
        if context:
            # it reads from its own bin's gathered columns
            assert into // bins.gathered == (into + context - 1) // bins.gathered
            assert not columns or into // bins.gathered == own
            assert prompt // bins.width == (prompt + context - 1) // bins.width
        else:
            assert prompt == -1
        contexts.setdefault(prompt_tokens, set()).add((int(prompt), context))
    # a prompt stands once, and over nothing else
    for places_of_prompt in contexts.values():
        ((prompt, context),) = places_of_prompt
        used[max(prompt, 0) : max(prompt, 0) + context] += 1
    assert used.max(initial=0) <= 1 and gathered.max(initial=0) <= 1


def test_a_small_batch_by_hand():
    """The longest responses of the pool come first. Two whole groups are more than 18 columns, so the first takes from
    one, the second from what is left: of its rows 2 and 3, the first is too long, and the other's prompt."""
    batch = batch_of([[1, 2, 3]] * 2 + [[4, 5, 6]] * 2 + [[7, 7]] * 2, [3, 9, 4, 2, 5, 9])
    microbatches = Packing(Bins(2 * T, T, T, 9), group_size=2)(batch).microbatches
    (count,), (rows, places) = (
        microbatches.count[0],
        jax.tree.map(lambda x: x[0, 0, :3], (microbatches.rows, microbatches.places)),
    )
    assert count == 3
    # row 1 fills a bin, and its prompt of two columns, which row 0 shares, starts the other
    assert rows[:, :3].tolist() == [[1, 0, -1], [5, 4, -1], [2, 3, -1]]
    assert places.responses[:, :2].tolist() == [[0, 11], [0, 10], [0, 6]]
    assert places.prompts[:, :2].tolist() == [[9, 9], [9, 9], [4, 4]]


def test_prompts_whose_tokens_went_to_other_experts_are_others():
    experts = np.zeros((4, P + T - 1, 1, 2), np.int16)
    experts[3, P - 2] = 1
    batch = batch_of([[1, 2, 3]] * 4, [2] * 4, experts=experts)
    places = Packing(Bins(4 * T, T, T, 9), group_size=4)(batch).microbatches.places
    assert len(set(places.prompts[0, 0, 0][places.present[0, 0, 0]].tolist())) == 2


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([0] * P + [1] * T, "no prompt"),
        ([1, 0, 1, 1, 1] + [1] * T, "padding"),
        ([1] * P + [0] + [1] * (T - 1), "padding"),
    ],
)
def test_rows_that_are_not_a_prompt_and_a_response_are_refused(row, what):
    batch = batch_of([[1]] * 2, [1] * 2)
    mask = np.stack([batch.attention_mask[0], np.array(row, bool)])
    batch = dataclasses.replace(batch, attention_mask=mask, response_mask=mask[:, P:])
    with pytest.raises(ValueError, match=f"row 1 of the batch has .*{what}"):
        Packing(Bins(2 * T, T, T, 2))(batch)


def test_a_single_bin_is_refused_that_has_no_room_for_a_prompt_beside_its_response():
    batch = batch_of([[1, 2, 3]], [T])
    needed = "row 0 of the batch needs 2 columns for its prompt and 9 for its response"
    for width in (T, T + 2):
        assert Packing(Bins(T + 2, width, T, 2))(batch).microbatches.count == 1
        with pytest.raises(ValueError, match=f"{needed}; of 10 columns each bin has {width - 1}, and 9 gathered"):
            Packing(Bins(T + 1, width - 1, T, 2))(batch)


def test_rows_that_are_too_long_are_refused():
    with pytest.raises(
        ValueError, match=r"row 1 .* 0 columns for its prompt and 9 for .*; of 16 columns each bin has 8"
    ):
        Packing(Bins(16, 8, 8, 2))(batch_of([[1]] * 2, [8, 9]))
    with pytest.raises(ValueError, match=r"needs 4 columns for its prompt .* and 3 gathered"):
        Packing(Bins(16, 8, 3, 2))(batch_of([[1] * P], [8]))


def test_bins_are_halved_for_rows_that_are_all_short():
    bins = Bins(64, 32, 16, 9, halvings=2)
    lengths, expected = ([8] * 8, 2), ([8] * 7 + [9], 1)
    for responses, times in (lengths, expected):
        assert Packing(bins)(batch_of([[1, 2]] * 8, responses)).microbatches.places.halvings[0, 0, 0] == times


def test_responses_that_fill_bins_leave_the_narrow_last_one_to_their_prompt():
    packing = Packing.fitting(prompt_length=P, response_length=8, rows=24, group_size=8)
    packed = packing(batch_of([[1] * P] * 24, [8] * 24))
    assert packing.bins.columns == 80 and packed.microbatches.count == 3
    assert packing.filled(packed) == 3 * (8 * 8 + P - 1) / (3 * 80)


def fitting(**changes):
    sizes = {"prompt_length": 100, "response_length": 1000, "rows": 64, "group_size": 8, "platform": "tpu"}
    sizes["masked"] = False
    return Packing.fitting(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # eight of the longest responses and a prompt, in multiples of 16
        ({}, Bins(8112, 1014, 1014, 64)),
        # or as many as 16384 columns hold
        ({"response_length": 8192}, Bins(16_496, 8248, 8248, 48)),
        ({"response_length": 16_000}, Bins(16_112, 16_112, 16_112, 24)),
        # unless a row needs more
        ({"response_length": 32_768}, Bins(32_880, 32_880, 32_880, 24)),
        # prompts may be the longer ones
        ({"prompt_length": 3000}, Bins(11_008, 3670, 3670, 64)),
        ({"tokens_per_microbatch": 4321}, Bins(4320, 1080, 1080, 64)),
        ({"tokens_per_microbatch": 1100}, Bins(1100, 1100, 1100, 24)),
        ({"column_multiple": 24}, Bins(8112, 1014, 1014, 64)),
        ({"shares": 4, "updates": 2}, Bins(8112, 1014, 1014, 8)),
        # a CPU is given fewer columns, and under a mask bins may be halved to 62 columns, and read from half as many
        ({"platform": "cpu"}, Bins(1104, 1104, 1104, 24)),
        ({"masked": True}, Bins(8112, 1000, 504, 64, 3, True)),
        ({"masked": True, "response_length": 8192}, Bins(16_496, 8192, 4096, 48, 3, True)),
        ({"masked": True, "response_length": 64, "prompt_length": 16}, Bins(528, 64, 32, 44, 0, True)),
        ({"masked": True, "response_length": 129, "prompt_length": 16}, Bins(1056, 130, 64, 64, 1, True)),
    ],
)
def test_bins_by_the_lengths(changes, expected):
    packing = fitting(**changes)
    assert packing.bins == expected
    assert (packing.shares, packing.updates) == (changes.get("shares", 1), changes.get("updates", 1))


def test_a_microbatch_that_no_row_fits_into_is_refused():
    with pytest.raises(ValueError, match="tokens_per_microbatch is 1099; it must be at least 1100"):
        fitting(tokens_per_microbatch=1099)


@pytest.mark.parametrize("mean", [0.1, 0.35, 0.7])
def test_ragged_rows_fill_most_columns(mean):
    """Lognormal lengths, and what a share's last microbatch leaves empty counted in."""
    rng, rows, group, limit = np.random.default_rng(0), 1024, 8, 512
    lengths = np.clip(np.exp(rng.normal(np.log(mean * limit) - 0.32, 0.8, rows)), 1, limit).astype(int)
    mask = np.concatenate([np.ones((rows, 16), bool), np.arange(limit) < lengths[:, None]], axis=1)
    tokens = np.repeat(rng.integers(0, 99, (rows // group, 16 + limit)), group, axis=0).astype(np.int32)
    scalars = np.zeros(rows, np.float32)
    logps = np.zeros((rows, limit), np.float32)
    batch = Batch(tokens, mask, mask[:, 16:], logps, scalars, scalars, scalars[:, None])
    packing = Packing.fitting(prompt_length=16, response_length=limit, rows=rows, group_size=group)
    assert packing.filled(packing(batch)) > 0.85


@pytest.mark.parametrize(("prompt", "columns"), [(150, 10_240), (1024, 13_312)])
def test_two_rows_a_share_need_one_microbatch(prompt, columns):
    """128 responses of up to 8192 tokens on 64 devices; in the order of the batch some devices need two."""
    rows, shares, limit = 128, 64, 8192
    packing = Packing.fitting(
        prompt_length=prompt,
        response_length=limit,
        rows=rows,
        group_size=8,
        tokens_per_microbatch=columns,
        shares=shares,
        platform="tpu",
        masked=False,
    )
    lengths = np.random.default_rng(0).integers(0, limit + 1, rows)
    mask = np.concatenate([np.ones((rows, prompt), bool), np.arange(limit) < lengths[:, None]], axis=1)
    tokens = np.where(mask, np.repeat(np.arange(rows // 8), 8)[:, None], 0).astype(np.int32)
    scalars = np.zeros(rows, np.float32)
    batch = Batch(
        tokens, mask, mask[:, prompt:], np.zeros((rows, limit), np.float32), scalars, scalars, scalars[:, None]
    )
    assert most_of_shares(packing, batch) == 2
    packed = packing(batch)
    assert packed.microbatches.count.max() == 1
    assert packing.filled(packed) == (lengths.sum() + (prompt - 1) * rows // 8) / (shares * columns)


@pytest.mark.parametrize("shares", [1, 2])
def test_the_abstract_microbatches_are_those_of_a_batch(shares):
    packing = Packing(Bins(2 * T, T, T, 4), shares=shares, updates=2, group_size=2)
    batch = batch_of([[1, 2]] * 16, [3] * 16)
    abstract, real = packing.abstract(16), packing(batch).microbatches
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
