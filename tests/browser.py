"""A headless Chromium for tests of pages: opens them, and looks at what is rendered."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = (1000, 800)  # pixels
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    # Without these Chromium talks to its maker at every start.
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--window-size={SIZE[0]},{SIZE[1]}",
)


def find_chromium() -> tuple[str, str] | None:
    """Find the programs of Chromium and of its driver; None if one is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def open_browser(profile: Path) -> Iterator["object"]:
    """Yield a selenium driver of a headless Chromium with an empty profile.

    Skips the test if Chromium or its driver is not installed.
    """
    programs = find_chromium()
    if programs is None:
        pytest.skip("Chromium and chromedriver are not installed")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = Chrome(options, ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def list_errors(driver) -> list[str]:
    """Messages of errors on the console of the page since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def list_overflowing(driver) -> list[str]:
    """Elements with text that end outside of the page's width, as tag and text.

    Parts of a container that scrolls are not counted.
    """
    return driver.execute_script(
        """
        const width = document.documentElement.clientWidth;
        const scrolls = (node) => {
          for (let up = node.parentElement; up; up = up.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
          return false;
        };
        return [...document.querySelectorAll("body *")].filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width && node.textContent.trim() && box.right > width + 1 && !scrolls(node);
        }).map((node) => `${node.tagName} ${node.textContent.trim().slice(0, 40)}`);
        """
    )


def count_colours(driver) -> int:
    """Number of different colours in a screenshot: 1 for a page on which nothing is drawn."""
    from PIL import Image

    picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    return len(picture.getcolors(maxcolors=picture.width * picture.height))
