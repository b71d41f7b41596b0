from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import sensitivity, training
from benchmarks.plain_ram import PlainTrainer, Retina
from benchmarks.truths import TRUTHS, Facts, origins_of, study_of
from ramcore import retina
from ramcore.config import Config


def test_plain_retina_equals_our_retina():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 60, 60, generator=generator)
    location = torch.rand(20, 2, generator=generator) * 2 - 1
    ours = retina.Retina(patch_size=12, num_scales=3, canvas_size=60).see(images, location).flatten(1)
    torch.testing.assert_close(Retina(12, 3, 2).foveate(images[:, None], location), ours)


def test_plain_ram_learns_to_classify_brightness():
    torch.manual_seed(0)
    config = dataclasses.replace(Config(), hidden_size=64, glimpse_size=32, learning_rate=3e-3, task="original")
    labels = torch.arange(40) % 10
    images = (labels / 9)[:, None, None, None].expand(-1, 1, 28, 28)  # the brighter, the higher the class
    trainer = PlainTrainer(config)
    accuracies = [trainer.step(images, labels).item() for _ in range(300)]
    assert sum(accuracies[:10]) / 10 < 0.35
    assert sum(accuracies[-10:]) / 10 > 0.6


def test_quick_benchmark_prints_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(
        training.CONFIG, hidden_size=16, glimpse_size=8, patch_size=4, num_glimpses=2, batch_size=10
    )
    monkeypatch.setattr(training, "CONFIG", small)
    threads = torch.get_num_threads()
    try:
        result = training.main(["--quick", "--out", str(tmp_path / "figures" / "cpu.json")])
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "figures" / "cpu.json").read_text()) == result
    assert result["steps"][training.PLAIN]["times_plain"] == 1
    assert result["set_up_seconds"] < 1
    assert "ramcore, 8 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("name", TRUTHS)
def test_null_parameters_of_a_truth_do_nothing_and_its_study_is_a_search(name: str) -> None:
    truth = TRUTHS[name]
    facts = Facts(truth)
    assert set(facts.effect) == set(truth.space.names)
    assert [facts.effect[n] for n in truth.null] == pytest.approx([0] * len(truth.null), abs=1e-9)
    assert [facts.total[n] for n in truth.null] == pytest.approx([0] * len(truth.null), abs=1e-9)
    assert not set(facts.live) & set(truth.null)
    study = study_of(truth, 0, origins=origins_of(truth, 24))
    assert set(study.trials["origin"]) == {"published", "sobol", "tpe"}
    assert (study.trials.loc[study.trials["origin"] != "tpe", "state"] == "complete").all()
    assert study.epochs["val_accuracy"].between(0, 1).all()


@pytest.mark.parametrize("ways", [(), ("many", "few")])
def test_made_up_studies_that_a_table_has_already_are_not_made_again(ways, tmp_path, monkeypatch):
    made = []

    def job(truth, study, trials=None):
        made.append((truth, study, trials))
        return {"truth": truth, "study": float(study)} | ({} if trials is None else {"trials": trials})

    def jobs(studies):
        return [("steps", study, *way) for study in range(studies) for way in ([(w,) for w in ways] or [()])]

    monkeypatch.setattr(sensitivity, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    out = tmp_path / "rows.csv"
    for studies in (1, 2, 2):
        assert list(sensitivity.tried(job, jobs(studies), 1, out)["study"]) == [float(j[1]) for j in jobs(studies)]
    assert len(made) == len(set(made)) == len(jobs(2))
