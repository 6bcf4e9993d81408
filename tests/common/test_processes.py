"""Work side by side: in order, in processes of its own, and given up as a whole."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from grace_bench.common.options import check_whole
from grace_bench.common.processes import n_cores, side_by_side
from grace_bench.errors import UserError


def test_results_come_in_the_order_of_the_items() -> None:
    assert side_by_side(abs, [-3, 2, -1], jobs=2) == [3, 2, 1]


def test_work_is_done_in_other_processes() -> None:
    (text,) = side_by_side(os.path.realpath, ["/proc/self"], jobs=1)
    assert Path(text).name != str(os.getpid())


def is_imported(name: str) -> bool:
    return name in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are started anew")
def test_a_forked_process_has_what_this_one_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imported_here", ModuleType("imported_here"))
    assert side_by_side(is_imported, ["imported_here"], jobs=1, fork=True) == [True]


def fails_beside_a_long_one(path: Path | str) -> None:
    """Goes on for five minutes if it is given a path, which says that it has begun; else fails once that is there."""
    if isinstance(path, Path):
        path.touch()
        time.sleep(300)
    while not Path(path).exists():
        time.sleep(0.01)
    raise KeyError(path)


def test_a_mistake_is_raised_as_it_is_and_what_is_under_way_is_given_up(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # As a library may do that was used before.
    started = time.monotonic()
    try:
        with pytest.raises(KeyError):
            side_by_side(fails_beside_a_long_one, [str(begun), begun], jobs=2, fork=True)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert time.monotonic() - started < 120


def test_a_message_for_the_user_survives_the_way_between_processes() -> None:
    with pytest.raises(UserError, match=r"seed=-1 should be a whole number, at least 0"):
        side_by_side(partial(check_whole, "seed", least=0), [-1], jobs=1)


def test_there_is_a_core_to_use() -> None:
    assert 1 <= n_cores() <= (os.cpu_count() or 1)
