"""Rewards among strangers: real sockets on 127.0.0.1, at whose other end nothing is as it should be.

Before, the client waited for ever for a server that dripped, read 400 MB of blanks, followed redirects, and let
Overflow- and RecursionError past `on_failure`; the server decoded 90 GB of pixels, was blocked by 16 idle bodies and
answered 500.
"""

import base64
import contextlib
import io
import json
import resource
import select
import socket
import struct
import threading
import time
import warnings
import zlib

import httpx2
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LIMIT, http, serving, speaking
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from trl_tafs.output.secrets import without_userinfo
from trl_tafs.rewards import RewardError, RewardSet, parse_rewards
from trl_tafs.rewards.loading import reward_label
from trl_tafs.rewards.remote import RemoteReward
from trl_tafs.rewards.server import SECRET, connection_bounds, make_app
from trl_tafs.rewards.unified_reward import UnifiedReward
from trl_tafs.rewards.web import WebError, fetch, parse_address, read_json
from trl_tafs.rewards.wire import encode_images

IMAGES, PROMPTS, METADATA = torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}]
ONCE = {"max_retries": 0, "timeout": LIMIT}
SHORT = 0.5  # seconds, of the calls that are to time out
MESSAGE = encode_images(IMAGES) | {"prompts": PROMPTS, "metadata": METADATA}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))


# The client -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def healthy(answer):
    """A server that is asked for its health and its models first, and then sends what `answer` does or is."""
    asked = []

    def talk(connection):
        asked.append(1)
        if len(asked) == 1:
            connection.sendall(http({"name": "mean", "data": [{"id": "judge"}]}))
        elif callable(answer):
            answer(connection)
        else:
            connection.sendall(answer)

    with speaking(talk) as url:
        yield url


def drip_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    drip_head(connection)


def drip_head(connection):
    for _ in range(18_000):  # until the other side hangs up, or LIMIT
        connection.sendall(b"H")
        time.sleep(0.05)


def silence(connection):
    while connection.recv(65536):
        pass


def blanks(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 400000000\r\n\r\n")
    for _ in range(400):
        connection.sendall(b" " * 1_000_000)
    connection.sendall(b"{}")


def wrong(rewards):
    return http(b'{"rewards": ' + rewards + b"}")


FAULTS = {
    "drips its body": (drip_body, "timed out after 0.5 s"),
    "drips its head": (drip_head, "timed out after 0.5 s"),
    "says nothing": (silence, "timed out after 0.5 s"),
    "400 MB of blanks": (blanks, "more than 1048576 bytes"),
    "redirect": (
        http(b"", "307 T", Location="http://al:pw@elsewhere.example/x"),
        "redirect to http://elsewhere.example/x",
    ),
    "compressed": (http(zlib.compress(b"{}"), Content_Encoding="deflate"), "compressed"),
    "10^400": (wrong(b"[" + b"9" * 400 + b", 1]"), "must return 2 numbers"),
    "1e400": (wrong(b"[1e400, 1]"), "infinite"),
    "NaN": (wrong(b"[NaN, 1]"), "NaN is no JSON"),
    "100,000 lists": (wrong(b"[" * 100_000), "nested"),
    "33 lists": (wrong(b"[" * 33 + b"]" * 33), "nested"),
    "text": (wrong(b'["1", "2"]'), "without a list of numbers"),
    "truth": (wrong(b"[true, false]"), "without a list of numbers"),
    "an object": (wrong(b'{"a": 1, "b": 2}'), "without a list of numbers"),
    "lists": (wrong(b"[[1], [2, 3]]"), "must return 2 numbers"),
    "too few": (wrong(b"[1]"), r"shape \(1,\) for 2 images"),
    "a list": (http(b"[1, 2]"), "answered a list"),
    "no JSON": (http(b"\x80\x04\x1b[31mred"), "no JSON"),
    "no HTTP": (b"\x00\x01\r\n\r\n", "RemoteProtocolError"),
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "RemoteProtocolError"),
    "endless head": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000, "RemoteProtocolError"),
}


@pytest.mark.parametrize(("answer", "told"), FAULTS.values(), ids=FAULTS)
def test_a_bad_answer_is_a_reward_error_or_masked(answer, told):
    with healthy(answer) as url:
        remote = RemoteReward(url, on_failure="error", **ONCE)
        remote.timeout = SHORT if "timed" in told else LIMIT
        with pytest.raises(RewardError, match=told) as caught:
            remote(IMAGES, PROMPTS, METADATA)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and "pw" not in str(caught.value)
        remote.on_failure = "mask"
        with pytest.warns(UserWarning, match="2 images get no score"):
            assert remote(IMAGES, PROMPTS, METADATA).isnan().all()


