"""What a command says of a command line that it cannot read: one line, exit code 2, nothing written."""

from __future__ import annotations

import pytest

from analysis import sensitivity
from ramcore import train
from ramcore.errors import parsed
from study.flags import parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trails", "3"], "error: Unrecognized options: --trails, 3; did you mean --trials?: see --help"),
        (["--canvas", "forty"], "error: --canvas must be a whole number; got 'forty': see --help"),
        (["--cancel", "3.5"], "error: --cancel must be a whole number; got '3.5': see --help"),
        (["--time-budget", "soon"], "error: --time-budget must be a number; got 'soon': see --help"),
        (
            ["--epochs", "9" * 5000],
            f"error: --epochs must be a whole number of at most 4300 digits; got '{'9' * 59}... (5002 characters): "
            "see --help",
        ),
        (["--range"], "error: Missing value for argument '--range'. Expected 1 values: see --help"),
    ],
)
def test_what_cannot_be_read_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [message])


@pytest.mark.parametrize("words", [["--epochs", "many"], ["--core", "rn"], ["--epoch", "3"]])
def test_train_refuses_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words[0] in line


def test_help_and_answers_pass(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sensitivity", "--help"])
    with pytest.raises(SystemExit) as ended:
        sensitivity.cli()
    assert not ended.value.code
    assert "--study" in capsys.readouterr().out
    assert parsed(lambda: 3) == 3
