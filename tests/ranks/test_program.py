"""How programs end: a mistake in one message, Ctrl-C in one line, and wherever their output goes."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

import doctor
import evaluate
import export
import visualize
from jepa.ranks.machine import Finding
from jepa.ranks.program import Parser, run_program


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `run_program` changes in this process is put back."""
    hangup = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(sys, "argv", ["/somewhere/engine/some.py"])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    yield
    signal.signal(signal.SIGHUP, hangup)


class Special(RuntimeError):
    exit_code = 42


def fails(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("x: wanted y"), 1, "x: wanted y"),
        (Special("away"), 42, "away"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted; go on"), 130, "interrupted; go on"),
    ],
)
def test_a_mistake_is_one_line_and_with_debug_a_traceback_before_it(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(lambda: fails(error), ValueError, Special, KeyError) == code
    assert capsys.readouterr().err == f"engine/some.py: {said}\n"
    sys.argv.append("--debug")
    assert run_program(lambda: fails(error), ValueError, Special, KeyError, name=lambda: "rank 3") == code
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and last == f"rank 3: {said}"


def test_what_is_no_mistake_of_the_user_is_raised() -> None:
    with pytest.raises(AttributeError):
        run_program(lambda: fails(AttributeError("x")), ValueError)
    assert run_program(lambda: None) == 0 and run_program(lambda: 7) == 7


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(description="x")
    parser.add_subparsers(dest="what", required=True).add_parser("draw").add_argument("--size", type=int)
    for words, said in ((["draw", "--size", "big"], " draw: argument --size: invalid int"), ([], ": the following")):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(words)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.startswith(f"engine/some.py{said}") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "work"), [(evaluate, "evaluate"), (export, "export"), (visualize, "draw"), (doctor, "examine")]
)
def test_programs_outlive_their_terminal_and_end_quietly_at_ctrl_c(
    program: Any, work: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)  # ends the process, unless it is ignored
        raise KeyboardInterrupt

    words = {evaluate: ["report", "."], export: ["a", "--to", "timm", "--out", "b"], visualize: ["--out", "a"]}
    monkeypatch.setattr(program, work, interrupted)
    monkeypatch.setattr(sys, "argv", [f"engine/{program.__name__}.py", *words.get(program, [])])
    assert program.main() == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(": interrupted")


def test_a_report_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the doctor: training goes on without its output, but a report is nothing else."""
    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding("ok", "all", "is well")])
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["engine/doctor.py", *words])
        full = open("/dev/full", "w")  # noqa: SIM115
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert doctor.main() == 1
        with suppress(OSError):
            full.close()
        assert "No space left on device" in capsys.readouterr().err
    assert doctor.main() == 0