def test_a_redirect_sends_nothing_to_the_other_host():
    reached = []
    with speaking(lambda connection: reached.append(1)) as other:
        with healthy(http(b"", "307 Temporary Redirect", Location=f"{other}/score")) as url:
            with pytest.raises(RewardError, match=f"redirect to {other}"):
                RemoteReward(url, **ONCE)(IMAGES, PROMPTS, METADATA)
        with speaking(lambda c: c.sendall(http(b"", "301 Moved", Location=other))) as url:
            with pytest.raises(ValueError, match=f"no reward server answers .*redirect to {other}"):
                RemoteReward(url, **ONCE)
    assert not reached


@pytest.mark.parametrize("name", [3, "", "x" * 101, "two\nlines", None])
def test_a_name_that_is_none_is_refused(name):
    with speaking(lambda c: c.sendall(http({"name": name}))) as url, pytest.raises(ValueError, match="gives no name"):
        RemoteReward(url, **ONCE)


def test_passwords_authenticate_and_are_shown_nowhere():
    heads = []

    async def health(request):
        heads.append(request.headers["authorization"])
        return JSONResponse({"name": "mean"})

    with serving(Starlette(routes=[Route("/health", health), Route("/score", health, methods=["POST"])])) as server:
        host = server.removeprefix("http://")
        url = f"http://alice:p%40w=1@{host}"
        ((label, (remote, weight)),) = parse_rewards([f"{url}=0.5"], {host: ONCE}).items()
        assert label == host and weight == 0.5 and reward_label(url) == host
        assert heads == ["Basic " + base64.b64encode(b"alice:p@w=1").decode()]
        with pytest.raises(RewardError) as caught:
            remote(IMAGES, PROMPTS, METADATA)
    told = [str(caught.value), repr(remote.addresses), remote.__name__]
    for item, options in ((f"{url}=half", {}), (f"{url}=nan", {}), (url, {host: {"tries": 1}}), (url, {host: ONCE})):
        with pytest.raises(ValueError) as error:
            parse_rewards([item], options)
        told.append(str(error.value))
    with pytest.raises(ValueError) as error:
        UnifiedReward(f"{url}/v1", max_retries=0)
    told.append(str(error.value))
    assert not any("alice" in text or "p%40w" in text or "p@w" in text for text in told), told
    assert all(host in text for text in (told[0], told[1], told[3], told[4], told[6], told[7]))


@pytest.mark.parametrize(
    "url",
    ["host:80", "ftp://host", "http://", "http://al:p/w@host", "http://host?token=1", "http://h:port", "http://a b"],
)
def test_what_is_no_address_is_refused_without_quoting_it(url):
    with pytest.raises(ValueError, match="must be http://host:port") as caught:
        parse_address(url)
    assert "p/w" not in str(caught.value) and "token=1" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_password_and_a_secret_are_one_too_many():
    with pytest.raises(ValueError, match="either the address's user and password or the secret"):
        RemoteReward("http://al:pw@127.0.0.1:1", secret="s")


@pytest.mark.parametrize(("answer", "told"), list(FAULTS.values())[:6], ids=list(FAULTS)[:6])
def test_a_judge_is_bounded_likewise(answer, told):
    with healthy(answer) as url:
        judge = UnifiedReward(f"{url}/v1", **ONCE)
        judge.timeout = SHORT if "timed" in told else LIMIT
        with pytest.raises(RewardError, match=told):
            judge(IMAGES[:1], PROMPTS[:1], METADATA[:1])


# The server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(reward=mean, **limits):
    with serving(make_app("mean", reward, **limits), **connection_bounds(limits.get("body_seconds", 60.0))) as url:
        yield url


