"""One answer to "is this a name on the hub?"."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.runtime import hub
from bench.runtime.hub import is_hub_id


@pytest.mark.parametrize("name", ["owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "UCLA-AGI/x-v1.5"])
def test_owner_and_name_are_on_the_hub(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["mini", "./a/b", "../name", "/a", "~/models", "a/b/c", "out/model.safetensors", "out/pairs.parquet"]
)
def test_paths_are_not(name: str) -> None:
    assert not is_hub_id(name)


def test_a_folder_that_is_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name") and is_hub_id("owner/other")


class Clock:
    """Time that passes only while one sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class TransportError(Exception):
    """As httpx calls what is no answer at all."""


class OfflineModeIsEnabled(ConnectionError):
    pass


def answer(status: int) -> Exception:
    error = OSError(f"{status} for url: https://hub/file")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    "error", [TransportError("no route"), answer(503), answer(429), TimeoutError("read timed out")]
)
@pytest.mark.parametrize("minutes", [1, 60])
def test_a_job_survives_an_outage_of_an_hour(error, minutes, capsys):
    clock, ends = Clock(), 60 * minutes

    def call() -> str:
        if clock.now < ends:
            raise error
        return "there"

    assert hub.outlast(call, "shard 3", clock) == "there"
    assert ends <= clock.now < ends + hub.MOST
    assert clock.slept[:7] == [5, 10, 20, 40, 80, 160, 300][: len(clock.slept)] and max(clock.slept) <= 300
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(clock.slept) and said[0].startswith("bench: shard 3: the hub failed (")


def test_an_outage_without_end_is_an_error_after_two_hours():
    clock = Clock()
    with pytest.raises(TransportError, match="no route"):
        hub.outlast(lambda: (_ for _ in ()).throw(TransportError("no route")), "shard 3", clock)
    assert 7200 - hub.MOST <= clock.now <= 7200


@pytest.mark.parametrize(
    "error", [answer(404), answer(401), answer(416), FileNotFoundError("x"), OfflineModeIsEnabled("x"), ValueError("x")]
)
def test_what_waiting_does_not_mend_is_said_at_once(error):
    clock, calls = Clock(), []
    with pytest.raises(type(error)):
        hub.outlast(lambda: calls.append(0) or (_ for _ in ()).throw(error), "shard 3", clock)
    assert len(calls) == 1 and not clock.slept
