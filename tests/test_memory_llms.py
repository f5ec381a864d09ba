"""Language models as functions: one on this machine, and servers that are there, down, wrong, or repeat the key."""

import asyncio
import importlib.util
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ai_sleep_constructs.memory.answers import ScoreError
from ai_sleep_constructs.memory.judge import LLMJudge
from ai_sleep_constructs.memory.llms import LLMError, local_llm, openai_compatible_llm
from ai_sleep_constructs.memory.scoring import Item
from ai_sleep_constructs.reference.loading import checkpoints_folder, load_model

KEY = "sk-secret-0123456789abcdef"
CODE = "def add(first, second):\n    return"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def loaded() -> tuple[object, object]:
    return load_model("reference")


# On this machine


def test_a_local_model_writes_what_it_writes(loaded: tuple) -> None:
    import torch

    model, tokenizer = loaded
    row = torch.tensor([[tokenizer.bos_token_id, *tokenizer(CODE).input_ids]])
    written = model.generate(row, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(written[0, row.shape[1] :], skip_special_tokens=True).strip()
    assert expected and asyncio.run(local_llm(model, tokenizer, max_new_tokens=12)(CODE)) == expected
    assert asyncio.run(local_llm("reference", max_new_tokens=12)(CODE)) == expected
    warm = local_llm(model, tokenizer, max_new_tokens=12, temperature=1.5, seed=3)
    assert asyncio.run(warm(CODE)) == asyncio.run(warm(CODE)) != expected


def test_a_chat_template_is_used(loaded: tuple) -> None:
    model, tokenizer = loaded
    llm = local_llm(model, tokenizer, system="Be brief.")
    assert tokenizer.decode(llm._tokens("Hello")[1:]) == "Be brief.\n\nHello"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    try:
        assert tokenizer.decode(llm._tokens("Hello")) == "<system>Be brief.<user>Hello<assistant>"
    finally:
        tokenizer.chat_template = None


def test_a_cancelled_answer_stops_and_a_waiting_one_is_not_begun(loaded: tuple) -> None:
    llm = local_llm(*loaded, max_new_tokens=900)
    begun, answer = [], llm._answer
    llm._answer = lambda prompt, stop: begun.append(prompt) or answer(prompt, stop)  # type: ignore[method-assign]

    async def main() -> float:
        tasks = [asyncio.create_task(llm(f"# {n}\n{CODE}")) for n in range(3)]
        while not begun:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
        start = time.perf_counter()
        await asyncio.get_running_loop().run_in_executor(llm._thread, int)  # comes when the thread is free
        return time.perf_counter() - start

    assert asyncio.run(main()) < 3 and begun == [f"# 0\n{CODE}"]


def test_a_prompt_without_room_is_an_error_that_is_not_tried_again(loaded: tuple) -> None:
    judge = LLMJudge(local_llm(*loaded, max_new_tokens=1000))
    with pytest.raises(LLMError, match=r"and the answer may have 1,000: too many for the model's context of 1,024"):
        asyncio.run(judge.score("red", [Item("1", "word " * 300)]))
    assert judge.stats()["calls"] == 1


def test_a_model_that_cannot_judge_gives_an_error_and_no_score(loaded: tuple) -> None:
    judge = LLMJudge(local_llm(*loaded, max_new_tokens=8))
    with pytest.raises(ScoreError, match=r"no score for memory '1'"):
        asyncio.run(judge.score("red", [Item("1", "a red book")]))
    assert judge.stats()["calls"] == 2


# Servers


class Server(BaseHTTPRequestHandler):
    """Answers by the model's name: a status code (with the request's key in the message), or something that is no answer."""

    seen: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        model = body["model"]
        if model == "slow":
            time.sleep(1)
        code = int(model) if model.isdigit() else 200
        if code != 200:
            reply = {"error": {"message": f"refused {self.headers['Authorization']}", "type": "t"}}
        elif model == "empty":
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": []}
        elif model == "none":
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": model,
                     "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None}}]}
        else:
            said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            choice = {"index": 0, "finish_reason": "stop", "text": said.upper(), "message": {"role": "assistant", "content": said.upper()}}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
        data = b"<html>" if model == "html" else json.dumps(reply).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/html" if model == "html" else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_what_is_sent_and_what_comes_back(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    llm = openai_compatible_llm(server, "m", api_key_env="SOME_KEY", system="Be brief.", max_tokens=7, top_k=3)
    assert [asyncio.run(llm(prompt)) for prompt in ("hello", "again")] == ["HELLO", "AGAIN"]  # two loops
    sent = Server.seen[-2]
    assert sent["path"] == "/v1/chat/completions" and sent["key"] == f"Bearer {KEY}" and sent["temperature"] == 0 and sent["top_k"] == 3
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}] and sent["max_tokens"] == 7
    monkeypatch.setenv("SOME_KEY", "changed")
    assert asyncio.run(openai_compatible_llm(server, "m", api_key_env="SOME_KEY", api="completions", temperature=None)("hi")) == "HI"
    assert Server.seen[-1]["key"] == "Bearer changed" and Server.seen[-1]["prompt"] == "hi" and "temperature" not in Server.seen[-1]


