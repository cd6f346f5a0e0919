"""The picture of a run: what its panels show, and that it never stops a run."""

from __future__ import annotations

import io
import math
import pathlib
import warnings
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.train.report import ExpertLoad, draw, write_report
from tests.model.tiny import CONFIG

LOAD = {
    "mtp_1": np.full(8, 1.0, np.float32),
    "mtp_0": np.arange(8, dtype=np.float32) / 3.5,
    "moe_layers": np.stack([np.ones(8), [8.0, *[0.0] * 7]]).astype(np.float32),
}
"""One dense layer below: layers 1 and 2, then two MTP depths."""


def row(step: int) -> dict[str, Any]:
    names = ("main_loss", "mtp_loss", "grad_norm", "max_violation", "learning_rate", "mfu", "mtp_acceptance")
    figures = {name: (i + 1) / (step + 9) for i, name in enumerate(names)}
    return {"step": step, "tokens": 64 * step**2, "batch_size": 8 * step, "tokens_per_second": 1000.0 + step, **figures}


def rows(count: int) -> list[dict[str, Any]]:
    return [row(step) for step in range(1, count + 1)]


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (axis for axis in figure.axes if title in axis.get_title())
    return found


def curves(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of every curve by its label, or "" of a lone one."""
    return {
        "" if str(line.get_label()).startswith("_") else str(line.get_label()): list(zip(*line.get_data(), strict=True))
        for line in axis.lines
    }


def rendered(figure: Figure) -> np.ndarray:
    """The pixels, drawn without a warning."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png", dpi=40)
    file.seek(0)
    return matplotlib.image.imread(file)


def test_every_panel_holds_its_curves_over_tokens() -> None:
    logged = rows(5)
    logged[1] |= {"heldout_loss": 3.0, "heldout_loss/code": 2.5, "heldout_loss/prose": 3.5}
    logged[4] |= {"heldout_loss": 2.0, "heldout_loss/code": 1.5, "heldout_loss/prose": 2.5}
    figure = draw(logged, LOAD, CONFIG)
    rendered(figure)

    def over_tokens(name: str) -> list[tuple[float, float]]:
        return [(row["tokens"], row[name]) for row in logged if name in row]

    assert curves(panel(figure, "cross entropy")) == {
        "next token": over_tokens("main_loss"),
        "MTP": over_tokens("mtp_loss"),
        "held-out": [(256, 3.0), (1600, 2.0)],
        "code": [(256, 2.5), (1600, 1.5)],
        "prose": [(256, 3.5), (1600, 2.5)],
    }
    for title, name in {
        "learning rate": "learning_rate",
        "gradient norm": "grad_norm",
        "tokens a second": "tokens_per_second",
        "violation": "max_violation",
        "drafts": "mtp_acceptance",
    }.items():
        assert curves(panel(figure, title)) == {"": over_tokens(name)}
    right = {axis.get_ylabel(): curves(axis) for axis in figure.axes if axis.yaxis.get_label_position() == "right"}
    assert right["sequences a step"] == {"": over_tokens("batch_size")}
    assert right["MFU"] == {"": over_tokens("mfu")}


def test_the_steps_stand_above_the_tokens_they_had_seen() -> None:
    """Batches grow, so halfway in tokens is not halfway in steps; beyond the rows the axis goes on."""
    figure = draw(rows(5), {}, CONFIG)
    rendered(figure)
    (top, *_) = panel(figure, "gradient").child_axes
    to_steps, to_tokens = top._functions
    np.testing.assert_allclose(to_steps([0, 64, 160, 256, 1600]), [0, 1, 1.5, 2, 5])
    assert to_steps(1600 + (1600 - 1024)) == pytest.approx(6)
    tokens = np.linspace(-100, 3000, 9)
    np.testing.assert_allclose(to_tokens(to_steps(tokens)), tokens)


def test_the_heat_map_has_a_row_for_every_layer_with_experts() -> None:
    figure = draw(rows(2), LOAD, CONFIG)
    rendered(figure)
    axis = panel(figure, "load of every expert")
    (image,) = axis.images
    np.testing.assert_array_equal(image.get_array(), [*LOAD["moe_layers"], LOAD["mtp_0"], LOAD["mtp_1"]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "MTP 1", "MTP 2"]
    assert list(axis.get_yticks()) == [0, 1, 2, 3]
    assert "highest 8)" in axis.get_title()
    # An even share is white.
    np.testing.assert_allclose(image.to_rgba(np.ones((1, 1)))[0, 0], 1, atol=0.05)


def test_of_many_layers_some_are_named_and_the_mtp_depth_always() -> None:
    load = {"moe_layers": np.ones((58, 256), np.float32), "mtp_0": np.ones(256, np.float32)}
    axis = panel(draw(rows(2), load, CONFIG), "load of every expert")
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:2] == ["1", "4"]
    assert names[-1] == "MTP 1"
    assert np.diff(axis.get_yticks()).min() >= 2


