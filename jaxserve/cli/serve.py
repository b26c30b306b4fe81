"""`jaxserve serve`: answer HTTP requests as OpenAI's API does."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.cli import environment, flags, from_environment, set_up_output
from jaxserve.config.options import parse_count

DESCRIPTION = """Serve a model over HTTP: OpenAI's completions and chats, with vLLM's additional fields.

Keys are also read from JAXSERVE_API_KEY and JAXSERVE_ADMIN_API_KEY (or VLLM_API_KEY)."""

MIB = 1 << 20
DEVICES = "CUDA_VISIBLE_DEVICES"
KEY_NAMES = ("JAXSERVE_API_KEY", "VLLM_API_KEY")
ROUTER_OPTIONS = ("--host", "--port", "--uds", "--root-path", "--replicas", "--shutdown-timeout", "--ssl-keyfile",
                  "--ssl-certfile", "--ssl-ca-certs")  # fmt: skip
SERVER_NAMES = ("shutdown_timeout",)  # which vLLM counts among the engine's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="folder, GGUF file or hub id; as --model")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    server.add_argument("--uds", metavar="PATH", help="Unix socket to listen on instead")
    server.add_argument("--root-path", default="", metavar="PATH", help="under which a proxy serves this")
    server.add_argument("--shutdown-timeout", type=float, default=0.0, metavar="S",
                        help="seconds that running requests may take after SIGTERM (default: 0)")  # fmt: skip
    server.add_argument("--response-role", default="assistant", metavar="ROLE", help="of chats (default: assistant)")
    server.add_argument("--disable-fastapi-docs", action="store_true", help="no pages about the routes")
    server.add_argument("--profile-dir", metavar="PATH", help="where /start_profile writes traces")
    server.add_argument("--replicas", type=flags.reader(parse_count), default=1, metavar="N",
                        help="processes with a copy of the model each, behind one endpoint (default: 1)")  # fmt: skip
    server.add_argument("--disable-frontend-multiprocessing", action="store_true",
                        help="run the engine in a thread rather than a process of its own")  # fmt: skip
    server.add_argument("--exit-with-stdin", action="store_true", help=argparse.SUPPRESS)
    access = parser.add_argument_group("access")
    access.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    access.add_argument("--api-key-file", action="append", default=[], metavar="PATH", help="with one key on each line")
    access.add_argument("--admin-api-key", action="append", default=[], metavar="KEY",
                        help="switches on /reset_prefix_cache, /start_profile and /stop_profile")  # fmt: skip
    access.add_argument("--ssl-keyfile", metavar="PATH", help="private key for TLS")
    access.add_argument("--ssl-certfile", metavar="PATH", help="certificate for TLS")
    access.add_argument("--ssl-ca-certs", metavar="PATH", help="certificates of accepted authorities")
    access.add_argument("--allowed-origins", type=_names, default=[], metavar="URL,...",
                        help="web sites whose pages may call this; * is all (default: none)")  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue-requests", type=flags.reader(parse_count), metavar="N",
                        help="more waiting requests are refused with 429")  # fmt: skip
    limits.add_argument("--max-queue-tokens", type=flags.reader(parse_count), metavar="N",
                        help="as many waiting tokens refuse further requests with 429")  # fmt: skip
    limits.add_argument("--request-timeout", type=float, metavar="S", help="seconds until a request ends with 504")
    limits.add_argument(
        "--max-body-mb", type=float, default=32.0, metavar="X", help="larger bodies get 413 (default: 32)"
    )
    limits.add_argument("--strict-requests", action="store_true",
                        help="refuse unknown fields; else the header X-Ignored-Fields names them")  # fmt: skip
    logs = parser.add_argument_group("logs and metrics")
    logs.add_argument("--disable-access-log", action="store_true", help="no line for each request")
    logs.add_argument("--metrics-prefix", default="jaxserve", metavar="NAME",
                      help="of names in /metrics; vllm fits its dashboards (default: jaxserve)")  # fmt: skip
    flags.add_engine_flags(parser, skip=SERVER_NAMES)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def show_logs() -> None:
    """Say what a server's processes do."""
    set_up_output(verbose=True)
    logging.getLogger("pallas_kernels").setLevel(logging.INFO)


