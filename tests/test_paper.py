"""The published tables beside ours, and the paper's figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import paper
from analysis.load import StudyData
from ramcore.config import Config
from ramcore.evaluation import build_model
from ramcore.sources import load_task
from tests.synthetic import RAM_DIMENSIONS, Synthetic, ram_truth, simulate, write_mlflow


@pytest.fixture(scope="module")
def records() -> StudyData:
    """Two rows of the case study: one tested on three seeds, one still running; and one Mnih row by configuration."""
    made = simulate(Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=2, epochs=2, seeds=3))
    trials = made.trials.assign(
        origin="paper",
        task="translated",
        model="ram",
        data="digits",
        epochs=2,
        num_glimpses=[6, 8],
        patch_size=12,
        num_scales=3,
        state=["complete", "running"],
        test_accuracies=[(0.90, 0.92, 0.94), ()],
        test_accuracy=[0.92, np.nan],
    )
    return made._replace(trials=trials)


SIX, EIGHT = ("translated", "RAM, 6 glimpses, 12x12, 3 scales"), ("translated", "RAM, 8 glimpses, 12x12, 3 scales")


def case_study(table: list[paper.TableRow], task: str, model: str) -> paper.TableRow:
    """The case study's row of a network."""
    return next(row for row in table if row[:3] == (paper.CASE_STUDY, task, model))


def test_measured_row_stands_beside_the_published_one_with_interval_and_seeds(records: StudyData) -> None:
    table = paper.paper_table([records])
    at = [i for i, row in enumerate(table) if (row.task, row.model) == SIX]
    assert [table[i].published for i in at] == [94.35, 98.78], "the case study's and Mnih's"
    assert [table[i].note for i in at] == ["", "not run yet"], "Mnih's rows want the tuned recipe"
    again = paper.paper_table([records._replace(trials=records.trials.assign(origin="mnih"))])
    assert [again[i].note for i in at] == ["not run yet", ""]
    for one in (table[at[0]], again[at[1]]):
        assert one.ours == pytest.approx(92.0)
        half = 2.92 * 2.0 / np.sqrt(3)  # t quantile 0.95, 2 degrees of freedom
        assert one.high - one.ours == pytest.approx(half, rel=1e-3)
        assert one.seeds == 3
        assert one.data == "digits"


def test_row_that_was_not_run_says_so(records: StudyData) -> None:
    table = paper.paper_table([records])
    assert case_study(table, "cluttered", "CNN").note == "not run yet"
    assert case_study(table, *EIGHT).note == "running"
    text = paper.markdown(table, paper.comparison_table([records]), paper.ablation_table([records]))
    assert "| translated | RAM, 6 glimpses, 12x12, 3 scales | 94.35 | 92.00 (88.63 to 95.37) | 3 | digits, 2 |" in text
    assert "not run yet" in text


def test_ablation_gives_the_change_of_each_choice_with_its_interval(records: StudyData) -> None:
    trials = records.trials.assign(origin="ablation", row=["tuned", "tuned but core=rnn"])
    trials["test_accuracies"] = [(0.95, 0.97), (0.91, 0.91)]
    table = paper.ablation_table([records._replace(trials=trials)])
    tuned, changed = table
    assert (tuned.row, changed.row) == ("tuned", "tuned but core=rnn")
    assert changed.change == pytest.approx(-5.0)
    assert changed.change_high == pytest.approx(-5 + 6.314, abs=0.01), "Welch: all variance is the tuned row's"
    assert tuned.low == pytest.approx(96 - 6.314 * 1.0, abs=0.01)  # t quantile 0.95, one degree of freedom
    text = paper.markdown(paper.paper_table([]), paper.comparison_table([]), table)
    assert "| translated | tuned but core=rnn | 91.00 (91.00 to 91.00) | -5.00 (-11.31 to +1.31) | 2 | 2 |" in text


def test_rows_that_differ_in_one_size_alone_are_compared(records: StudyData) -> None:
    assert paper.comparison_table([records]) == [], "8 glimpses are not tested yet"
    tested = records._replace(trials=records.trials.assign(test_accuracies=[(0.90, 0.92, 0.94), (0.92, 0.94, 0.96)]))
    [change] = paper.comparison_table([tested])
    assert change[:3] == (paper.CASE_STUDY, "translated", "glimpses")
    assert change.published == pytest.approx(92.52 - 94.35) and change.change == pytest.approx(2.0)
    assert change.high - 2 == pytest.approx(2.132 * 2 * np.sqrt(2 / 3), rel=1e-3)  # t quantile 0.95, 4 degrees
    twelve = records.trials.assign(num_glimpses=6, patch_size=[8, 16], test_accuracies=[(0.8, 0.81), (0.9, 0.91)])
    assert paper.comparison_table([records._replace(trials=twelve)]) == [], "12x12 lies between and was not run"
    unlike = tested._replace(trials=tested.trials.assign(epochs=[2, 3]))
    assert paper.comparison_table([unlike]) == [], "more than a size differs"


