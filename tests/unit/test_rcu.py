"""Grace periods are hurried, and the kernel's setting is given back, whatever happens. No privileges."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.kernel import rcu


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the settings are; both are 0."""
    for name in ("EXPEDITED", "NORMAL"):
        (tmp_path / name).write_text("0\n")
        monkeypatch.setattr(rcu, name, tmp_path / name)
    return tmp_path


def setting(kernel: Path) -> tuple[int, bool]:
    """What is set, and whether the marker is there."""
    return int((kernel / "EXPEDITED").read_text()), (kernel / "marker").exists()


def test_it_is_asked_for_in_the_body_only(kernel: Path) -> None:
    with rcu.hurried(kernel / "marker"):
        assert setting(kernel) == (1, True)
        with rcu.hurried(kernel / "marker"):
            pass
        assert setting(kernel) == (1, True)
    assert setting(kernel) == (0, False)


def test_it_is_given_back_after_a_failure(kernel: Path) -> None:
    with pytest.raises(KeyError), rcu.hurried(kernel / "marker"):
        raise KeyError
    assert setting(kernel) == (0, False)


@pytest.mark.parametrize("name", ["EXPEDITED", "NORMAL"])
def test_what_somebody_has_decided_stays(name: str, kernel: Path) -> None:
    (kernel / name).write_text("1\n")
    before = setting(kernel)
    with rcu.hurried(kernel / "marker"):
        assert setting(kernel) == before
    assert setting(kernel) == before


@pytest.mark.parametrize("name", ["EXPEDITED", "NORMAL"])
def test_a_kernel_without_it_goes_on(name: str, kernel: Path) -> None:
    (kernel / name).unlink()
    with rcu.hurried(kernel / "marker"):
        assert not (kernel / "marker").exists()


def test_a_sys_that_cannot_be_written_leaves_no_marker(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel / "EXPEDITED").unlink()
    (kernel / "EXPEDITED").mkdir()
    monkeypatch.setattr(Path, "read_text", lambda path: "0")
    with rcu.hurried(kernel / "marker"):
        assert not (kernel / "marker").exists()


def test_after_a_death_in_the_body_it_is_given_back(kernel: Path) -> None:
    rcu.settle(kernel / "marker")
    (kernel / "EXPEDITED").write_text("1\n")
    rcu.settle(kernel / "marker")
    assert setting(kernel) == (1, False), "somebody else's"
    (kernel / "marker").touch()
    rcu.settle(kernel / "marker")
    assert setting(kernel) == (0, False)
