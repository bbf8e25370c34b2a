"""What a run says while it trains: on a terminal, in a log, and of warnings."""

import io
import logging
import re
import warnings
from typing import Any

import pytest
from rich.console import Console

from qat.training import Progress, QATSchedule
from qat.training.once import warnings_once
from tests.training.test_module_checkpoints import digits, module_of, trainer_of

NUMBER = r"\d+\.\d\d %"


def run(progress: Progress) -> None:
    module = module_of("int8")
    module.float_metrics = {"accuracy": 0.875}
    schedule = QATSchedule(freeze_ranges_at=0.5, freeze_batch_norm_at=0.5)
    trainer_of(schedule, progress, epochs=2, enable_progress_bar=True).fit(module, datamodule=digits())


def test_without_a_terminal_a_line_now_and_then(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, logger="qat"):
        run(Progress("qat", {"float": 3, "qat": 2}, every_seconds=0.0))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qat.training")]
    assert "step 5 of 10: ranges and BatchNorm statistics frozen" in said
    assert re.fullmatch(rf"QAT frozen: epoch 2/2, 0:00 left, accuracy {NUMBER} \(float 87\.50 %\), loss \S+", said[-1])
    assert any(line.startswith("QAT quantized: epoch 1/2, ") for line in said)
    assert "━" not in capfd.readouterr().out


def test_lines_keep_their_distance(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qat"):
        run(Progress("qat", every_seconds=1000.0))
    assert [r.getMessage().partition(",")[0] for r in caplog.records if "QAT " in r.getMessage()] == [
        "QAT frozen: epoch 2/2"
    ]


def test_a_bar_on_a_terminal() -> None:
    """The float phase tells the time of the run, too: twice as many epochs are still to come."""
    progress, screen = Progress("float", {"float": 2, "qat": 4}), io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=160)
    trainer_of(progress, epochs=2, enable_progress_bar=True).fit(module_of(None), datamodule=digits())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "10/10" in text
    last = text.rsplit("float ", 1)[1]
    assert re.search(rf"epoch \d/2, 0:00 left.*, accuracy {NUMBER}, loss", last)
    assert "(float" not in text  # this is it


def test_a_warning_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qat"), warnings_once():
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn("use more workers", UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [r.getMessage() for r in caplog.records] == ["UserWarning: use more workers", "UserWarning: another"]
