"""A server on a socket: its shutdown, its address, the models that it loads."""

import asyncio
import signal
import threading
import time

import httpx
import pytest
from launch import launch
from serving.tiny_services import (
    LENGTH,
    InterceptedPipeline,
    make_classifier,
    make_service,
    make_text,
    make_tiny_app,
    make_tokenizer,
)
from transformers import BertConfig, BertForMaskedLM

from megamod.errors import UserError
from megamod.serving.address import bind_socket
from megamod.serving.load import load_service
from megamod.serving.server import DrainingServer


def test_a_signal_drains_the_server(tmp_path, capsys):
    """Requests that wait at the signal are answered, later ones get 503, then the server ends."""
    service, gate = make_service(tmp_path, 2, 2), threading.Event()
    service.pipeline = InterceptedPipeline(service.pipeline, lambda requests: gate.wait(20))
    app = make_tiny_app(service)
    bound = bind_socket("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    server = DrainingServer(app, f"served at {address}/")
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()

    async def main():
        async with httpx.AsyncClient(base_url=address, timeout=20) as client:
            while not server.started:
                await asyncio.sleep(0.01)
            bodies = [{"input": make_text(number)} for number in range(9)]
            tasks = [
                asyncio.ensure_future(client.post("/v1/classify", json=body)) for body in bodies
            ]
            while app.state.queue.waiting + app.state.queue.running < 9:
                await asyncio.sleep(0.01)
            server.handle_exit(signal.SIGTERM, None)
            refused = await client.post("/v1/classify", json=bodies[0])
            health = await client.get("/healthz")
            gate.set()
            return await asyncio.gather(*tasks), refused, health

    try:
        answered, refused, health = asyncio.run(main())
    finally:
        gate.set()
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert [response.status_code for response in answered] == [200] * 9
    assert (refused.status_code, health.status_code) == (503, 503)
    assert "accepts no new requests" in refused.json()["error"]["message"]
    assert capsys.readouterr().out == f"served at {address}/\n"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")


def test_a_second_signal_ends_at_once(tmp_path):
    server = DrainingServer(make_tiny_app(make_service(tmp_path, 1, 1)), "")
    server.handle_exit(signal.SIGTERM, None)
    assert server.queue.draining and not server.should_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit


def save_classifier(folder, instances):
    """A model folder with its tokenizer."""
    make_classifier(instances).save_pretrained(folder)
    make_tokenizer(folder).save_pretrained(folder)
    return folder


def load(folder, **options):
    return load_service(str(folder), **(dict(max_tokens=8, max_batch=4) | options))


def test_a_classifier_is_loaded_with_the_length_of_its_run(tmp_path):
    save_classifier(tmp_path / "run" / "model", 2)
    (tmp_path / "run" / "run.yaml").write_text(f"max_seq_length: {LENGTH}\ntask: sst-2\n")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        service = load(folder)
        assert service.pipeline.lengths.max_tokens == LENGTH
        assert (service.group_size, service.max_groups) == (2, 4)
        assert service.name == str(folder)
    assert load(tmp_path / "run", max_seq_length=7).pipeline.lengths.max_tokens == 7


def test_refusals(tmp_path):
    classifier = save_classifier(tmp_path / "classifier", 1)
    with pytest.raises(UserError, match="--max_seq_length 128: max_length 128 is not between"):
        load(classifier)
    with pytest.raises(UserError, match=r"--domain law: .* is a classifier, without experts"):
        load(classifier, domain="law")
    BertForMaskedLM(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="encoder"):
        load(tmp_path / "encoder")
    with pytest.raises(UserError, match="is no folder and no repository"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="--model is missing"):
        launch("serve")
    with bind_socket("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; give others"):
            launch("serve", classifier, "--port", port)
        assert time.monotonic() - started < 5  # before anything is loaded