def run(args: argparse.Namespace) -> int:
    show_logs()
    if args.request_timeout is not None and args.request_timeout <= 0:
        raise flags.UsageError(f"--request-timeout must be above 0 seconds, got {args.request_timeout:g}")
    if args.replicas < 1:
        raise flags.UsageError(f"--replicas must be at least 1, got {args.replicas}")
    if not 0 <= args.port < 65536:
        raise flags.UsageError(f"--port must be in [0, 65535], got {args.port}")
    if args.model_tag is not None:
        setattr(args, flags.ENGINE + "model", args.model_tag)
    from jaxserve.server.ending import EarlyEnd

    with EarlyEnd() as ending:
        options, engine = _options(args), flags.engine_args(args)
        if args.replicas > 1:
            return _route(args, options, ending)
        if args.exit_with_stdin:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        return _serve(engine, options, ending)


def _serve(engine: Any, options: Any, ending: Any) -> int:
    from jaxserve.server.listen import bind, unlink

    with bind(options) as bound:  # before anything that takes seconds
        ending.first(lambda: unlink(options))
        from jaxserve.server.lifecycle import serve

        try:
            return serve(engine, options, bound, ending, show_logs)
        finally:
            unlink(options)


def _end_with_stdin() -> None:
    """End this process as SIGTERM does when whoever holds the other end of its standard input is gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _route(args: argparse.Namespace, options: Any, ending: Any) -> int:
    """Start the replicas, each with the same options on a port of its own, and route to them."""
    from jaxserve.server.options import read_keys
    from jaxserve.server.router_children import Command
    from jaxserve.server.router_lifecycle import Replicas, route

    own = ("--host", "127.0.0.1", "--port", "0", "--disable-access-log", "--exit-with-stdin")
    words = [sys.executable, "-m", "jaxserve", "serve", *own, *replica_words(args.words)]
    variables = environment()
    shares = split_devices(cuda_devices(variables), args.replicas)
    commands = [Command(words, variables | ({DEVICES: share} if share else {})) for share in shares]
    keys = read_keys(args.api_key, args.api_key_file) + from_environment(*KEY_NAMES)
    replicas = Replicas(commands=commands, key=next(iter(keys), None))
    ending.release()
    return route(replicas, options)


def replica_words(words: Sequence[str]) -> list[str]:
    """The command line without what is the router's alone; each of these options has a value."""
    found, rest = [], iter(flags.dashes(words))
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in ROUTER_OPTIONS:
            found.append(word)
        elif not equals:
            next(rest, None)
    return found


def cuda_devices(variables: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that a process with these variables may use, none where jax is told not to."""
    platforms = variables.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"}.intersection(platforms.split(",")):
        return []
    visible = variables.get(DEVICES)
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(index) for index in range(sum(1 for _ in Path("/dev").glob("nvidia[0-9]*")))]


def split_devices(devices: Sequence[str], replicas: int) -> list[str]:
    """Each replica's share of the devices, as CUDA_VISIBLE_DEVICES wants it; "" for each if there are none.

    Raises:
        UsageError: the shares would not be equal.
    """
    if len(devices) % replicas:
        shown = ", ".join(devices)
        raise flags.UsageError(
            f"--replicas {replicas} cannot share {len(devices)} GPUs evenly ({shown}); change it, or {DEVICES}"
        )
    each = len(devices) // replicas
    return [",".join(devices[i * each : (i + 1) * each]) for i in range(replicas)]


def _options(args: argparse.Namespace) -> Any:
    from jaxserve.server.middleware import Keys
    from jaxserve.server.options import AppOptions, Limits, ServerOptions, read_keys

    environment = from_environment(*KEY_NAMES)
    admin = from_environment("JAXSERVE_ADMIN_API_KEY")
    app = AppOptions(
        keys=Keys(read_keys(args.api_key, args.api_key_file) + environment),
        admin_keys=Keys(args.admin_api_key + admin),
        max_body_bytes=int(args.max_body_mb * MIB),
        strict=args.strict_requests,
        access_log=not args.disable_access_log,
        allowed_origins=args.allowed_origins,
        docs=not args.disable_fastapi_docs,
        profile_folder=args.profile_dir,
    )
    limits = Limits(args.max_queue_requests, args.max_queue_tokens, args.request_timeout)
    names = ("host", "port", "uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "root_path", "shutdown_timeout",
             "metrics_prefix", "response_role")  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    return ServerOptions(app, limits, engine_process=not args.disable_frontend_multiprocessing, **values)
