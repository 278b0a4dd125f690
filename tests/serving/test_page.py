"""The page of a server in a real browser: it is filled in, sent, and shows the answers."""

import threading
from contextlib import contextmanager

import pytest
from browser import count_colours, list_errors, list_overflowing
from serving.test_serve_completions import PROMPT, text_generators  # noqa: F401
from serving.tiny_services import make_service, make_text, make_tiny_app

from megamod.evaluation.generate import Sampling
from megamod.serving.address import bind_socket
from megamod.serving.completion import CompletionService
from megamod.serving.server import DrainingServer

WAIT = 20  # seconds


@contextmanager
def serve(app):
    """Serve an application on a socket; yields its address."""
    bound = bind_socket("127.0.0.1", 0)
    server = DrainingServer(app, "")
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(WAIT)


def element(browser, name: str):
    return browser.find_element("id", name)


def wait_until(browser, condition) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, WAIT).until(lambda _: condition())


def open_page(browser, address: str) -> None:
    """Open the page, and wait until it knows its model."""
    browser.get(address)
    wait_until(browser, lambda: element(browser, "send").is_enabled())


def fill_in(browser, name: str, value: str) -> None:
    browser.execute_script("arguments[0].value = arguments[1]", element(browser, name), value)


def send(browser, text: str) -> None:
    """Fill in a text, press the button, and wait for the answer or the error."""
    fill_in(browser, "input", text)
    element(browser, "send").click()
    wait_until(browser, lambda: element(browser, "send").is_enabled())


def check_rendered(browser) -> None:
    """Nothing went wrong, something is drawn, and all of it is within the width."""
    assert list_errors(browser) == []
    assert list_overflowing(browser) == []
    assert count_colours(browser) > 20


def test_labels_of_texts(browser, tmp_path):
    service = make_service(tmp_path, 2, 4)
    texts = [make_text(number) for number in (1, 2, 3)]
    with serve(make_tiny_app(service)) as address:
        open_page(browser, address)
        assert browser.title.startswith("tiny")
        assert "2 inputs in a forward pass" in element(browser, "about").text
        send(browser, "\n".join([*texts, ""]))
        rows = element(browser, "content").find_elements("css selector", "tr")
        cells = [[c.text for c in row.find_elements("css selector", "td")] for row in rows[1:]]
        assert [row[0] for row in cells] == texts
        for _, label, score in cells:
            assert label in ("O", "B-A", "I-A") and 0 < float(score) <= 1
        assert element(browser, "state").text.startswith("3 inputs, ")
        check_rendered(browser)
        send(browser, "  ")
        assert element(browser, "fault").text == "There is no text."
        assert not element(browser, "answer").is_displayed()


def test_labels_of_words(browser, tmp_path):
    service = make_service(tmp_path, 2, 4, tagger=True)
    with serve(make_tiny_app(service)) as address:
        open_page(browser, address)
        send(browser, "w1 w2 w3\nw4")
        words = element(browser, "content").find_elements("class name", "word")
        assert [word.text.split("\n")[0] for word in words] == ["w1", "w2", "w3", "w4"]
        check_rendered(browser)


def test_text_and_posterior(browser, text_generators):  # noqa: F811
    generator = text_generators["forest"]
    (expected,) = generator.generate(PROMPT, Sampling(6, 0.0, seed=1))
    with serve(make_tiny_app(CompletionService(generator, "tiny", max_tokens=40))) as address:
        open_page(browser, address)
        assert "law, art" in element(browser, "about").text
        for name, value in (("max_tokens", "6"), ("temperature", "0"), ("seed", "1")):
            fill_in(browser, name, value)
        send(browser, PROMPT)
        assert element(browser, "text").get_attribute("textContent") == expected.text
        bars = element(browser, "bars").find_elements("class name", "bar")
        shares = {}
        for bar in bars:
            name, share = (part.text for part in bar.find_elements("css selector", "span"))
            shares[name] = float(share)
            track, fill = (bar.find_element("css selector", tag) for tag in ("i", "b"))
            # The bar is as long as the share says.
            assert fill.size["width"] == pytest.approx(track.size["width"] * float(share), abs=2)
        assert shares == pytest.approx(dict(expected.weights), abs=1e-3)
        assert f"{expected.new_tokens} tokens" in element(browser, "state").text
        check_rendered(browser)
        fill_in(browser, "max_tokens", "41")
        browser.execute_script("arguments[0].noValidate = true", element(browser, "form"))
        send(browser, PROMPT)
        assert "max_tokens" in element(browser, "fault").text
