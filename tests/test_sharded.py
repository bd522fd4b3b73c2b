"""States that are cut over the ranks: saved by some beside their training, restored by others, whole on none."""

import json

import pytest
from support import PROGRAMS, launch

RANKS = 4


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every rank found at every restore."""
    folder = tmp_path_factory.mktemp("sharded")
    ended = launch(PROGRAMS / "sharded.py", "--dir", folder, processes=RANKS)
    assert ended.code == 0, ended.output
    return [line for rank in range(RANKS) for line in json.loads((folder / f"said-{rank}.json").read_text())]


@pytest.mark.slow
def test_what_n_ranks_saved_while_they_stepped_on_m_ranks_restore_bit_for_bit(said: list[dict]) -> None:
    layouts = [*((count, True) for count in range(1, RANKS + 1)), (2, False)]
    pairs = {(tuple(line["from"]), tuple(line["to"])) for line in said}
    assert pairs == {(there, here) for there in layouts for here in layouts}
    assert [line for line in said if not line["same"]] == []


def test_a_sharded_state_is_whole_on_no_rank(said: list[dict]) -> None:
    for ranks in range(2, RANKS + 1):
        held = [line["held"] for line in said if line["to"] == [ranks, True]]
        assert max(held) < 1 / ranks + 0.15  # Uneven rows, and the buffers and counters that every rank has.
    assert {line["held"] for line in said if line["to"] == [2, False]} == {1.0}
