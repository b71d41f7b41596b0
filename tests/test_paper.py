"""The published tables beside ours, and the paper's figures."""

from __future__ import annotations

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


def test_ours_stands_beside_theirs_with_interval_and_seeds(records: StudyData) -> None:
    table = paper.paper_table([records])
    row = table[(table["task"] == "translated") & (table["model"] == "RAM, 6 glimpses, 12x12, 3 scales")]
    assert list(row["published"]) == [94.35, 98.78], "the case study's and Mnih's"
    assert list(row["note"]) == ["", "not run yet"], "Mnih's rows want the tuned recipe"
    again = paper.paper_table([records._replace(trials=records.trials.assign(origin="mnih"))]).loc[row.index]
    assert list(again["note"]) == ["not run yet", ""]
    for one in (row.iloc[0], again.iloc[1]):
        assert one["ours"] == pytest.approx(92.0)
        half = 2.92 * 2.0 / np.sqrt(3)  # t quantile 0.95, 2 degrees of freedom
        assert one["high"] - one["ours"] == pytest.approx(half, rel=1e-3)
        assert one["seeds"] == 3
        assert one["data"] == "digits"


def test_a_row_not_run_says_so(records: StudyData) -> None:
    table = paper.paper_table([records]).set_index(["source", "task", "model"])["note"]
    assert table[paper.CASE_STUDY, "cluttered", "CNN"] == "not run yet"
    assert table[paper.CASE_STUDY, "translated", "RAM, 8 glimpses, 12x12, 3 scales"] == "running"
    text = paper.markdown(
        paper.paper_table([records]), paper.comparison_table([records]), paper.ablation_table([records])
    )
    assert "| translated | RAM, 6 glimpses, 12x12, 3 scales | 94.35 | 92.00 (88.63 to 95.37) | 3 | digits, 2 |" in text
    assert "not run yet" in text


def test_an_ablation_says_what_each_choice_is_worth(records: StudyData) -> None:
    trials = records.trials.assign(origin="ablation", row=["tuned", "tuned but core=rnn"])
    trials["test_accuracies"] = [(0.95, 0.97), (0.91, 0.91)]
    table = paper.ablation_table([records._replace(trials=trials)]).set_index("row")
    taken_back = table.loc["tuned but core=rnn"]
    assert taken_back["change"] == pytest.approx(-5.0)
    assert taken_back["change_high"] == pytest.approx(-5 + 6.314, abs=0.01), "Welch: all variance is the tuned row's"
    assert table.at["tuned", "low"] == pytest.approx(
        96 - 6.314 * 1.0, abs=0.01
    )  # t quantile 0.95, one degree of freedom
    text = paper.markdown(paper.paper_table([]), paper.comparison_table([]), table.reset_index())
    assert "| translated | tuned but core=rnn | 91.00 (91.00 to 91.00) | -5.00 (-11.31 to +1.31) | 2 | 2 |" in text


def test_the_change_by_one_size_stands_beside_the_published_one(records: StudyData) -> None:
    assert paper.comparison_table([records]).empty, "8 glimpses are not tested yet"
    tested = records._replace(trials=records.trials.assign(test_accuracies=[(0.90, 0.92, 0.94), (0.92, 0.94, 0.96)]))
    change = paper.comparison_table([tested]).squeeze()
    assert (change["source"], change["task"], change["size"]) == (paper.CASE_STUDY, "translated", "glimpses")
    assert change["published"] == pytest.approx(92.52 - 94.35) and change["change"] == pytest.approx(2.0)
    assert change["high"] - 2 == pytest.approx(2.132 * 2 * np.sqrt(2 / 3), rel=1e-3)  # t quantile 0.95, 4 degrees
    twelve = records.trials.assign(num_glimpses=6, patch_size=[8, 16], test_accuracies=[(0.8, 0.81), (0.9, 0.91)])
    assert paper.comparison_table([records._replace(trials=twelve)]).empty, "12x12 lies between and was not run"
    unlike = tested._replace(trials=tested.trials.assign(epochs=[2, 3]))
    assert paper.comparison_table([unlike]).empty, "more than a size differs"


def test_a_seed_without_an_accuracy_is_left_out(records: StudyData) -> None:
    trials = records.trials.assign(test_accuracies=[(0.90, np.nan, 0.94), (np.nan, np.nan)], state="complete")
    table = paper.paper_table([records._replace(trials=trials)]).set_index(["source", "task", "model"])
    assert table.loc[(paper.CASE_STUDY, "translated", "RAM, 6 glimpses, 12x12, 3 scales"), "ours"] == pytest.approx(92)
    assert table.loc[(paper.CASE_STUDY, "translated", "RAM, 8 glimpses, 12x12, 3 scales"), "note"] == "not tested"
    both = trials.assign(test_accuracies=[(0.90, np.nan, 0.94), (0.92, 0.96, np.nan)])
    change = paper.comparison_table([records._replace(trials=both)]).squeeze()
    assert change["change"] == pytest.approx(2.0) and change["low"] < 2 < change["high"]


def test_published_numbers_are_those_of_the_papers() -> None:
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


def test_pictures_of_every_task_and_of_a_network_looking(tmp_path: Path) -> None:
    config = Config(data="digits", task="translated", num_glimpses=2, patch_size=8, num_scales=2, hidden_size=16)
    weights = {k: v.detach() for k, v in build_model(config, torch.zeros(1, dtype=torch.int64)).state_dict().items()}
    said = paper.draw_pictures(tmp_path, paper.SavedModel("made up", config, weights), "digits", None)
    assert said == ["glimpses of the best model of made up"]
    for name in ("samples.png", "glimpses.png", "glimpses.gif"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert (tmp_path / "glimpses.gif").read_bytes().startswith(b"GIF89a")
    assert load_task(config).sizes["test"] > 4
    assert "no glimpses are drawn" in paper.draw_pictures(tmp_path, None, "digits", None)[0]


def test_the_command_writes_tables_and_figures(
    records: StudyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_mlflow(records, uri, artifacts=tmp_path / "artifacts", params={"design": "paper"})
    assert paper.main(paper.Args(tracking_uri=uri, out=tmp_path / "out")) == 0
    assert "92.00 (88.63 to 95.37)" in capfd.readouterr().out
    for name in ("table.md", "table.csv", "table.png", "table.svg", "samples.png"):
        assert (tmp_path / "out" / name).is_file(), name
    assert paper.main(paper.Args(tracking_uri=uri, study="nope", out=tmp_path / "out")) == 2
    assert "There is: " in capfd.readouterr().err


def test_finished_rows_are_not_hidden_by_newer_ones(records: StudyData) -> None:
    trials = records.trials.assign(data="mnist", epochs=100)
    restarted = records.trials.assign(test_accuracies=[(), ()], state="running")
    smoke = records.trials.assign(data="digits", test_accuracies=[(0.5, 0.5), ()])
    untold = records.trials.assign(epochs=np.nan, num_glimpses=np.nan)
    newest_first = [records._replace(trials=t) for t in (restarted, smoke, untold, trials)]
    table = paper.paper_table(newest_first).set_index(["source", "task", "model"])
    row = table.loc[(paper.CASE_STUDY, "translated", "RAM, 6 glimpses, 12x12, 3 scales")]
    assert row["ours"] == pytest.approx(92.0) and row["epochs"] == 100 and row["data"] == "mnist"
    assert table.loc[(paper.CASE_STUDY, "translated", "RAM, 8 glimpses, 12x12, 3 scales"), "note"] == "running"
