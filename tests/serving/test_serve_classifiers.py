"""Classifiers and taggers over HTTP: every input gets its answer, every fault its sentence."""

import asyncio
import json
import re

import pytest
import torch
from serving.tiny_services import (
    LABELS,
    FedRows,
    InterceptedPipeline,
    make_service,
    make_text,
    make_tiny_app,
    open_client,
    read_error,
)

PATH = "/v1/classify"
MALFORMED = [
    (b"", 400, "request: not JSON"),
    (b'{"input": "a"', 400, "request: not JSON"),
    (b"\xff", 400, "request: byte 0 is not UTF-8"),
    (b"[" * 100_000, 400, "request: is nested more than 100 deep"),
    (b'{"input": "a", "input": "b"}', 400, "'input' appears twice"),
    (b'{"input": "\\ud800"}', 400, "cannot be written as UTF-8"),
    (b'{"input": 1' + b"0" * 30 + b"}", 400, "whole number of more than 64 bits"),
    (b" " * 2**20 + b"{}", 413, "more than 1,048,576 bytes"),
    ("a text", 400, "'a text' is not `key: value` lines; keys are input, model"),
    ({}, 400, "request, input is missing"),
    ({"inputs": "w1"}, 400, "unknown key 'inputs'; the nearest is 'input'"),
    ({"input": []}, 400, "input: [] has no input"),
    ({"input": None}, 400, "request, input, None: neither a text nor a pair of texts"),
    ({"input": ["w1", 3]}, 400, "request, input[1], 3: neither a text nor a pair of texts"),
    ({"input": [["a", "b", "c"]]}, 400, "input[0], ['a', 'b', 'c']: neither a text nor a pair"),
    ({"input": ["w1"] * 65}, 400, "input: 65 inputs, 64 at most in a request"),
    ({"input": "w1", "model": "other"}, 404, "'other' is not served here; give 'tiny', or none"),
    ({"input": "w1", "model": 3}, 400, "request, model: 3 is not text"),
]


