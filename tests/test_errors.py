"""What a command says of a command line that it cannot read: one line, exit code 2, nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import sensitivity
from ramcore import train
from ramcore.errors import parsed
from ramcore.private import private_arguments
from study.flags import parse

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
COMMANDS = ("study.run", "ramcore.train", *(f"analysis.{n}" for n in ("sensitivity", "compare", "paper", "export")))


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


@pytest.mark.parametrize("words", [["--help"], ["--data", "digits", "--task", "original", "--print-space"]])
def test_full_stdout_is_said_in_one_line(words, tmp_path):
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "study.run", *words]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 2
    assert done.stderr == (
        "warning: stdout must take the results; it did not (No space left on device): the rest is not printed\n"
    )


def test_closed_stdout_is_said_once_and_another_encoding_is_escaped():
    program = "import sys; from ramcore.errors import show; print([show(str(i)) for i in range(3)], file=sys.stderr)"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-c", program], stdout=writes, stderr=subprocess.PIPE, text=True, env=ENV)
    os.close(writes)
    said, taken = done.stderr.splitlines()
    assert (done.returncode, taken) == (0, "[False, True, True]") and "(Broken pipe)" in said
    program = "from ramcore.errors import show; show('runs/\\xfc')"
    env = ENV | {"PYTHONIOENCODING": "ascii"}
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env).stdout == b"runs/\\xfc\n"


@pytest.mark.parametrize("module", ["study.run", "ramcore.train", "analysis.sensitivity"])
def test_interrupt_during_the_imports_is_one_line(module, tmp_path):
    # The program interrupts itself when the first of the long imports begins.
    program = f"""
import importlib, os, signal, sys
from ramcore.errors import entry_point
class Interrupting:
    def find_spec(self, name, *_):
        if name == "tyro":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
entry_point("{module}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("text", ["x", "3"])
def test_arguments_that_no_command_left_are_refused(text, monkeypatch, capsys):
    monkeypatch.setenv("RAM_STUDY_ARGUMENTS", text)
    with pytest.raises(SystemExit) as ended:
        private_arguments()
    said = f"error: a command sets RAM_STUDY_ARGUMENTS for itself; got {text!r}: unset it\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, said)
    monkeypatch.setenv("RAM_STUDY_ARGUMENTS", text)
    with pytest.raises(SystemExit):
        sensitivity.cli()
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("module", COMMANDS)
def test_command_catches_interrupts_before_its_long_imports(module):
    before, _, after = Path(ROOT, *module.split(".")).with_suffix(".py").read_text().partition("entry_point(")
    assert after.startswith(f'"{module}")')
    assert re.findall(r"^(?:import|from) (\S+)", before, re.M) == ["__future__", "ramcore.errors"]


def test_help_and_answers_pass(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sensitivity", "--help"])
    with pytest.raises(SystemExit) as ended:
        sensitivity.cli()
    assert not ended.value.code
    assert "--study" in capsys.readouterr().out
    assert parsed(lambda: 3) == 3
