"""When a trial's state is saved: once a pass, while that is cheap."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from transfer.sweep.trial_ranks import FIRST_SAVE_S, SAVE_SHARE, SavePace

ALONE: Any = SimpleNamespace(size=1, is_main=True)


@pytest.mark.parametrize(("epoch_s", "save_s"), [(10.0, 0.3), (0.05, 0.03), (1.0, 2.0), (3600.0, 20.0)])
def test_saves_take_their_share_of_the_time_and_no_more(epoch_s: float, save_s: float) -> None:
    now_s, saves_at = [0.0], [0.0]
    pace = SavePace(ALONE, now=lambda: now_s[0])
    for _ in range(5000):
        now_s[0] += epoch_s
        if pace():
            now_s[0] += save_s
            pace.saved()
            saves_at.append(now_s[0])
    gaps = [b - a for a, b in itertools.pairwise(saves_at[1:])]
    spent = save_s * (len(saves_at) - 1)
    assert spent <= SAVE_SHARE * now_s[0] + save_s
    # A kill costs a pass, or 20 times a save and the rest of the pass in which that time was reached.
    is_cheap = save_s <= SAVE_SHARE * epoch_s
    assert max(gaps) <= (epoch_s if is_cheap else save_s / SAVE_SHARE + epoch_s) + save_s + 1e-6
    assert not is_cheap or len(saves_at) == 5001


def test_the_first_save_waits_until_it_is_cheap_by_a_guess() -> None:
    now_s = [0.0]
    pace = SavePace(ALONE, now=lambda: now_s[0])
    now_s[0] = 0.9 * FIRST_SAVE_S / SAVE_SHARE
    assert not pace()
    now_s[0] = 1.1 * FIRST_SAVE_S / SAVE_SHARE
    assert pace()