def post(url, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(
        f"{url}/score", content=content, headers={"Content-Type": "application/json"} | headers, timeout=LIMIT
    )


def opened(url, sent):
    connection = socket.create_connection(url.removeprefix("http://").split(":"), timeout=LIMIT)
    connection.sendall(sent)
    return connection


IDLE = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"


def test_idle_and_dripping_connections_keep_nobody_waiting_and_are_closed():
    silent = [IDLE] * 20 + [b"POST /sc", b""] * 10
    with served(body_seconds=LIMIT) as url:
        idle = [opened(url, sent) for sent in silent]
        assert RemoteReward(url, **ONCE)(IMAGES, PROMPTS, METADATA).shape == (2,)  # before: 503, 16 are waiting
        for connection in idle:
            connection.close()
    with served(body_seconds=0.5) as url:
        idle, dripping = [opened(url, sent) for sent in silent], opened(url, IDLE)
        answers = [connection.recv(65536) for connection in idle]  # they end without another byte from here
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers[:20])
        assert all(answer == b"" for answer in answers[20:])
        with pytest.raises(OSError):
            for _ in range(18_000):  # LIMIT
                dripping.sendall(b" ")
                time.sleep(0.05)


def black(height, width):
    """A PNG's file of one colour: 1000 pixels a byte."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_pixels_are_bounded_before_they_are_decoded():
    """4096 x 4096 each, 256 of them: 51 GB as float32 in a request of 17 MB."""
    images = [black(4096, 4096)] * 256
    body = json.dumps({"format": "png", "shape": [3, 4096, 4096], "images": images, "prompts": ["a"] * 256}).encode()
    lying = {"format": "png", "shape": [3, 8, 8], "images": [images[0]], "prompts": ["a"]}
    with served() as url:
        assert post(url, MESSAGE).status_code == 200
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = post(url, body)
        assert answer.status_code == 400 and "256 images of 4096 x 4096 pixels" in answer.json()["error"]
        answer = post(url, lying)
        assert answer.status_code == 400 and "4096 x 4096 where 8 x 8 was announced" in answer.json()["error"]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 300 * 1024, f"{grown} KiB more"


def bomb():
    """A PNG whose header says 30000 x 30000, past Pillow's own limit."""
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return base64.b64encode(data).decode()


BAD = {
    "depth": (b"[" * 100_000, 400, "nested"),
    "depth in metadata": (MESSAGE | {"metadata": [{"a": json.loads("[" * 40 + "]" * 40)}, {}]}, 400, "nested"),
    "many values": (b"[" + b"[]," * 500_000 + b"[]]", 413, "1000000 values"),
    "pickle": (b"\x80\x04pickle", 400, ""),
    "list": (b"[]", 400, "a request is a JSON object"),
    "long number": (b'{"images": ' + b"9" * 5000 + b"}", 400, ""),
    "null": (b"null", 400, "not a NoneType"),
    "images an object": (MESSAGE | {"images": {"a": 1}}, 400, "needs images"),
    "images null": (MESSAGE | {"images": [None, None]}, 400, "can't be decoded"),
    "images cut": (MESSAGE | {"images": [text[:60] for text in MESSAGE["images"]]}, 400, "can't be decoded"),
    "format a list": (MESSAGE | {"format": ["png"]}, 400, "a format of png or raw"),
    "shape text": (MESSAGE | {"shape": "x" * 100_000}, 400, "shape must be"),
    "shape truth": (MESSAGE | {"shape": [3, True, True]}, 400, "shape must be"),
    "shape negative": (MESSAGE | {"shape": [3, -8, -8]}, 400, "at most"),
    "shape huge": (MESSAGE | {"shape": [3, 10**300, 8]}, 400, "at most"),
    "bomb": (MESSAGE | {"shape": [3, 4000, 4000], "images": [bomb()] * 2}, 400, "can't be decoded"),
    "raw NaN": (encode_images(IMAGES * torch.nan, "raw") | {"prompts": PROMPTS}, 400, "outside of"),
    "raw 255": (encode_images(IMAGES * 255, "raw") | {"prompts": PROMPTS}, 400, "outside of"),
    "surrogate": (MESSAGE | {"prompts": ["\ud800", "b"]}, 400, "surrogates"),
    "one prompt": (MESSAGE | {"prompts": ["a"]}, 400, "as many prompts"),
    "metadata text": (MESSAGE | {"metadata": "ab"}, 400, "as many metadata"),
    "too many": (MESSAGE | {"images": ["a"] * 257}, 413, "256 images"),
}


@pytest.fixture(scope="module")
def server():
    with served() as url:
        yield url


@pytest.mark.parametrize(("body", "status", "told"), BAD.values(), ids=BAD)
def test_a_bad_request_is_told_shortly_and_is_never_a_500(server, body, status, told):
    answer = post(server, body)
    assert answer.status_code == status and told in answer.json()["error"] and len(answer.content) < 700


