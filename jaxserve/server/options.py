"""How a server behaves, apart from its engine; imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.server.middleware import Keys


@dataclass(frozen=True)
class Limits:
    """What the server takes on. `None` is no limit; `request_timeout` is in seconds."""

    max_queue_requests: int | None = None
    max_queue_tokens: int | None = None
    request_timeout: float | None = None


@dataclass(frozen=True)
class AppOptions:
    """How the routes behave, apart from the engine.

    Attributes:
        keys, admin_keys: of callers; without admin keys there are no admin routes.
        max_body_bytes: larger bodies are refused.
        strict: refuse unknown fields instead of naming them in the header `X-Ignored-Fields`.
        allowed_origins: of other web sites (CORS); none by default.
        docs: serve FastAPI's pages about the routes.
        profile_folder: where `/start_profile` writes.
    """

    keys: Keys
    admin_keys: Keys
    max_body_bytes: int
    strict: bool = False
    access_log: bool = True
    allowed_origins: Sequence[str] = ()
    docs: bool = True
    profile_folder: str | None = None


@dataclass(frozen=True)
class ServerOptions:
    """Everything about the server that is not about the engine.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        ssl_keyfile, ssl_certfile, ssl_ca_certs: files for TLS.
        root_path: under which a proxy serves this.
        shutdown_timeout: seconds that running requests may take after the first SIGTERM.
        metrics_prefix: of Prometheus names.
        response_role: of chat answers.
        engine_process: whether the engine has a process of its own rather than a thread.
    """

    app: AppOptions
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    root_path: str = ""
    shutdown_timeout: float = 0.0
    metrics_prefix: str = "jaxserve"
    response_role: str = "assistant"
    engine_process: bool = True


def read_keys(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """API keys from the command line and from files with one on each line.

    Raises:
        ValueError: a file holds none, or a key is empty.
    """
    keys = list(given)
    for name in files:
        with open(name, encoding="utf-8") as file:
            found = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{name} holds no API key")
        keys += found
    if any(not key.strip() for key in keys):
        raise ValueError("an API key is empty")
    return keys