def test_seed_without_an_accuracy_is_left_out(records: StudyData) -> None:
    trials = records.trials.assign(test_accuracies=[(0.90, np.nan, 0.94), (np.nan, np.nan)], state="complete")
    table = paper.paper_table([records._replace(trials=trials)])
    assert case_study(table, *SIX).ours == pytest.approx(92)
    assert case_study(table, *EIGHT).note == "not tested"
    both = trials.assign(test_accuracies=[(0.90, np.nan, 0.94), (0.92, 0.96, np.nan)])
    [change] = paper.comparison_table([records._replace(trials=both)])
    assert change.change == pytest.approx(2.0) and change.low < 2 < change.high


def test_table_figure_draws_published_and_own_accuracy_of_every_row(records: StudyData) -> None:
    table = paper.paper_table([records])[:5]
    ax = paper.table_figure(table)
    lines = [np.asarray(line.get_data(), dtype=float).T.tolist() for line in ax.lines[: 3 * len(table)]]
    assert lines[::3] == [[[row.published, y]] for y, row in enumerate(table)]
    at = next(y for y, row in enumerate(table) if row.seeds == 3)
    assert lines[3 * at + 1] == [[table[at].low, at], [table[at].high, at]]
    assert lines[3 * at + 2] == [[table[at].ours, at]]
    assert ax.lines[3 * at + 2].get_markerfacecolor() == "none", "open: not on MNIST"
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{row.task}: {row.model}" for row in table]
    assert "ours, not on MNIST" in ax.get_legend_handles_labels()[1]


def test_published_numbers_equal_the_papers() -> None:
    case = [p for p in paper.PUBLISHED if p.source == paper.CASE_STUDY]
    assert [p.accuracy for p in case] == [
        96.66, 79.98, 81.22, 94.35, 92.52, 96.87, 93.50, 85.65, 85.11, 86.07, 91.26, 93.01,
    ]  # fmt: skip
    mnih = {
        (p.task, p.glimpses, p.model): round(100 - p.accuracy, 2) for p in paper.PUBLISHED if p.source == paper.MNIH
    }
    assert mnih["translated", 8, "ram"] == 1.20
    assert mnih["cluttered", 8, "ram-random"] == 14.4
    assert mnih["cluttered-100", 8, "ram"] == 8.11
    assert mnih["original", 7, "ram"] == 1.07


def test_pictures_show_every_task_and_a_networks_glimpses(tmp_path: Path) -> None:
    config = Config(data="digits", task="translated", num_glimpses=2, patch_size=8, num_scales=2, hidden_size=16)
    weights = {k: v.detach() for k, v in build_model(config, torch.zeros(1, dtype=torch.int64)).state_dict().items()}
    said = paper.draw_pictures(tmp_path, paper.SavedModel("made up", config, weights), "digits", None)
    assert said == "glimpses of the best model of made up"
    for name in ("samples.png", "glimpses.png", "glimpses.gif"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert (tmp_path / "glimpses.gif").read_bytes().startswith(b"GIF89a")
    assert load_task(config).sizes["test"] > 4
    assert "no glimpses are drawn" in paper.draw_pictures(tmp_path, None, "digits", None)


def test_command_writes_tables_and_figures_and_refuses_an_unknown_study(
    records: StudyData, tmp_path: Path, empty_database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_mlflow(records, uri, artifacts=tmp_path / "artifacts", params={"design": "paper"})
    assert paper.main(paper.Args(tracking_uri=uri, out=tmp_path / "out")) == 0
    assert "92.00 (88.63 to 95.37)" in capfd.readouterr().out
    for name in ("table.md", "table.csv", "table.png", "table.svg", "samples.png"):
        assert (tmp_path / "out" / name).is_file(), name
    assert paper.main(paper.Args(tracking_uri=uri, study="nope", out=tmp_path / "out")) == 2
    assert "There is: " in capfd.readouterr().err


def test_finished_row_is_not_hidden_by_newer_unfinished_ones(records: StudyData) -> None:
    trials = records.trials.assign(data="mnist", epochs=100)
    restarted = records.trials.assign(test_accuracies=[(), ()], state="running")
    smoke = records.trials.assign(data="digits", test_accuracies=[(0.5, 0.5), ()])
    untold = records.trials.assign(epochs=np.nan, num_glimpses=np.nan)
    newest_first = [records._replace(trials=t) for t in (restarted, smoke, untold, trials)]
    table = paper.paper_table(newest_first)
    row = case_study(table, *SIX)
    assert row.ours == pytest.approx(92.0) and row.epochs == 100 and row.data == "mnist"
    assert case_study(table, *EIGHT).note == "running"