def test_other_contents_and_too_long_ones_are_refused_before_they_are_read(server):
    assert post(server, MESSAGE, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(server, MESSAGE, **{"Content-Encoding": "gzip"}).status_code == 415
    assert post(server, MESSAGE, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200
    with opened(server, IDLE.replace(b"1000", b"999999999999")) as connection:  # of which one byte is sent
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert httpx2.get(f"{server}/score").status_code == 405 and httpx2.get(f"{server}/x").status_code == 404


def test_bodies_that_wait_are_bounded_together_and_give_their_place_back():
    part = IDLE.replace(b"1000", b"100000") + b" " * 90_000
    whole = json.dumps(MESSAGE).encode() + b" " * 30_000
    with served(max_bytes=100_000, body_seconds=LIMIT) as url:
        waiting = [opened(url, part) for _ in range(3)]
        answered = select.select(waiting, [], [], LIMIT)[0]
        assert [connection.recv(65536)[:13] for connection in answered] == [b"HTTP/1.1 503 "]
        for connection in waiting:
            connection.close()
        end = time.monotonic() + LIMIT
        while (status := post(url, whole).status_code) == 503 and time.monotonic() < end:
            pass  # until the server has seen that they went
        assert [status, *(post(url, whole).status_code for _ in range(9))] == [200] * 10, "of 300 kB nothing is held"


def test_more_than_the_requests_that_may_wait_are_told_to_come_back():
    entered, release = threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        entered.set()
        release.wait(LIMIT)
        return [0.0] * len(prompts)

    with served(slow, max_waiting=1) as url:
        first = threading.Thread(target=post, args=(url, MESSAGE))
        first.start()
        assert entered.wait(LIMIT)
        assert post(url, MESSAGE).status_code == 503
        release.set()
        first.join(LIMIT)
        assert post(url, MESSAGE).status_code == 200


# Each reward's own ----------------------------------------------------------------------------------------------


def in_place(images, prompts, metadata):
    """Normalise as careless rewards do."""
    values = images.mean((1, 2, 3)).clone()
    images.mul_(255)
    for row in metadata:
        row["boxes"].append(1)
        row["seen"] = True
    prompts[:] = ["?"] * len(prompts)
    return values


@pytest.mark.parametrize("order", [("careless", "plain"), ("plain", "careless")])
def test_what_a_reward_does_in_place_nobody_else_sees(order):
    """Before, the next reward of the dict was called with images in [0, 255]."""
    seen = []

    def plain(images, prompts, metadata):
        seen.append((images.max().item() <= 1, list(prompts), [dict(row) for row in metadata]))
        return images.mean((1, 2, 3))

    rewards, images = {"careless": in_place, "plain": plain}, IMAGES.clone()
    metadata = [{"boxes": []}] * 2  # one dict for the images of a group
    values = RewardSet({name: rewards[name] for name in order})(images, PROMPTS, metadata).values
    assert torch.equal(values[:, 0], values[:, 1]) and seen == [(True, PROMPTS, [{"boxes": []}] * 2)]
    assert torch.equal(images, IMAGES) and metadata == [{"boxes": []}] * 2


def test_a_retry_sees_what_the_first_call_saw():
    seen = []

    def failing(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), [row["boxes"].copy() for row in metadata]))
        in_place(images, prompts, metadata)
        if len(seen) < 3:
            raise TimeoutError("no answer")
        return [0.0] * 2

    with warnings.catch_warnings(action="ignore"):
        RewardSet(failing, max_retries=2, retry_delay=0.0)(IMAGES, PROMPTS, [{"boxes": []}, {"boxes": []}])
    assert len(seen) == 3 and all(torch.equal(images, IMAGES) for images, _, _ in seen)
    assert all(texts == PROMPTS and boxes == [[], []] for _, texts, boxes in seen)


def test_metadata_that_cannot_be_copied_is_shared_and_the_rest_is_not():
    lock, boxes = threading.Lock(), [1]

    def look(images, prompts, metadata):
        assert metadata[0]["lock"] is lock
        metadata[0]["boxes"].append(2)
        return [0.0]

    RewardSet(look)(IMAGES[:1], ["a"], [{"lock": lock, "boxes": boxes}])
    assert boxes == [1]