def test_a_model_of_experts_alone_in_its_mtp_depth() -> None:
    figure = draw(rows(2), {"mtp_0": LOAD["mtp_0"]}, CONFIG)
    rendered(figure)
    assert [label.get_text() for label in panel(figure, "load of").get_yticklabels()] == ["MTP 1"]


def test_what_rows_lack_is_not_drawn() -> None:
    """As in rows of an earlier version, or of a machine without known peaks."""
    logged = [{"step": 1, "tokens": 8, "main_loss": 2.0, "mtp_loss": 0.0}, {"step": 2, "main_loss": 1.0}, {"tokens": 9}]
    figure = draw(logged, {}, CONFIG)
    rendered(figure)
    assert curves(panel(figure, "cross entropy")) == {"next token": [(8, 2.0)]}
    assert panel(figure, "learning rate").get_title() == "learning rate"
    assert panel(figure, "tokens a second").get_title() == "tokens a second"
    assert [text.get_text() for text in panel(figure, "drafts").texts] == ["not measured"]
    assert not [axis for axis in figure.axes if "expert" in axis.get_xlabel()]


def test_names_are_no_formulas() -> None:
    logged = [{"step": 1, "tokens": 8, "heldout_loss/$a": 1.0, "heldout_loss/b^$": 2.0}]
    figure = draw(logged, {}, CONFIG, title="runs/$x_")
    rendered(figure)
    assert set(curves(panel(figure, "cross entropy"))) == {"$a", "b^$"}


@pytest.mark.parametrize("count", [0, 1, 40])  # Others are drawn above.
def test_any_number_of_rows_is_a_picture(count: int) -> None:
    assert rendered(draw(rows(count), LOAD, CONFIG)).shape[2] == 4


@pytest.mark.parametrize("values", [(3.4e38,), (1e-38, 1e30), (0.0, -1.0)])
def test_any_float32_can_be_drawn(values: tuple[float, ...]) -> None:
    logged = rows(4)
    for row, value in zip(logged[2:], values, strict=False):
        row |= {name: value for name in row if name not in ("step", "tokens")}
    rendered(draw(logged, {"moe_layers": np.array([[3.4e38, 0.0]], np.float32)}, CONFIG))


def test_what_is_no_number_leaves_a_gap() -> None:
    logged = rows(4)
    logged[1]["grad_norm"], logged[2]["grad_norm"], logged[3]["grad_norm"] = math.nan, math.inf, None
    assert curves(panel(draw(logged, {}, CONFIG), "gradient")) == {"": [(64, logged[0]["grad_norm"])]}


def test_a_peak_does_not_flatten_the_rest() -> None:
    logged = rows(9)
    assert panel(draw(logged, {}, CONFIG), "gradient").get_yscale() == "linear"
    logged[4]["grad_norm"] = 100.0
    assert panel(draw(logged, {}, CONFIG), "gradient").get_yscale() == "log"


# --- Into the run directory ----------------------------------------------------------------------------------------------


def test_the_report_of_a_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(str(tmp_path))
    write_report(run, rows(3), CONFIG)
    flat = matplotlib.image.imread(str(run.report_file)).shape
    assert flat == (900, 1800, 4)
    load = ExpertLoad(run)
    load.accumulate(LOAD)
    load.write()
    write_report(run, rows(3), CONFIG)
    assert matplotlib.image.imread(str(run.report_file)).shape[0] > flat[0]
    assert {path.name for path in tmp_path.iterdir()} == {"report.png", "expert_load.npz"}
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_does_not_end_a_trained_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(str(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(run.path), "write_bytes", fail)
    write_report(run, rows(3), CONFIG)
    assert capsys.readouterr().err == f"warning: {tmp_path}/report.png is not drawn: OSError: No space left on device\n"


def test_nor_does_a_damaged_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(str(tmp_path))
    run.expert_load_file.write_bytes(b"not an archive")
    write_report(run, rows(3), CONFIG)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"warning: {tmp_path}/report.png is not drawn: ValueError: {tmp_path}/expert_load.npz cannot be read" in line
