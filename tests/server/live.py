"""Live servers in processes of their own, as users start them."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

KEY, ADMIN_KEY = "key-of-a-caller", "key-of-an-admin"


@dataclass
class Live:
    """A running `jaxserve serve`."""

    process: subprocess.Popen
    url: str
    lines: list[str] = field(default_factory=list)

    def http(self, key: str | None = KEY) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics, by name and the labels that are not the same everywhere: `name label=value`."""
        with self.http() as http:
            text = http.get("/metrics").text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [
                    f"{key}={value}" for key, value in sample.labels.items() if key not in ("model_name", "engine")
                ]
                found[" ".join([sample.name, *labels])] = sample.value
        return found

    def metric(self, name: str) -> float:
        """A number of /metrics without further labels."""
        return self.metrics()[name]

    def settles(self, running: float = 0.0) -> None:
        """Wait until the engine runs so many sequences."""
        end = time.monotonic() + 30
        while self.metric("jaxserve:num_requests_running") != running:
            assert time.monotonic() < end, "\n".join(self.lines[-20:])
            time.sleep(0.05)


@contextmanager
def serve(*flags: str, command: Sequence[str] | None = None) -> Iterator[Live]:
    """Start a server on a free port (or by a command), wait until it is ready, and end it."""
    command = command or [sys.executable, "-m", "jaxserve", "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    live, found = Live(process, ""), queue.SimpleQueue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            live.lines.append(line.rstrip())
            if "ready at " in line:
                found.put(line.split("ready at ")[1].strip())
        found.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        live.url = found.get(timeout=120)
        assert live.url, "\n".join(live.lines)
        yield live
    finally:
        process.kill()
        process.wait()
        thread.join()
        assert process.stderr is not None
        process.stderr.close()


def warm(live: Live, rank: int = 0) -> None:
    """Have the largest programs compiled first: they serve what is smaller, and compiling is most of the time here."""
    wanted = {"logprobs": 1, "prompt_logprobs": 1, "temperature": 1}
    body = {"prompt": list(range(100, 140)), "n": 4, "max_tokens": 3} | wanted
    with live.http() as http:
        headers = {"X-data-parallel-rank": str(rank)}
        assert http.post("/v1/completions", json=body, headers=headers, timeout=120).status_code == 200
