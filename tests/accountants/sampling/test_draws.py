import concurrent.futures

import numpy as np
import pytest

from accountants import FixedEpochs, ShuffledEpochs
from accountants.sampling import Draws
from tests.accountants.sampling.helpers import draws_of


def test_each_place_has_random_numbers_of_its_own():
    places = []

    def generator(*place):
        places.append(place)
        return np.random.default_rng(place)

    draws = Draws(10, 4, generator)
    draw = draws.step(3, 2)
    assert (draw.num_examples, draw.epoch, draw.index, draw.step, draw.in_order) == (
        (10, 3, 2, 10, False)
    )
    # Two requests in one step go on with the same numbers.
    assert draw.generator is draw.generator
    draw.once_per_epoch(lambda generator: generator.random(1))
    draw.once_per_run(lambda generator: generator.random(1))
    assert places == [(3, 2), (3,), ()]


def test_what_is_drawn_once_is_kept_for_the_latest_two_places():
    draws = Draws(10, 4, lambda *place: np.random.default_rng(place))
    drawn = [draws.step(epoch, 0).once_per_epoch(lambda g: g.random(3)) for epoch in (1, 2, 3)]
    assert [any(array is one for one in draws.kept) for array in drawn] == [False, True, True]
    again = draws.step(2, 3).once_per_epoch(lambda g: 1 / 0)
    assert again is drawn[1]


@pytest.mark.parametrize("scheme", [ShuffledEpochs(20), FixedEpochs(20, epochs=2)], ids=repr)
def test_threads_share_what_is_drawn_once(scheme):
    fresh = Draws(1000, 50, lambda *place: np.random.default_rng())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [*pool.map(lambda index: scheme.rows(fresh.step(1, index)), range(50))]
    assert sorted(np.concatenate(rows)) == list(range(1000))


def test_places_do_not_depend_on_the_order_of_requests():
    first, second = draws_of(ShuffledEpochs(3), 10), draws_of(ShuffledEpochs(3), 10)
    there = [ShuffledEpochs(3).rows(first.step(1, index)) for index in range(4)]
    back = [ShuffledEpochs(3).rows(second.step(1, index)) for index in reversed(range(4))]
    assert all(map(np.array_equal, there, reversed(back)))
