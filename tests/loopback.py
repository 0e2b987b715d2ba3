"""Servers for tests: on 127.0.0.1, on a port that is free, in a thread."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import uvicorn

LIMIT = 900.0  # seconds, by which a test that hangs ends; nothing else is decided by it


@contextmanager
def serving(app, **options):
    """`http://127.0.0.1:port` of an ASGI application, while the context lasts; `options` are uvicorn's."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=LIMIT)


@contextmanager
def speaking(talk):
    """`http://127.0.0.1:port` of a server that reads each request's head and hands its socket to `talk`."""
    listener, threads = socket.create_server(("127.0.0.1", 0)), []

    def answer(connection):
        connection.settimeout(LIMIT)
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (part := connection.recv(65536)):
                head += part
            talk(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # what is unread when a socket is closed makes the other side lose the answer
                pass

    def accept():
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True))
                threads[-1].start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http(body, status="200 OK", **headers):
    """The bytes of an answer whose body is given as bytes or as what becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def closed_port():
    """An address at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
