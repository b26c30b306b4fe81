"""`jaxserve router`: one endpoint in front of several servers."""

import argparse
import logging
from typing import Any
from urllib.parse import urlsplit

from jaxserve.cli import flags, from_environment

DESCRIPTION = """Route OpenAI's API to several servers: to the least busy one, or to one that knows the prompt already.

Keys are the servers' business; the router passes them on. Its own questions about their queues carry the first
--api-key, or JAXSERVE_API_KEY (or VLLM_API_KEY)."""

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="+", metavar="URL", help="of a replica, such as http://10.0.0.5:8000")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    server.add_argument("--uds", metavar="PATH", help="Unix socket to listen on instead")
    server.add_argument("--root-path", default="", metavar="PATH", help="under which a proxy serves this")
    server.add_argument("--shutdown-timeout", type=float, default=0.0, metavar="S",
                        help="seconds that running requests may take after SIGTERM (default: 0)")  # fmt: skip
    server.add_argument("--ssl-keyfile", metavar="PATH", help="private key for TLS")
    server.add_argument("--ssl-certfile", metavar="PATH", help="certificate for TLS")
    server.add_argument("--ssl-ca-certs", metavar="PATH", help="certificates of authorities accepted for clients")
    server.add_argument(
        "--max-body-mb", type=float, default=32.0, metavar="X", help="larger bodies get 413 (default: 32)"
    )
    server.add_argument("--disable-access-log", action="store_true", help="no line for each request")
    server.add_argument("--metrics-prefix", default="jaxserve", metavar="NAME",
                        help="of the router's own names in /metrics (default: jaxserve)")  # fmt: skip
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--api-key", metavar="KEY", help="for the router's own questions")
    replicas.add_argument("--check-interval", type=float, default=2.0, metavar="S",
                          help="seconds between health checks (default: 2)")  # fmt: skip
    replicas.add_argument("--replica-ca-certs", metavar="PATH", help="certificates of authorities of https URLs")


def run(args: argparse.Namespace) -> int:
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    if not 0 <= args.port < 65536:
        raise flags.UsageError(f"--port must be in [0, 65535], got {args.port}")
    if not 0 < args.check_interval < float("inf"):
        raise flags.UsageError(f"--check-interval must be above 0 seconds, got {args.check_interval:g}")
    urls = [parse_url(text) for text in args.urls]
    twice = [url for number, url in enumerate(urls) if url in urls[:number]]
    if twice:
        raise flags.UsageError(f"{twice[0]} is given twice")
    from jaxserve.server.router_lifecycle import Replicas, route

    key = next(
        iter(([args.api_key] if args.api_key else []) + from_environment("JAXSERVE_API_KEY", "VLLM_API_KEY")), None
    )
    replicas = Replicas(urls, key=key, ca_certs=args.replica_ca_certs, check_seconds=args.check_interval)
    return route(replicas, _options(args))


def _options(args: argparse.Namespace) -> Any:
    from jaxserve.server.middleware import Keys
    from jaxserve.server.options import AppOptions, Limits, ServerOptions

    size = int(args.max_body_mb * MIB)
    app = AppOptions(Keys([]), Keys([]), max_body_bytes=size, access_log=not args.disable_access_log)
    names = ("host", "port", "uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "root_path", "shutdown_timeout",
             "metrics_prefix")  # fmt: skip
    return ServerOptions(app, Limits(), **{name: getattr(args, name) for name in names})


def parse_url(text: str) -> str:
    """A replica's base URL, as given by a user; `/v1` at its end is dropped.

    Raises:
        UsageError: it is no http(s) URL, or holds a user, a query or a fragment.
    """
    try:
        parts = urlsplit(text)
        bad = parts.port == 0
    except ValueError as error:
        raise flags.UsageError(f"{text!r} is not a URL: {error}") from None
    if bad or parts.scheme not in ("http", "https") or not parts.hostname or not text.isascii():
        raise flags.UsageError(f"{text!r} is not the URL of a replica; write it as http://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise flags.UsageError(f"the URL of {parts.hostname!r} must not hold a user, a query or a fragment")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
