"""Which samples belong to which step."""

import numpy as np
import pytest

from trainer.training import order
from trainer.training.rng import micro_step_seed
from trainer.training.schedule import lr_factor


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 65536, 65537, 100_003])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_epoch_is_a_permutation(n: int, epoch: int) -> None:
    ids = order.sample_ids(5, n, epoch * n, (epoch + 1) * n)
    assert np.array_equal(np.sort(ids), np.arange(n))


def test_the_order_of_a_run_never_changes_between_releases() -> None:
    assert order.sample_ids(0, 10, 0, 20).tolist() == GOLDEN_SMALL
    assert order.step_ids(1, 10**9, 4, 10**6).tolist() == GOLDEN_LARGE
    assert [micro_step_seed(7, 3, 1), micro_step_seed(7, 3, 2)] == GOLDEN_SEEDS


def test_seeds_and_epochs_give_other_orders() -> None:
    for n in (1000, 100_000):
        first = order.sample_ids(1, n, 0, n)
        assert not np.array_equal(first, order.sample_ids(2, n, 0, n))
        assert not np.array_equal(first, order.sample_ids(1, n, n, 2 * n))
        assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.1


def test_a_batch_may_span_two_epochs_and_nothing_is_dropped_or_repeated() -> None:
    n, batch = 10, 4
    steps = [order.step_ids(3, n, batch, step) for step in range(5)]
    assert sorted(np.concatenate(steps).tolist()) == sorted([*range(n), *range(n)])


@pytest.mark.parametrize("n", [60_000, 65_537, 10**9])
def test_a_resume_at_step_a_million_touches_no_earlier_sample(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: list[int] = []
    real = order._mix
    monkeypatch.setattr(order, "_mix", lambda values: (mixed.append(len(values)), real(values))[1])
    order._shuffled.cache_clear()
    ids = order.step_ids(1, n, 64, 10**6)
    assert len(ids) == 64
    # One epoch's keys where it is small; a few rounds over the batch where it is not.
    assert sum(mixed) <= (2 * n + 10 if n <= order.ARGSORT_UP_TO else 64 * order.ROUNDS * 40)


def test_micro_steps_are_the_same_whatever_the_world_size() -> None:
    ids = np.arange(10)
    parts = order.micro_steps(ids, 4)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for ranks in (1, 2, 3, 4):
        dealt = [index for rank in range(ranks) for index in range(rank, len(parts), ranks)]
        assert sorted(dealt) == [0, 1, 2]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_ends_where_it_should(schedule: str) -> None:
    factors = [lr_factor(step, schedule=schedule, warmup_steps=10, max_steps=100) for step in range(1, 101)]
    assert factors[:10] == [step / 10 for step in range(1, 11)]
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == 1.0 if schedule == "constant" else 0 < factors[-1] < 0.02
    assert lr_factor(1, schedule=schedule, warmup_steps=0, max_steps=1) == 1.0


GOLDEN_SMALL = [1, 8, 9, 3, 6, 5, 0, 7, 4, 2, 7, 1, 5, 6, 3, 0, 8, 2, 9, 4]
GOLDEN_LARGE = [969569444, 376064383, 146899989, 331493424]
GOLDEN_SEEDS = [6769647969490354089, 3031920817279478444]
