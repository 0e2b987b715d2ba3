"""Rewards behind HTTP: the wire, the server, the client's patience; the judge behind an OpenAI-compatible endpoint."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time

import httpx2
import pytest
import torch
from loopback import LIMIT, closed_port, serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny import ROOT

from trl_tafs.rewards import RewardError, RewardRefused, RewardSet, parse_rewards
from trl_tafs.rewards.remote import RemoteReward
from trl_tafs.rewards.server import SECRET, check_exposure, is_loopback, make_app
from trl_tafs.rewards.unified_reward import QUESTION, UnifiedReward, parse_score
from trl_tafs.rewards.web import parse_address
from trl_tafs.rewards.wire import decode_images, encode_images

PROMPTS, METADATA = [f"prompt {i}" for i in range(5)], [{"n": i} for i in range(5)]
IMAGES = (torch.rand(5, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
JSON = {"Content-Type": "application/json"}
QUICK = {"max_retries": 1, "retry_delay": 0.01, "timeout": LIMIT}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(SECRET, raising=False)


class Judge:
    """The mean pixel times n; no score on n = 3. It can be told to fail, and remembers its batches."""

    def __init__(self):
        self.failing, self.batches = 0, []

    def __call__(self, images, prompts, metadata):
        self.batches.append(list(prompts))
        if self.failing:
            self.failing -= 1
            raise RuntimeError("out of memory")
        means = images.double().mean((1, 2, 3)).tolist()
        return [None if row["n"] == 3 else row["n"] * mean for mean, row in zip(means, metadata, strict=True)]


def expected():
    values = IMAGES.double().mean((1, 2, 3)) * torch.arange(5)
    values[3] = torch.nan
    return values


def test_images_survive_the_wire():
    assert torch.equal(decode_images(encode_images(IMAGES)), IMAGES)
    anything = torch.rand(2, 3, 5, 7)
    assert torch.equal(decode_images(encode_images(anything, "raw")), anything)
    assert (decode_images(encode_images(anything)) - anything).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pickle"}, "a format of png or raw"),
        ({"images": []}, "needs images"),
        ({"images": ["!!"]}, "can't be decoded"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, "can't be decoded"),
        ({"shape": [3, 100000, 100000]}, "at most"),
        ({"shape": [3, 12, 17]}, "where 12 x 17 was announced"),
        ({"shape": [4, 12, 16]}, r"must be \[3, H, W\]"),
        ({"format": "raw"}, "can't be decoded"),
    ],
)
def test_a_message_that_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode_images(encode_images(IMAGES) | change)


@pytest.mark.parametrize("format", ["png", "raw"])
def test_a_remote_reward_is_the_reward(format):
    judge = Judge()
    with serving(make_app("mean", judge)) as url:
        remote = RemoteReward(url, format=format, batch_size=2, **QUICK)
        assert remote.__name__ == "mean"
        got = remote(IMAGES, PROMPTS, METADATA)
        torch.testing.assert_close(got, expected(), equal_nan=True, rtol=0, atol=1e-6)
        assert sorted(map(len, judge.batches)) == [1, 2, 2]
        named = parse_rewards([f"{url}=0.5"])
        assert list(named) == [url.removeprefix("http://")] and next(iter(named.values()))[1] == 0.5


def test_several_endpoints_share_the_work_and_stand_in_for_each_other():
    first, second = Judge(), Judge()
    with serving(make_app("mean", second)) as b:
        with serving(make_app("mean", first)) as a:
            remote = RemoteReward([a, b], batch_size=1, **QUICK)
            remote(IMAGES, PROMPTS, METADATA)
            assert len(first.batches) == 3 and len(second.batches) == 2
        got = remote(IMAGES, PROMPTS, METADATA)  # the first one is gone
        torch.testing.assert_close(got, expected(), equal_nan=True)
        with pytest.warns(UserWarning, match="doesn't answer"):
            RemoteReward([a, b], **QUICK)


def test_a_failing_server_is_asked_again_and_then_masks_or_stops():
    judge = Judge()
    with serving(make_app("mean", judge)) as url:
        remote = RemoteReward(url, **QUICK)
        judge.failing = 1
        torch.testing.assert_close(remote(IMAGES, PROMPTS, METADATA), expected(), equal_nan=True)
        judge.failing = 2
        with pytest.raises(RewardError, match="no endpoint scored 5 images.*500.*out of memory"):
            remote(IMAGES, PROMPTS, METADATA)
        judge.failing = 2
        masking = RemoteReward(url, on_failure="mask", **QUICK)
        with pytest.warns(UserWarning, match="5 images get no score"):
            assert masking(IMAGES, PROMPTS, METADATA).isnan().all()


def test_the_trainers_retries_do_not_multiply_a_remote_rewards_own():
    judge = Judge()
    with serving(make_app("mean", judge)) as url:
        remote = RemoteReward(url, **QUICK)
        judge.failing = 99
        with pytest.raises(RewardError, match="no endpoint scored"):
            RewardSet(remote, max_retries=3, retry_delay=0.0)(IMAGES, PROMPTS, METADATA)
        assert len(judge.batches) == 2
    with serving(make_app("mean", judge, max_images=4)) as url:
        judge.failing, judge.batches = 0, []
        with pytest.raises(RewardRefused, match="413.*may have 4 images"):
            RewardSet(RemoteReward(url, **QUICK), max_retries=3, on_failure="mask")(IMAGES, PROMPTS, METADATA)
        with pytest.raises(RewardRefused, match="must be JSON"):
            RemoteReward(url, **QUICK)(IMAGES, PROMPTS, [{"n": IMAGES}] * 5)


def test_what_the_served_reward_refuses_is_not_asked_again():
    calls = []

    def refusing(images, prompts, metadata):
        calls.append(1)
        raise RewardRefused("no such row")

    with serving(make_app("rows", refusing)) as url, pytest.raises(RewardRefused, match="400.*no such row"):
        RemoteReward(url, **QUICK)(IMAGES, PROMPTS, METADATA)
    assert len(calls) == 1


def test_a_server_that_hangs_costs_the_timeout():
    release = threading.Event()

    def hang(images, prompts, metadata):
        release.wait(LIMIT)
        return [0.0] * len(prompts)

    with serving(make_app("slow", hang)) as url:
        remote = RemoteReward(url, max_retries=0, timeout=LIMIT)
        remote.timeout = 0.3
        with pytest.raises(RewardError, match="timed out after 0.3 s"):
            remote(IMAGES, PROMPTS, METADATA)
        release.set()


class Waits(list):
    """Stands for a module's `time`, and keeps what it is asked to sleep."""

    def sleep(self, seconds):
        self.append(seconds)


