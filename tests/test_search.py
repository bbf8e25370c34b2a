"""`hydra/sweeper=optuna`: what it asks and tells, whether it goes on, and what its page shows."""

import sys
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="pip install 'qat[sweep]'")

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

import train  # noqa: E402
from hydra_plugins.qat_sweeps.optuna_sweeper import Dimension, literal  # noqa: E402
from qat.analysis.search import is_down, objective_values, read_study, study_figures  # noqa: E402

CONF = Path(__file__).parents[1] / "conf"
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "callbacks=quiet", "export=int8",
         "export.fresh_process=false", "model.width=4", "report.sensitivity.max_seconds=0")  # fmt: skip


def search(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Run a search in this process, in the directory `search` of `folder`."""
    monkeypatch.chdir(folder)
    command = ["train.py", "--config-path", str(CONF), "-m", "hydra/sweeper=optuna", "sweep=search", *overrides, *QUICK]
    monkeypatch.setattr(sys, "argv", command)
    train.main()


def states(folder: Path) -> list[str]:
    study = optuna.load_study(study_name="qat", storage=f"sqlite:///{folder}/multirun/search/study.db")
    return [trial.state.name for trial in study.trials]


def test_a_search_over_bits_of_layers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objectives, one trial; another is left behind by a process that was killed; then three in all."""
    space = ("hydra.sweeper.optimize=[accuracy,bytes]", "hydra.sweeper.layers.bits=[2,8]",
             "hydra.sweeper.layers.match=block.*", "qat.lr=tag(log,interval(1e-4,1e-2))")  # fmt: skip
    search(tmp_path, monkeypatch, *space, "hydra.sweeper.n_trials=1")
    folder = tmp_path / "multirun" / "search"
    assert states(tmp_path) == ["COMPLETE"]
    study = optuna.load_study(study_name="qat", storage=f"sqlite:///{folder}/study.db")
    asked = study.ask(study.trials[0].distributions)
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]
    kept = (folder / "0" / "summary.json").stat().st_mtime_ns
    search(tmp_path, monkeypatch, *space, "hydra.sweeper.n_trials=3")
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "COMPLETE"]
    assert f"qat.lr={asked.params['qat.lr']}" in (folder / "1" / ".hydra" / "overrides.yaml").read_text()
    assert (folder / "0" / "summary.json").stat().st_mtime_ns == kept
    assert sorted(path.name for path in folder.glob("*/summary.json")) == ["summary.json"] * 3

    study = optuna.load_study(study_name="qat", storage=f"sqlite:///{folder}/study.db")
    for trial in study.trials:
        assert set(trial.params) == {"block.conv1 bits", "block.conv2 bits", "qat.lr"}
        assert trial.values == objective_values(folder / str(trial.number), ["accuracy", "bytes"])
        text = (folder / str(trial.number) / "report.txt").read_text()
        for layer in ("block.conv1", "block.conv2"):
            [line] = [line for line in text.splitlines() if line.startswith(layer) and "QuantConv2d" in line]
            assert f"int{trial.params[f'{layer} bits']} " in line

    read = read_study(folder)
    assert read is not None
    assert read[:2] == (["accuracy", "bytes"], [False, True])
    titles = [title for title, _, _ in study_figures(folder)[0]]
    assert {"Optimization history", "Pareto front", "Parallel coordinates", "Slices"} <= set(titles)
    page = (folder / "leaderboard.html").read_text()
    assert page.count("<svg") == 1 + len(titles)
    assert len(page) < 1_000_000


def test_a_failed_trial_does_not_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ("data.batch_size=choice(0,256)", "hydra.sweeper.n_trials=2", "hydra.sweeper.prune=false",
             "hydra.sweeper.sampler._target_=optuna.samplers.GridSampler", "~hydra.sweeper.sampler.n_startup_trials",
             "+hydra.sweeper.sampler.search_space={data.batch_size: [0, 256]}")  # fmt: skip
    with pytest.raises(SystemExit):  # as any sweep in which a job failed
        search(tmp_path, monkeypatch, *space)
    assert sorted(states(tmp_path)) == ["COMPLETE", "FAIL"]


def test_a_hopeless_trial_is_pruned_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ("qat.lr=interval(1e-4,1e-2)", "hydra.sweeper.n_trials=1", "+hydra.sweeper.pruner.lower=2.0",
             "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
             "~hydra.sweeper.pruner.n_startup_trials")  # fmt: skip
    search(tmp_path, monkeypatch, *space)
    folder = tmp_path / "multirun" / "search"
    assert states(tmp_path) == ["PRUNED"]
    assert "after epoch 1" in (folder / "0" / "pruned.txt").read_text()
    assert not (folder / "0" / "error.txt").exists()
    assert "pruned" in (folder / "results.csv").read_text()


def test_a_dimension_of_each_kind() -> None:
    lines = ["a=choice(2,x,0.5)", "b=range(1,9,2)", "c=tag(log,interval(1e-4,1e-2))", "d=int(interval(1,4))", "e=4,8"]
    a, b, c, d, e = (Dimension(override) for override in OverridesParser.create().parse_overrides(lines))
    assert a.distribution() == CategoricalDistribution([2, "x", 0.5])
    assert (a.text(2), a.text("x"), c.text(0.001)) == ("2", "x", "0.001")
    assert b.distribution() == IntDistribution(1, 7, step=2)
    assert c.distribution() == FloatDistribution(1e-4, 1e-2, log=True)
    assert d.distribution() == IntDistribution(1, 4)
    assert e.distribution() == CategoricalDistribution([4, 8])


def test_rules_in_the_grammar_of_overrides() -> None:
    rules = [{"match": "it's", "weight": {"bits": None, "narrow_range": True, "lr": 1e-05}}]
    [override] = OverridesParser.create().parse_overrides([f"x={literal(rules)}"])
    value = override.value()
    assert isinstance(value, list)
    assert value[0]["weight"] == rules[0]["weight"]
    assert value[0]["match"] == "it's"


def test_directions_are_those_of_the_metrics() -> None:
    metrics = {"accuracy": True, "bits": False, "wer": None}
    assert [is_down(name, metrics) for name in ("accuracy", "bits", "wer", "bytes")] == [False, True, True, True]
    with pytest.raises(ValueError, match=r"'size' is not known .valid: accuracy, bits, wer, bytes, latency_ms"):
        is_down("size", metrics)
