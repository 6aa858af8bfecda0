import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.stream import draw, epoch_order

SIZES, SEEDS, STARTS = st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 10**6)


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_has_each_example_once(size, seed, epoch):
    assert sorted(draw(size, seed=seed, start=epoch * size, count=size)) == list(range(size))


@given(SIZES, SEEDS, STARTS, st.lists(st.integers(0, 40), max_size=5))
def test_what_is_drawn_depends_on_the_cursor_and_not_on_how_one_came_there(size, seed, start, counts):
    pieces, cursor = [], start
    for count in counts:
        pieces += draw(size, seed=seed, start=cursor, count=count)
        cursor += count
    assert pieces == draw(size, seed=seed, start=start, count=sum(counts))


@given(SIZES, SEEDS, st.integers(1, 9), st.integers(1, 30), st.data())
def test_a_run_that_stops_within_an_epoch_and_goes_on_with_two_hosts_draws_each_example_once(
    size, seed, half_batch, batches, data
):
    """Cursors as the loop keeps them: a batch an iteration, of which each host takes its slice."""
    batch = 2 * half_batch
    stopped = data.draw(st.integers(0, batches))
    drawn = []
    for iteration in range(batches):
        hosts = 1 if iteration < stopped else 2
        share = batch // hosts
        for host in range(hosts):
            drawn += draw(size, seed=seed, start=iteration * batch + host * share, count=share)
    for first in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[first : first + size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(draw(20, seed=seed, start=20 * epoch, count=20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25 and tuple(range(20)) not in orders


def test_places_in_an_epoch_are_uniform():
    first = [draw(4, seed=seed, start=4 * epoch, count=1)[0] for seed in range(50) for epoch in range(40)]
    # 2,000 of them; the standard deviation is 19
    assert all(abs(first.count(example) - 500) < 4 * 19.4 for example in range(4))


def test_orders_are_the_same_on_every_machine_and_version():
    assert draw(10, seed=0, start=0, count=10) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_a_kept_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 3


@pytest.mark.parametrize("change", [{"size": 0}, {"seed": -1}, {"start": -1}, {"count": -1}])
def test_numbers_out_of_range_are_errors(change):
    arguments = {"size": 3, "seed": 0, "start": 0, "count": 1} | change
    with pytest.raises(ValueError, match="there must be an example, and no number may be negative"):
        draw(arguments.pop("size"), **arguments)