def busy(retry_after, times, then):
    """An ASGI application that answers 503 with Retry-After some times."""
    left = [times]

    async def answer(request):
        if request.url.path.endswith(("/health", "/models")):
            return JSONResponse({"name": "mean", "data": [{"id": "judge"}]})
        left[0] -= 1
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        return JSONResponse({"error": "busy"}, 503, headers) if left[0] >= 0 else JSONResponse(then)

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


@pytest.mark.parametrize(
    ("retry_after", "waited"),
    [("7", 7.0), ("0", 2.0), ("1", 2.0), ("2000", LIMIT), (None, 2.0), ("soon", 2.0), ("-5", 2.0), ("1e3", 2.0),
     ("Fri, 01 Jan 2999 00:00:00 GMT", LIMIT), ("Sat, 01 Jan 2000 00:00:00 GMT", 2.0)],
)  # fmt: skip
def test_a_busy_endpoint_is_asked_again_when_it_said_but_within_the_timeout(monkeypatch, retry_after, waited):
    monkeypatch.setattr("trl_tafs.rewards.remote.time", waits := Waits())
    with serving(busy(retry_after, 1, {"rewards": [1, 2, 3, 4, 5]})) as url:
        remote = RemoteReward(url, max_retries=1, retry_delay=2.0, timeout=LIMIT)
        assert remote(IMAGES, PROMPTS, METADATA).tolist() == [1, 2, 3, 4, 5] and waits == [waited]
        other = [url, closed_port()]  # it asks for no pause
        with pytest.warns(UserWarning, match="doesn't answer"):
            remote = RemoteReward(other, max_retries=1, retry_delay=2.0, timeout=LIMIT)
    waits.clear()
    with serving(busy(retry_after, 99, {})) as url:
        remote.addresses = [parse_address(url), remote.addresses[1]]
        with pytest.raises(RewardError, match="no endpoint scored"):
            remote(IMAGES, PROMPTS, METADATA)
    assert waits == [2.0]


