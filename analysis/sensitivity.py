"""python -m analysis.sensitivity: which hyperparameters of a tracked study matter, how much, how surely."""

from __future__ import annotations

from ramcore.errors import UserError, entry_point, parsed, say, show

if __name__ == "__main__":
    entry_point("analysis.sensitivity")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from analysis import load
from analysis.answer import answer, cautions, rank_label
from analysis.crosschecks import crosscheck
from analysis.fixed_designs import completion_line, newest, summarise
from analysis.importance import conclude, fit_study
from analysis.load import Exported, StudyData, StudyRun
from analysis.report import write_design_report, write_report
from analysis.results import Analysis
from analysis.settling import settle
from analysis.text import span
from analysis.verdicts import judge
from ramcore.private import private_arguments
from ramcore.space import words
from study.designs import DESIGNS
from study.moved import tracking_uri


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
    alone: bool = False
    """Use the study's own trials only, not those of others of the same task, data and epochs that lie in its space."""
    attach: bool = True
    """Attach the report to the study's MLflow run as well."""


def main(args: Args) -> int:
    """Read, analyse, write. Gives 0, or 2 after a one-line message if the records cannot answer."""
    return load.exit_code("report", lambda: _report(args))


def _report(args: Args) -> None:
    uri = tracking_uri(args.tracking_uri)
    source = load.open_source(uri, args.records)
    studies = load.list_studies(source)
    study = _choose(studies, args.study)
    out = args.out or Path("reports") / load.folder_name(study.name)
    say(f"study {study.name} ({study.status}) from {args.records or uri}")
    records = load.load_study(source, study, load.progress_line("reading metrics"))
    if _report_kind(study) == "comparison":
        paths = write_design_report(out, records, summarise([records]))
        show(f"\n{study.name}: {completion_line(records)}; a fixed design has no global ranking")
    else:
        paths = _report_search(out, records, load.load_others(source, studies, study), alone=args.alone)
    show(f"\n  report: {out / 'report.html'}")
    if args.attach and not isinstance(source, Exported):
        attach(source, records, out, paths)


def _report_search(out: Path, records: StudyData, others: Sequence[StudyData], *, alone: bool) -> list[Path]:
    """Analyse a search, write its report and print its answer. Gives the files."""
    fixed_designs = summarise(newest(others))
    fitted = fit_study(records, say, others=() if alone else others)
    analysis = conclude(records, fitted, say)
    verdicts = settle(fitted, judge(analysis))
    say("drawing")
    checks = crosscheck(records, analysis)
    paths = write_report(out, records, analysis, verdicts, crosschecks=checks, fixed_designs=fixed_designs)
    print_answer(analysis, answer(analysis, verdicts))
    for verdict in verdicts:
        if verdict.needs:
            show(f"\n  undecided: {verdict.claim}. {verdict.needs}.")
    return paths


def _choose(studies: Sequence[StudyRun], name: str | None) -> StudyRun:
    """The named study, or the newest that this command can report. Raises UserError for one that it cannot."""
    if name is None:
        return next((s for s in studies if _report_kind(s) != "tables"), studies[0])
    study = load.find_study(studies, name)
    if _report_kind(study) == "tables":
        raise UserError(
            f"a sensitivity report needs a search, or the designs ofat or replicate; {study.name} is of the design "
            f"{study.params['design']}. Run python -m analysis.paper --study {study.name}"
        )
    return study


def _report_kind(study: StudyRun) -> str:
    """How a study is reported: `Design.report`, or as a search if its design is unknown here."""
    design = DESIGNS.get(study.params.get("design", "search"))
    return design.report if design else "sensitivity"


def attach(client: MlflowClient, records: StudyData, out: Path, paths: list[Path]) -> None:
    """Log the files under sensitivity/ of the study's run. If the server refuses them, say so and go on."""
    try:
        for path in paths:
            folder = Path("sensitivity") / path.parent.relative_to(out)
            client.log_artifact(records.study.run_id, str(path), folder.as_posix())
    except (MlflowException, OSError) as error:
        say(f"the report could not be attached to the study's MLflow run ({error}); it is in {out}")


def print_answer(analysis: Analysis, sentences: Sequence[str]) -> None:
    """Print the answer and the ranking to stdout."""
    show(f"\nSensitivity of {analysis.data.name}\n")
    show("\n".join(f"  {sentence}" for sentence in sentences))
    show(f"\n  {'rank':<10}{'parameter':<22}{'effect (accuracy points)':<28}total Sobol index")
    for e in analysis.ranking.effects:
        show(f"  {rank_label(e, analysis):<10}{words(e.name):<22}{span(e.effect):<28}{span(e.total, 2)}")
    show("\n  total Sobol index: share of all differences in accuracy that a parameter makes, alone or with others")
    show("  dummy: a made-up parameter that does nothing; what it gets is error")
    for caution in cautions(analysis):
        show(f"\n  note: {caution}")


def cli() -> int:
    """Entry point."""
    load.quieten()
    # Matrices of a few hundred rows gain nothing from a second thread (25 s with one, 33 s with two on two idle cores),
    # and beside trials that train the threads wait for each other: 20 s of fitting became over 9 minutes.
    torch.set_num_threads(1)
    arguments = private_arguments()
    return main(parsed(lambda: tyro.cli(Args, args=arguments, description=__doc__)))
