import json
import math
import struct
from pathlib import Path

import pytest

from megamod.errors import UserError
from megamod.evaluation import plots


def size_of(png: Path) -> tuple[int, int]:
    """Width and height that the file's header promises, in pixels."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, still open after they were saved."""
    pyplot = plots.import_pyplot()
    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


def clipped(figure) -> list[str]:
    """Texts that stick out of the picture."""
    from matplotlib.text import Text

    renderer, box = figure.canvas.get_renderer(), figure.bbox
    result = []
    for text in figure.findobj(Text):
        if (
            text.get_visible() and text.get_text() and text.axes is not None
        ) or text.figure is None:
            extent = text.get_window_extent(renderer)
            if extent.x0 < -1 or extent.y0 < -1 or extent.x1 > box.x1 + 1 or extent.y1 > box.y1 + 1:
                result.append(text.get_text())
    return result


def write_metrics(path: Path) -> list[dict]:
    records = []
    for step in (10, 20, 30):
        losses = {"law": 5.0 - step / 10, "code": 6.0 - step / 10}
        if step == 20:
            del losses["code"]
        records.append({"step": step, "loss": 5.5 - step / 10, "loss_by_domain": losses})
    records.append({"step": 30, "split": "valid", "perplexity": {"law": 20.0, "code": 40.0}})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_damaged_lines_of_the_metrics_are_skipped(tmp_path):
    records = write_metrics(tmp_path / "metrics.jsonl")
    assert plots.read_metrics(tmp_path / "metrics.jsonl") == records
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')
    assert plots.read_metrics(tmp_path / "metrics.jsonl") == records
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\n{}\n[1]\n\xff\xfe\n{"step": "4"}\n')
    assert plots.read_metrics(tmp_path / "metrics.jsonl") == records
    with pytest.raises(UserError, match="no such metrics file"):
        plots.read_metrics(tmp_path / "none.jsonl")


def test_curves_show_the_numbers_of_the_file(tmp_path, figures):
    write_metrics(tmp_path / "metrics.jsonl")
    plots.plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (figure,) = figures
    left, right = figure.axes
    lines = [[tuple(map(float, point)) for point in line.get_xydata()] for line in left.lines]
    assert lines == [
        [(10, 4.5), (20, 3.5), (30, 2.5)],
        [(10, 4.0), (20, 3.0), (30, 2.0)],
        [(10, 5.0), (30, 3.0)],
    ]
    assert [line.get_xydata().tolist() for line in right.lines] == [[[30, 20]], [[30, 40]]]
    assert right.get_ylabel() == "valid perplexity (log scale)" and right.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "law",
        "code",
        "all domains",
    ]
    assert left.lines[1].get_color() == right.lines[0].get_color()
    assert clipped(figure) == []
    assert size_of(tmp_path / "loss.png") == (1440, 504)


def test_a_curve_of_one_point_can_be_seen(tmp_path, figures):
    record = {"step": 4, "loss": 2.0, "loss_by_domain": {"law": 1.0, "code": 3.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plots.plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    left = figures[0].axes[0]
    assert [line.get_marker() for line in left.lines] == ["o", "o", "o"]
    first, last = left.get_xlim()
    assert [tick for tick in left.get_xticks() if first < tick < last] == [4]


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    plots.plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert size_of(tmp_path / "loss.png") == (1440, 504)


def test_many_domains_keep_their_colours_apart():
    pyplot = plots.import_pyplot()
    for count in (1, 8, 16, 30):
        assert len(set(plots.select_colours(pyplot, count))) == count


def test_heat_map_colours_are_ratios_to_the_best(tmp_path, figures):
    matrix = {"law": {"law": 10.0, "code": 60.0}, "code": {"law": 15.0, "code": 20.0}}
    plots.plot_matrix(matrix, tmp_path / "m.png", "test perplexity")
    (figure,) = figures
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[1.0, 3.0], [1.5, 1.0]]
    assert axes.images[0].get_clim() == (1.0, 3.0)
    assert [text.get_text() for text in axes.texts] == ["10.0", "60.0", "15.0", "20.0"]
    assert [text.get_fontweight() for text in axes.texts] == ["bold", "normal", "normal", "bold"]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "black", "black"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["law", "code"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["law", "code"]
    assert clipped(figure) == []


def test_heat_map_of_sixteen_long_names_is_whole(tmp_path, figures):
    names = [f"anonymized_domain_{number}" for number in range(16)]
    matrix = {
        first: {other: 10.0 * (1 + (first != other)) for other in names} | {"x": 99_999.0}
        for first in names
    }
    plots.plot_matrix(matrix, tmp_path / "m.png", "test perplexity after 300000 steps")
    assert clipped(figures[0]) == []
    width, height = size_of(tmp_path / "m.png")
    assert 1800 < width < 2600 and 900 < height < 1600


def test_heat_map_with_gaps_and_numbers_beyond_all_measure(tmp_path, figures):
    matrix = {"a": {"x": 2.0, "y": math.inf}, "b": {"y": 3.0}}
    assert plots.compute_ratios_to_best(matrix, ["x", "y"])[0] == [1.0, math.inf]
    assert math.isnan(plots.compute_ratios_to_best(matrix, ["x", "y"])[1][0])
    plots.plot_matrix(matrix, tmp_path / "m.png", "t")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["2.0", "inf", "–", "3.0"]
    assert figures[0].axes[0].images[0].get_clim() == (1.0, 1.05)


def test_one_bad_cell_does_not_wash_out_the_others(tmp_path, figures):
    """The scale ends at the 90th percentile."""
    matrix = {str(row): {str(c): 10.0 + row for c in range(5)} for row in range(4)}
    matrix["3"]["4"] = 1e6
    plots.plot_matrix(matrix, tmp_path / "m.png", "t")
    assert figures[0].axes[0].images[0].get_clim() == pytest.approx((1.0, 1.3))


def test_score_against_throughput_has_a_panel_per_task_and_a_point_per_N(tmp_path, figures):
    tasks = {
        f"task-{number}": {
            "plain": {1: (4.0, 0.9)},
            "mux": {10: (38.5, 0.7 + number / 100), 2: (8.5, 0.8)},
        }
        for number in range(4)
    }
    plots.plot_trade_off(tasks, tmp_path / "trade_off.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == list(tasks)
    for number, axes in enumerate(figure.axes):
        plain, mux = axes.lines
        assert plain.get_xydata().tolist() == [[4.0, 0.9]]
        assert mux.get_xydata().tolist() == [[8.5, 0.8], [38.5, 0.7 + number / 100]]
        assert [text.get_text() for text in axes.texts] == ["N = 1", "N = 2", "N = 10"]
        assert axes.get_xscale() == "log"
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "mux"]
    assert legend.legend_handles[1].get_color() == figure.axes[3].lines[1].get_color()
    assert not clipped(figure)
    assert size_of(tmp_path / "trade_off.png")[0] > 1000