@pytest.mark.parametrize(("retry_after", "waited"), [("7", [7.0, 7.0]), ("0", [0.5, 1.0]), ("2000", [LIMIT, LIMIT])])
def test_a_busy_judge_is_asked_again_when_it_said_but_within_the_timeout(monkeypatch, retry_after, waited):
    monkeypatch.setattr("trl_tafs.rewards.judge.time", waits := Waits())
    with serving(busy(retry_after, 2, {"choices": [{"message": {"content": "Final Score: 4"}}]})) as url:
        assert UnifiedReward(f"{url}/v1", timeout=LIMIT)(IMAGES[:1], ["a"], [{}]).tolist() == [4.0]
    assert waits == waited


def test_without_a_server_training_does_not_start():
    with pytest.raises(ValueError, match="no reward server answers.*trl-tafs serve-reward"):
        RemoteReward(closed_port(), **QUICK)
    with serving(make_app("a", Judge())) as a, serving(make_app("b", Judge())) as b:
        with pytest.raises(ValueError, match="serve different rewards"):
            RemoteReward([a, b], **QUICK)


def test_a_secret_keeps_others_out(monkeypatch):
    with serving(make_app("mean", Judge(), secret="s3cret")) as url:
        with pytest.raises(ValueError, match="401"):
            RemoteReward(url, **QUICK)
        assert httpx2.post(f"{url}/score", json={}, timeout=LIMIT).status_code == 401
        monkeypatch.setenv(SECRET, "s3cret")
        torch.testing.assert_close(RemoteReward(url, **QUICK)(IMAGES, PROMPTS, METADATA), expected(), equal_nan=True)


def test_requests_are_bounded_and_checked():
    judge = Judge()
    with serving(make_app("mean", judge, max_images=2, max_bytes=4000)) as url:
        remote = RemoteReward(url, **QUICK)
        with pytest.raises(RewardError, match="413.*may have"):
            remote(IMAGES, PROMPTS, METADATA)
        message = encode_images(IMAGES[:1, :, :4, :4]) | {"prompts": ["a", "b"], "metadata": [{}]}
        answer = httpx2.post(f"{url}/score", json=message, timeout=LIMIT)
        assert answer.status_code == 400 and "as many prompts" in answer.json()["error"]
        assert httpx2.post(f"{url}/score", content=b"x" * 5000, headers=JSON, timeout=LIMIT).status_code == 413
        assert httpx2.post(f"{url}/score", content=b"\x80\x04pickle", headers=JSON, timeout=LIMIT).status_code == 400
        assert not judge.batches


def test_loopback_unless_there_is_a_secret():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("gpu-box")
    check_exposure("0.0.0.0", "s3cret")
    with pytest.raises(ValueError, match=f"0.0.0.0 can be reached from other machines; set {SECRET}"):
        check_exposure("0.0.0.0", None)