# Anything -------------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["png", "raw"]) | JSON,
        "shape": st.just([3, 8, 8]) | st.lists(st.integers(), min_size=3, max_size=3) | JSON,
        "images": st.just(MESSAGE["images"]) | st.lists(st.binary().map(lambda b: base64.b64encode(b).decode())) | JSON,
        "prompts": st.just(PROMPTS) | JSON,
        "metadata": st.just(METADATA) | JSON,
    },
)
REQUEST_BYTES = st.binary(max_size=99) | REQUESTS.map(lambda value: json.dumps(value).encode())
ANSWERS = st.binary(max_size=99) | JSON.map(lambda v: http(json.dumps(v).encode()))
ANSWERS |= (st.lists(LEAVES, max_size=3) | JSON).map(lambda v: http(json.dumps({"rewards": v}).encode()))
ANSWERS |= st.binary(max_size=99).map(http)
RETURNS = st.recursive(
    LEAVES
    | st.complex_numbers()
    | st.binary(max_size=3)
    | st.just(torch.ones(2))
    | st.just(torch.ones(2, dtype=torch.cfloat)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
) | st.lists(st.floats() | st.integers() | st.none(), min_size=2, max_size=2)
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def check_request(url, body):
    answer = post(url, body)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert isinstance(answer.json()["rewards" if answer.status_code == 200 else "error"], (list, str))


def check_answer(answer):
    with speaking(lambda connection: connection.sendall(answer)) as url:
        remote = object.__new__(RemoteReward)
        remote.addresses, remote.secret, remote.timeout = [parse_address(url)], None, LIMIT
        with contextlib.suppress(RewardError):
            values = remote._ask(remote.addresses[0], b"{}", 2)
            assert values.shape == (2,) and not values.isinf().any()


def check_return(value):
    with contextlib.suppress(RewardError), warnings.catch_warnings(action="ignore"):
        values = RewardSet(lambda images, prompts, metadata: value)(IMAGES, PROMPTS, METADATA).values
        assert values.shape == (2, 1) and values.dtype == torch.float64 and not values.isinf().any()


@settings(max_examples=40, suppress_health_check=FIXTURES)
@given(REQUEST_BYTES)
def test_any_request_is_scored_or_refused(server, body):
    check_request(server, body)


@settings(max_examples=40, suppress_health_check=FIXTURES)
@given(ANSWERS)
def test_any_answer_is_rewards_or_a_reward_error(answer):
    check_answer(answer)


@settings(max_examples=150, suppress_health_check=FIXTURES)
@given(RETURNS)
def test_any_return_is_rewards_or_a_reward_error(value):
    check_return(value)


def test_returns_that_broke_through():
    """10^400 was an OverflowError, a nested list a RecursionError, and a complex number lost its half."""
    nested = []
    for _ in range(100_000):
        nested = [nested]

    def failing():
        yield 1.0
        raise KeyError("seed")

    for value in ([10**400, 1], nested, torch.ones(2, dtype=torch.cfloat), failing(), torch.ones(2, device="meta")):
        with pytest.raises(RewardError, match="must return 2 numbers"):
            RewardSet(lambda images, prompts, metadata, value=value: value)(IMAGES, PROMPTS, METADATA)
    while nested:  # else its end is a recursion of 100,000
        nested = nested[0]


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=FIXTURES)
@given(REQUEST_BYTES)
def test_any_request_is_scored_or_refused_at_length(server, body):
    check_request(server, body)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=FIXTURES)
@given(ANSWERS)
def test_any_answer_is_rewards_or_a_reward_error_at_length(answer):
    check_answer(answer)


@pytest.mark.slow
@settings(max_examples=5000, suppress_health_check=FIXTURES)
@given(RETURNS)
def test_any_return_is_rewards_or_a_reward_error_at_length(value):
    check_return(value)


# The parts ------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_client():
    assert parse_address("https://a:b%2Fc@[::1]:8000/v1/").url == "https://[::1]:8000/v1"
    assert parse_address("https://a:b%2Fc@[::1]:8000/v1/").user == ("a", "b/c")
    assert without_userinfo("http://a:b@h1:1,http://c@h2/x@y") == "http://h1:1,http://h2/x@y"
    assert read_json(b'{"a": [1, null]}') == {"a": [1, None]} and read_json(b"[NaN]", nan=True)
    assert read_json(b"[" * 32 + b"]" * 32)
    with pytest.raises(WebError, match="127.0.0.1:1: "):
        fetch(parse_address("http://127.0.0.1:1"), deadline=LIMIT)