@pytest.mark.parametrize(("model", "again"), [("401", False), ("404", False), ("400", False), ("429", True), ("500", True), ("503", True)])
def test_errors_say_whether_trying_again_helps_and_never_the_key(
    server: str, model: str, again: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    llm = openai_compatible_llm(server, model, api_key_env="SOME_KEY")
    judge = LLMJudge(llm, retry_delay=0)
    with pytest.raises(LLMError, match=r"refused Bearer \*\*\*") as caught:
        asyncio.run(judge.score("red", [Item("1", "red")]))
    assert caught.value.retryable is again and judge.stats()["calls"] == (3 if again else 1)
    error: BaseException | None = caught.value
    while error is not None:  # nothing that has the request is carried along
        assert not hasattr(error, "request") and not hasattr(error, "response")
        error = error.__cause__ or error.__context__
    seen = [repr(llm), llm.model_name, str(caught.value), "".join(traceback.format_exception(caught.value)), caplog.text, repr(vars(llm)), repr(judge)]
    seen.append(pickle.dumps(llm).decode("latin-1"))
    assert not [text for text in seen if KEY in text]
    assert pickle.loads(pickle.dumps(llm)).model_name == llm.model_name


def test_what_is_no_answer_is_an_error(server: str) -> None:
    for model in ("empty", "none", "html"):
        with pytest.raises(LLMError, match=rf"{model} at .* sent"):
            asyncio.run(openai_compatible_llm(server, model)("hello"))
    with pytest.raises(LLMError, match="timed out"):
        asyncio.run(openai_compatible_llm(server, "slow", timeout=0.1)("hello"))


def test_a_missing_key_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(LLMError, match=r"SOME_KEY has no key for https://models\.example/v1") as caught:
        asyncio.run(openai_compatible_llm("https://models.example/v1", "m", api_key_env="SOME_KEY")("hello"))
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("options", "message"),
    [({"base_url": "localhost:8000"}, "base_url: expected an address"), ({"base_url": f"https://user:{KEY}@models.example/v1"}, "without a user"),
     ({"base_url": f"https://models.example/v1?key={KEY}"}, "or a query"), ({"model": ""}, "model: expected"), ({"api": "responses"}, "api: expected"),
     ({"max_tokens": 0}, "max_tokens"), ({"timeout": 0}, "timeout"), ({"api_key_env": KEY}, "api_key_env: expected the name")],
)
def test_bad_arguments_are_named_without_the_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        openai_compatible_llm(**{"base_url": "http://localhost/v1", "model": "m", **options})
    assert KEY not in str(caught.value)


def test_bad_arguments_of_a_local_model_are_named(loaded: tuple) -> None:
    for arguments, options, message in ((("reference",), {"max_new_tokens": 0}, "max_new_tokens"), (("reference",), {"temperature": -1}, "temperature"),
                                        ((loaded[0],), {}, "tokenizer"), (loaded, {"max_new_tokens": True}, "max_new_tokens")):
        with pytest.raises(ValueError, match=message):
            local_llm(*arguments, **options)


# The server of transformers, with the reference model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    command = Path(sys.executable).with_name("transformers")
    if not command.exists() or not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        pytest.skip("needs `transformers serve`: pip install fastapi uvicorn")
    folder = tmp_path_factory.mktemp("served") / "reference"
    shutil.copytree(checkpoints_folder() / "mistral", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen([command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                                   stdout=output, stderr=subprocess.STDOUT, env=variables)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"{url}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def test_the_reference_model_answers_through_a_server_as_it_does_here(served: tuple[str, str], loaded: tuple) -> None:
    url, model = served
    tokenizer = loaded[1]
    tokenizer.chat_template = TEMPLATE
    try:
        here = asyncio.run(local_llm(*loaded, max_new_tokens=12)(CODE))
    finally:
        tokenizer.chat_template = None
    there = openai_compatible_llm(url, model, max_tokens=12, timeout=120)
    assert here and asyncio.run(there(CODE)).strip() == here
    asked = asyncio.run(openai_compatible_llm(url, model, max_tokens=12, timeout=120, api="completions")(CODE)).strip()
    assert asked == here
    judge = LLMJudge(there, retry_attempts=1)
    with pytest.raises(ScoreError, match=r"no score for memory '1'"):
        asyncio.run(judge.score("red", [Item("1", "a red book")]))
    assert judge.stats()["calls"] == 2 and judge.stats()["failures"] == 0
