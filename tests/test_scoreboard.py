"""docs/reliability.md says what the tests say today."""

import scoreboard


def test_the_reliability_table_is_what_the_generator_writes() -> None:
    path = scoreboard.ROOT / "docs" / "reliability.md"
    assert path.read_text() == scoreboard.render(), (
        "stale: python tests/scoreboard.py --write docs/reliability.md"
    )


def test_every_file_the_table_names_is_there() -> None:
    missing = [
        name for row in scoreboard.rows() for name in row.files if not (scoreboard.TESTS / name).exists()
    ]
    assert not missing


def test_at_least_40_known_bugs_are_replayed() -> None:
    named, on_gpu, _ = scoreboard.replays()
    assert named - on_gpu >= 40