async def post(client, body, path=PATH):
    """Send a body, as it is or as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(path, content=content)


def serve(service, scenario, **options):
    """Run `scenario(client, app)` against the application of a service."""

    async def main():
        app = make_tiny_app(service, **options)
        async with open_client(app) as client:
            return await asyncio.wait_for(scenario(client, app), 60)

    return asyncio.run(main())


@pytest.mark.parametrize(("instances", "groups"), [(3, 2), (1, 4)])
def test_valid_and_malformed_requests_at_once(tmp_path, instances, groups):
    service = make_service(tmp_path, instances, groups)
    fed = FedRows(service)
    inputs = [[make_text(3 * n + k) for k in range(1 + n % 3)] for n in range(40)]
    bodies = [{"input": texts if len(texts) > 1 else texts[0]} for texts in inputs]

    async def scenario(client, app):
        bad = [post(client, body) for body, _, _ in MALFORMED]
        return await asyncio.gather(*(post(client, body) for body in bodies), *bad)

    responses = serve(service, scenario, max_queue=200)
    for texts, response in zip(inputs, responses, strict=False):
        assert response.status_code == 200 and response.json()["model"] == "tiny"
        results = response.json()["results"]
        assert len(results) == len(texts)
        for text, result in zip(texts, results, strict=True):
            expected = fed.predict(text)
            assert result["label"] == expected["label"]
            assert result["score"] == pytest.approx(expected["score"], abs=1e-5)
    largest = max(len(ids) for ids in fed.batches)
    assert largest == instances * groups and all(len(i) % instances == 0 for i in fed.batches)
    for (body, status, message), response in zip(MALFORMED, responses[40:], strict=True):
        if body != {"input": ["w1"] * 65}:  # 65 inputs fit into this queue
            assert message in read_error(response, [status])


def test_pairs_and_texts_in_one_group(tmp_path):
    service = make_service(tmp_path, 2, 2)
    tokenizer, model = service.pipeline.tokenizer, service.pipeline.model
    inputs = ["w1 w2", ["w3", "w4 w5"], {"text": "w6", "text_pair": "w7"}, {"text": "w8"}]

    async def scenario(client, app):
        return (await post(client, {"input": inputs})).json()["results"]

    results = serve(service, scenario)
    texts, pairs = ["w1 w2", "w8"], (["w3", "w6"], ["w4 w5", "w7"])
    for lines, columns in (((0, 3), (texts,)), ((1, 2), pairs)):
        rows = tokenizer(*columns, padding="max_length", max_length=9, return_tensors="pt")
        with torch.no_grad():
            shares = model(**rows).logits.softmax(-1)
        for line, share in zip(lines, shares, strict=True):
            assert results[line]["label"] == LABELS[int(share.argmax())]
            assert results[line]["score"] == pytest.approx(float(share.max()), abs=1e-5)


def test_words_are_tagged(tmp_path):
    service = make_service(tmp_path, 2, 2, tagger=True)
    rows = [[2, 6, 7, 3], [2, 8, 3]]  # [CLS] w1 w2 [SEP]
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    with torch.no_grad():
        shares = service.pipeline.model(input_ids=ids, attention_mask=ids.ne(0).long())
    shares = shares.logits.softmax(-1)

    async def scenario(client, app):
        results = (await post(client, {"input": ["w1 w2", ["w3"]]}, "/v1/tag")).json()["results"]
        empty = await post(client, {"input": ["w1", " \n"]}, "/v1/tag")
        return results, empty, await post(client, {"input": "w1"})

    results, empty, other = serve(service, scenario)
    for row, words in enumerate((["w1", "w2"], ["w3"])):
        assert [item["word"] for item in results[row]["words"]] == words
        for position, item in enumerate(results[row]["words"], start=1):
            best = shares[row, position].max(-1)
            assert item["label"] == LABELS[int(best.indices)]
            assert item["score"] == pytest.approx(float(best.values), abs=1e-5)
    assert "input[1], ' \\n': neither a text nor a list of words" in read_error(empty, [400])
    assert "POST /v1/classify: no such page; there are /v1/tag" in read_error(other, [404])


def test_a_full_queue_answers_429_and_what_is_accepted(tmp_path):
    service = make_service(tmp_path, 2, 1)
    fed = FedRows(service)

    async def scenario(client, app):
        requests = [post(client, {"input": make_text(number)}) for number in range(30)]
        return await asyncio.gather(*requests)

    responses = serve(service, scenario, max_queue=5)
    refused = [response for response in responses if response.status_code != 200]
    assert 5 <= len(responses) - len(refused) < 30
    for number, response in enumerate(responses):
        if response.status_code == 200:
            (result,) = response.json()["results"]
            assert result["score"] == pytest.approx(fed.predict(make_text(number))["score"])
        else:
            assert "of 5 at most; try again in 1 s" in read_error(response, [429])
            assert response.headers["retry-after"] == "1"


def test_a_fault_of_the_model_is_not_hidden(tmp_path):
    service = make_service(tmp_path, 1, 2)

    def fail(requests):
        if "w9" in requests:
            raise RuntimeError("no such kernel")

    service.pipeline = InterceptedPipeline(service.pipeline, fail)

    async def scenario(client, app):
        return await asyncio.gather(*(post(client, {"input": f"w{n}"}) for n in (8, 9, 8)))

    good, bad, last = serve(service, scenario)
    assert good.json() == last.json() and good.status_code == 200
    message = read_error(bad, [500])
    assert message == "the server failed to answer: RuntimeError, see its log"


def test_page_models_health_and_metrics(tmp_path):
    service = make_service(tmp_path, 3, 2)

    async def scenario(client, app):
        await post(client, {"input": ["w1", "w2", "w3", "w4"]})
        await client.get("/nowhere")
        names = ("/", "/v1/models", "/healthz", "/metrics", "/openapi.json")
        pages = {name: await client.get(name) for name in names}
        wrong = await client.get(PATH)
        app.state.queue.draining = True
        return pages, wrong, await client.get("/healthz"), await post(client, {"input": "w1"})

    pages, wrong, draining, refused = serve(service, scenario)
    assert all(page.status_code == 200 for page in pages.values())
    (model,) = pages["/v1/models"].json()["data"]
    assert model["id"] == "tiny" and model["kind"] == "classification" and model["path"] == PATH
    assert model["num_instances"] == 3 and model["labels"] == ["O", "B-A", "I-A"]
    assert pages["/healthz"].json() == {"status": "ok", "waiting": 0}
    assert set(pages["/openapi.json"].json()["paths"]) == {
        PATH,
        "/healthz",
        "/metrics",
        "/v1/models",
    }
    figures = dict(re.findall(r"^(megamod_\S+) (\S+)$", pages["/metrics"].text, re.M))
    assert figures['megamod_requests_total{path="/v1/classify",status="200"}'] == "1.0"
    assert figures['megamod_requests_total{path="other",status="404"}'] == "1.0"
    assert figures["megamod_answered_total"] == "4.0" and figures["megamod_places_total"] == "6.0"
    assert figures["megamod_waiting"] == "0.0" and figures["megamod_waiting_limit"] == "64.0"
    assert "process_resident_memory_bytes" in pages["/metrics"].text
    assert read_error(wrong, [405]) == "GET /v1/classify: give the method POST"
    assert draining.status_code == 503 and draining.json()["status"] == "draining"
    assert "accepts no new requests" in read_error(refused, [503])


def test_the_page_needs_nothing_else(tmp_path):
    async def scenario(client, app):
        return await client.get("/")

    page = serve(make_service(tmp_path, 1, 1), scenario)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    # No file, font or script of another address; its own links are pages of the server.
    assert re.findall(r"(?:src|href)=\"(?!/|data:)", page.text) == []
    assert not re.search(
        r"@import|url\(|innerHTML|//[a-z]+\.", page.text.replace("//www.w3.org", "")
    )
    assert set(re.findall(r'href="(/[\w./]*)"', page.text)) == {
        "/v1/models",
        "/openapi.json",
        "/healthz",
        "/metrics",
    }
    # Every element that the script uses is there.
    ids = set(re.findall(r'\bid="([\w-]+)"', page.text))
    assert set(re.findall(r'\$\("([\w-]+)"\)', page.text)) <= ids
