"""python -m analysis.sensitivity: which hyperparameters of a tracked study matter, how much, how surely."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from analysis.crosschecks import crosscheck
from analysis.fixed_designs import describe, read_companions, summarise
from analysis.importance import DUMMY, Analysis, analyse
from analysis.load import (
    Exported,
    StudyData,
    StudyRun,
    find_study,
    folder_name,
    list_studies,
    load_study,
    open_source,
    progress_line,
    quieten,
    tracking_uri,
)
from analysis.report import answer, cautions, span, write_design_report, write_report
from analysis.verdicts import judge
from ramcore.errors import UserError
from study.designs import DESIGNS


@dataclass(frozen=True, kw_only=True)
class Args:
    """Read a study back from MLflow and write its sensitivity report."""

    study: str | None = None
    """Name of the study; the newest one if left out."""
    tracking_uri: str | None = None
    """MLflow tracking server; $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, if left out."""
    records: Path | None = None
    """Read records that analysis.export wrote into this folder, not MLflow."""
    out: Path | None = None
    """Folder for the report; ./reports/<study> if left out."""
    attach: bool = True
    """Attach the report to the study's MLflow run as well."""


def main(args: Args) -> int:
    """Read, analyse, write. Gives 0, or 2 after a one-line message if the records cannot answer."""
    try:
        uri = tracking_uri(args.tracking_uri)
        source = open_source(uri, args.records)
        studies = list_studies(source)
        study = _choose(studies, args.study)
        out = args.out or Path("reports") / folder_name(study.name)
        _say(f"study {study.name} ({study.status}) from {args.records or uri}")
        records = load_study(source, study, progress_line("reading metrics"))
        if _report(study) == "comparison":
            companions = summarise([records])
            paths = write_design_report(out, records, companions)
            print(
                f"\n{study.name}: {describe(records)}; a fixed design has no global ranking\n\n  report: "
                f"{out / 'report.html'}"
            )
        else:
            companions = read_companions(source, studies, study)
            analysis = analyse(records, _say)
            verdicts = judge(analysis)
            _say("drawing")
            checks = crosscheck(records, analysis)
            paths = write_report(out, records, analysis, verdicts, crosschecks=checks, companions=companions)
            print_answer(analysis, answer(analysis, verdicts), out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report must be writable; {error}. Choose another folder with --out", file=sys.stderr)
        return 2
    if args.attach and not isinstance(source, Exported):
        attach(source, records, out, paths)
    return 0


def _choose(studies: list[StudyRun], name: str | None) -> StudyRun:
    """The study named, or the newest that this command has an answer for. Raises UserError if it has none."""
    if name is None:
        return next((s for s in studies if _report(s) != "tables"), studies[0])
    study = find_study(studies, name)
    if _report(study) == "tables":
        raise UserError(
            f"a sensitivity report needs a search, or the designs ofat or replicate; {study.name} is of the design "
            f"{study.params['design']}. Run python -m analysis.paper --study {study.name}"
        )
    return study


def _report(study: StudyRun) -> str:
    """How a study is reported; one of a design that is unknown here, as a search."""
    design = DESIGNS.get(study.params.get("design", "search"))
    return design.report if design else "sensitivity"


def attach(client: MlflowClient, records: StudyData, out: Path, paths: list[Path]) -> None:
    """Put the files under sensitivity/ of the study's run; says so and goes on if the server will not have them."""
    try:
        for path in paths:
            folder = path.parent.relative_to(out).as_posix()
            client.log_artifact(
                records.study.run_id, str(path), "sensitivity" if folder == "." else f"sensitivity/{folder}"
            )
    except (MlflowException, OSError) as error:
        _say(f"the report could not be attached to the study's MLflow run ({error}); it lies in {out} all the same")


def print_answer(analysis: Analysis, sentences: list[str], out: Path) -> None:
    """The answer and the ranking on stdout, and where the report lies."""
    print(f"\nSensitivity of {analysis.name}\n")
    for sentence in sentences:
        print(f"  {sentence}")
    print(f"\n  {'rank':<10}{'parameter':<22}{'effect (accuracy points)':<28}total Sobol index")
    for effect in analysis.effects:
        tied = sum(e.rank == effect.rank for e in analysis.effects) > 1
        rank = "-" if effect.name == DUMMY or not analysis.ranked else f"{effect.rank}{' tied' if tied else ''}"
        print(f"  {rank:<10}{effect.name:<22}{span(effect.effect):<28}{span(effect.total, 2)}")
    for caution in cautions(analysis):
        print(f"\n  note: {caution}")
    print(f"\n  report: {out / 'report.html'}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def cli() -> int:
    """Entry point."""
    quieten()
    # Matrices of a few hundred rows gain nothing from a second thread (25 s with one, 33 s with two on two idle cores),
    # and beside trials that train the threads wait for each other: 20 s of fitting became over 9 minutes.
    torch.set_num_threads(1)
    return main(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    sys.exit(cli())
