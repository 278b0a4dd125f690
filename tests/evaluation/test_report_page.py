"""The page about runs in a real browser: every figure is drawn, nothing is loaded or cut off."""

import pytest
from browser import SIZE, count_colours, list_errors, list_overflowing
from evaluation.test_run_report import make_run, make_studies

from megamod.evaluation.run_report import write_run_report

NARROW = 420  # pixels, a telephone


@pytest.fixture
def page(tmp_path):
    """Address of a page about runs of every kind."""
    runs = [make_run(tmp_path / n, rate=r, loads=True) for n, r in (("one", 0.1), ("two", 0.2))]
    write_run_report([*runs, *make_studies(tmp_path)], tmp_path / "report.html")
    return (tmp_path / "report.html").as_uri()


@pytest.mark.parametrize("width", [SIZE[0], NARROW])
def test_everything_is_drawn_within_the_page(browser, page, width):
    browser.set_window_size(width, SIZE[1])
    try:
        browser.get(page)
        assert list_errors(browser) == []
        assert browser.execute_script("return performance.getEntriesByType('resource')") == []
        assert list_overflowing(browser) == []
        assert count_colours(browser) > 20
        figures = browser.find_elements("tag name", "svg")
        assert len(figures) >= 5
        for figure in figures:
            assert figure.size["width"] > 100 and figure.size["height"] > 50
            # Marks with a size within the figure: lines, bars or cells, more than axes alone.
            drawn = browser.execute_script(
                """
                const frame = arguments[0].getBoundingClientRect();
                return [...arguments[0].querySelectorAll("path, rect, use, circle, text")].filter(
                  (mark) => {
                    const box = mark.getBoundingClientRect();
                    return box.width + box.height > 1
                      && box.left >= frame.left - 2 && box.right <= frame.right + 2
                      && box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2;
                  }).length;
                """,
                figure,
            )
            assert drawn > 10
    finally:
        browser.set_window_size(*SIZE)


def test_runs_are_beside_each_other(browser, page):
    browser.get(page)
    text = browser.find_element("tag name", "body").text
    assert "<b>tiny</b>" in text  # settings are text, and no elements of the page
    assert "0.1" in text and "0.2" in text
    for name in ("one", "two", "campaign", "sst2"):
        assert name in text
