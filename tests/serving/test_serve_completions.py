"""Completions over HTTP: those of the generator alone, whole or in pieces, whatever else runs."""

import asyncio
import json

import pytest
from launch import launch
from runs.test_host_pretrain import save_tokenizer, words_of
from saved_models import make_model
from serving.tiny_services import make_tiny_app, open_client, read_error

from megamod.evaluation.generate import Sampling, load_text_generator
from megamod.serving.completion import CompletionService

PATH, PROMPT = "/v1/completions", "lawa the"


@pytest.fixture(scope="module")
def text_generators(tmp_path_factory):
    """A dense model, and a forest of two."""
    root = tmp_path_factory.mktemp("completions")
    for name in ("law", "art"):
        model = make_model(root / name, vocab_size=300, max_position_embeddings=32, eos_token_id=1)
        save_tokenizer(model, words_of("law"))
        launch("forest", "add", "--forest", root / "forest", "--path", model, "--domain", name)
    return {name: load_text_generator(str(root / name)) for name in ("law", "forest")}


def serve(text_generator, scenario, **options):
    """Run `scenario(client)` against the application of a text_generator."""

    async def main():
        app = make_tiny_app(CompletionService(text_generator, "tiny", max_tokens=40), **options)
        async with open_client(app) as client:
            return await asyncio.wait_for(scenario(client), 60)

    return asyncio.run(main())


def test_texts_and_posterior_are_those_of_the_writer(text_generators):
    bodies = [
        {"prompt": PROMPT, "max_tokens": 5 + n % 3, "temperature": n % 2, "seed": n}
        for n in range(8)
    ]

    async def scenario(client):
        return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

    for body, response in zip(bodies, serve(text_generators["forest"], scenario), strict=True):
        sampling = Sampling(body["max_tokens"], body["temperature"], seed=body["seed"])
        (expected,) = text_generators["forest"].generate(PROMPT, sampling)
        answer = response.json()
        (choice,) = answer["choices"]
        assert PROMPT + choice["text"] == expected.text and answer["seed"] == body["seed"]
        assert choice["posterior"] == pytest.approx(dict(expected.weights), abs=1e-5)
        assert choice["finish_reason"] == ("stop" if expected.finished else "length")
        assert answer["usage"]["completion_tokens"] == expected.new_tokens <= body["max_tokens"]
        assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
        assert answer["model"] == "tiny" and answer["object"] == "text_completion"


def read_events(text: str) -> list[dict]:
    """The content of server-sent events, the last of which is [DONE]."""
    *events, done, empty = text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_is_the_text_in_pieces(text_generators):
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 3}

    async def scenario(client):
        whole = (await client.post(PATH, json=body)).json()
        return whole, await client.post(PATH, json=body | {"stream": True})

    for name, text_generator in text_generators.items():
        whole, response = serve(text_generator, scenario)
        assert response.headers["content-type"].startswith("text/event-stream")
        events = read_events(response.text)
        assert (
            "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
        )
        assert len(events) > 3 and events[0]["choices"][0]["finish_reason"] is None
        assert events[-1]["usage"] == whole["usage"]
        assert events[-1]["choices"][0].get("posterior") == whole["choices"][0].get("posterior")
        assert ("posterior" in whole["choices"][0]) == (name == "forest")
        assert len({event["id"] for event in events}) == 1


def test_stop_texts_cut_the_text(text_generators):
    async def scenario(client):
        body = {"prompt": PROMPT, "max_tokens": 20, "seed": 3}
        whole = (await client.post(PATH, json=body)).json()["choices"][0]["text"]
        stop = whole[len(whole) // 2 :][:3]
        cut = await client.post(PATH, json=body | {"stop": ["absent", stop]})
        pieces = await client.post(PATH, json=body | {"stop": stop, "stream": True})
        return whole, stop, cut.json(), read_events(pieces.text)

    whole, stop, cut, pieces = serve(text_generators["law"], scenario)
    assert len(stop) == 3 and cut["choices"][0]["text"] == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == cut["choices"][0]["text"]
    assert cut["usage"] == pieces[-1]["usage"] and cut["usage"]["completion_tokens"] < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "request, prompt: 3 is not text"),
        ({"prompt": ["a"]}, "request, prompt: ['a'] is not text"),
        ({"prompt": "lawa " * 40}, "prompt of 41 tokens: the model has 32 positions"),
        ({"max_tokens": 0}, "max_tokens: 0 is not 1 or more"),
        ({"max_tokens": 41}, "max_tokens: 41 is not 40 or less"),
        ({"max_tokens": 2.5}, "max_tokens: 2.5 is not a whole number"),
        ({"temperature": 3}, "temperature: 3 is not 2 or less"),
        ({"temperature": "0"}, "temperature: '0' is not a number"),
        ({"top_p": 0}, "top_p: 0 is not more than 0"),
        ({"seed": -1}, "seed: -1 is not 0 or more"),
        ({"stop": [""]}, "stop: [''] is neither a text nor a list of up to 4 texts, none empty"),
        ({"stop": list("abcde")}, "is neither a text nor a list of up to 4 texts"),
        ({"n": 2}, "request, n: 2 is not supported; give 1, or leave it out"),
        ({"echo": True}, "request, echo: True is not supported; give false, or leave it out"),
        ({"logprobs": 5}, "request, logprobs: 5 is not supported; give null, or leave it out"),
        ({"stream": 1}, "request, stream: 1 is not true or false"),
        ({"suffix": "x"}, "unknown key 'suffix'"),
    ],
)
def test_refusals_name_the_field(text_generators, change, message):
    body = {"prompt": PROMPT} | change

    async def scenario(client):
        return await client.post(PATH, json=body), await client.post(
            PATH, json={"stream": True} | body
        )

    for response in serve(text_generators["law"], scenario):
        assert message in read_error(response, [400])


def test_not_a_number_is_refused(text_generators):
    async def scenario(client):
        return await client.post(PATH, content=b'{"prompt": "a", "temperature": NaN}')

    assert "temperature: nan is not" in read_error(serve(text_generators["law"], scenario), [400])


def test_an_abandoned_text_stops(text_generators):
    service = CompletionService(text_generators["law"], "tiny", max_tokens=40)
    written = []
    service.on_tokens = written.append
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}

    async def main():
        app = make_tiny_app(service)
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            return messages.pop() if messages else {"type": "http.disconnect"}

        sent = []

        async def send(message):
            sent.append(message)

        scope = dict(type="http", method="POST", path=PATH, query_string=b"", headers=[])
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(main()) == 499
    assert sum(written) < 20
