"""If these fail, a study makes again what it has, or makes a piece before what it needs."""

from iar_jax.study.drive import Piece, next_piece


def piece(name, *needs, finished=False):
    return Piece(name, "run", needs, lambda: finished, lambda: None)


def test_what_is_finished_when_its_turn_comes_is_not_made_again():
    waiting = [piece("tuning", "shared", finished=True), piece("run", "tuning"), piece("other", "absent")]
    done = {"shared"}
    assert next_piece(waiting, done).name == "run"
    assert done == {"shared", "tuning"}
    assert [left.name for left in waiting] == ["other"]
    assert next_piece(waiting, done) is None
    assert [left.name for left in waiting] == ["other"]