def test_the_command_serves(tmp_path):
    port = closed_port().rpartition(":")[2]
    command = [sys.executable, "-m", "trl_tafs.cli", "serve-reward", "jpeg_incompressibility", "--port", port]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    try:
        line = process.stdout.readline()
        assert line == f"reward jpeg_incompressibility at http://127.0.0.1:{port}\n"
        url = re.search(r"http://\S+", line)[0]
        while process.poll() is None:  # it listens soon after it says so
            try:
                httpx2.get(f"{url}/health", timeout=LIMIT)
                break
            except httpx2.TransportError:
                time.sleep(0.05)
        got = RewardSet(parse_rewards([f"{url}=1.0"]))(IMAGES, PROMPTS, METADATA).values
        local = RewardSet(parse_rewards(["jpeg_incompressibility"]))(IMAGES, PROMPTS, METADATA).values
        assert torch.equal(got, local)
    finally:
        process.terminate()
        process.wait(LIMIT)


# UnifiedReward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good. Final Score: 4", 4.0),
        ("Alignment Score: 3\nFinal Score: 3.75", 3.75),
        ("Final Score: **2.5**", 2.5),
        ("Final Score: 7", None),
        ("Final Score: 45", None),
        ("Final Score: 5.5", None),
        ("I would say 4", None),
        ("", None),
        (None, None),
    ],
)
def test_the_score_is_what_follows_its_name(answer, score):
    assert parse_score(answer) == score


class Endpoint:
    """An OpenAI-compatible endpoint with one model, whose answers are a list's, in turn by prompt."""

    def __init__(self, answers, failing=0):
        self.answers, self.failing, self.asked, self.lock = answers, failing, [], threading.Lock()
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": "judge", "object": "model"}]})

    async def chat(self, request):
        question = json.loads(await request.body())
        with self.lock:
            self.asked.append(question)
            if self.failing:
                self.failing -= 1
                return JSONResponse({"error": {"message": "overloaded"}}, status_code=503)
        text = question["messages"][0]["content"][1]["text"]
        answer = self.answers[re.search(r"Text Caption: \[(.*)\]", text)[1]]
        message = {"role": "assistant", "content": answer}
        return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": "judge",
                             "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})  # fmt: skip


def test_unified_reward_asks_the_question_and_reads_the_score():
    endpoint = Endpoint({"prompt 0": "Final Score: 4", "prompt 1": "nice", "a {brace}": "Final Score: 1.5"}, failing=1)
    with serving(endpoint.app) as url:
        reward = UnifiedReward(f"{url}/v1")
        got = reward(IMAGES[:3], ["prompt 0", "prompt 1", "a {brace}"], [{}] * 3)
    assert got[0] == 4.0 and got[1].isnan() and got[2] == 1.5
    assert len(endpoint.asked) == 4 and reward.model == "judge"  # one was asked again
    image, text = endpoint.asked[-1]["messages"][0]["content"]
    assert text["text"].startswith(QUESTION[:40]) and endpoint.asked[-1]["temperature"] == 0
    shown = {base64.b64decode(q["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]) for q in endpoint.asked}
    decoded = {
        decode_images({"format": "png", "shape": [3, 12, 16], "images": [base64.b64encode(png).decode()]})
        for png in shown
    }  # noqa: E501
    assert all(any(torch.equal(one[0], image) for one in decoded) for image in IMAGES[:3])


def test_unified_rewards_failures(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="needs base_url"):
        UnifiedReward()
    with pytest.raises(ValueError, match="doesn't answer"):
        UnifiedReward(f"{closed_port()}/v1", max_retries=0)
    endpoint = Endpoint({"a": "Final Score: 4"}, failing=2)
    with serving(endpoint.app) as url:
        with pytest.raises(ValueError, match="model is 'other'; .* serves judge"):
            UnifiedReward(f"{url}/v1", model="other")
        with pytest.raises(RewardError, match="overloaded"):
            UnifiedReward(f"{url}/v1", max_retries=0)(IMAGES[:1], ["a"], [{}])
        with pytest.warns(UserWarning, match="no score"):
            masked = UnifiedReward(f"{url}/v1", max_retries=0, on_failure="mask")(IMAGES[:1], ["a"], [{}])
        assert masked.isnan().all()
