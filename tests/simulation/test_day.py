"""The tool of docs/dashboard.png still draws: every widget of the template, over a short day."""

from pathlib import Path

from tests.simulation import day


def test_the_dashboard_is_drawn_over_a_simulated_morning(tmp_path: Path) -> None:
    fleet = day.play_day(hours=7)
    assert fleet.violations == []
    assert fleet.measured.points["fleet", "TurnsCompleted", "control-plane"]
    day.draw(fleet, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
