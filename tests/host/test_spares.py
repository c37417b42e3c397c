"""Files kept for the next who needs one."""

import os
from pathlib import Path

from fleetctl.host.spares import Spares


def test_a_file_that_is_done_with_becomes_the_next_one_and_holds_nothing(tmp_path: Path) -> None:
    spares, old, new = Spares(str(tmp_path)), tmp_path / "old", tmp_path / "new"
    old.write_text("secret")
    inode = old.stat().st_ino
    spares.put(str(old))
    assert not old.exists()
    spares.take(str(new))
    assert (new.read_text(), new.stat().st_ino) == ("", inode)


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    spares, old, there = Spares(str(tmp_path)), tmp_path / "old", tmp_path / "there"
    old.touch()
    spares.put(str(old))
    there.write_text("held by somebody")
    spares.take(str(there))
    assert there.read_text() == "held by somebody"


def test_what_is_missing_or_was_cleared_away_is_no_error(tmp_path: Path) -> None:
    spares, old = Spares(str(tmp_path)), tmp_path / "old"
    spares.put(str(old))
    spares.take(str(tmp_path / "new"))
    old.touch()
    spares.put(str(old))
    for path in tmp_path.iterdir():
        path.unlink()
    spares.take(str(tmp_path / "new"))
    spares.remove_all()
    assert os.listdir(tmp_path) == []


def test_only_so_many_are_kept_and_those_of_a_daemon_before_us_are_removed(tmp_path: Path) -> None:
    for spares in (Spares(str(tmp_path), most=2), Spares(str(tmp_path), most=2)):
        for number in range(5):
            path = tmp_path / f"{number}"
            path.touch()
            spares.put(str(path))
        assert len(os.listdir(tmp_path)) == 2
    Spares(str(tmp_path)).remove_all()
    assert os.listdir(tmp_path) == []
