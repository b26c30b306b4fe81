"""Overload a server for minutes, with clients that leave and bodies that are broken, and see whether it stays whole.

    python scripts/soak_server.py [--minutes 10] [--output FILE.json] [-- flags of `jaxserve serve`]

The sustainable rate is measured first with a few clients that wait for their answers; then requests arrive at random,
twice as often. 20 % of the clients leave after a random time, 5 % send something broken. At the end nothing may run,
wait or hold a page, nobody may have got a 5xx, and the server's memory may have grown by 5 % at most since the first
third. Exit code 0 if all of that holds.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

ADMIN = "soak"
BROKEN = (
    b"{",
    b"[]",
    b"[" * 9999,
    b'{"prompt": 1}',
    b'{"messages": [{}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "model": "none"}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 100000}',
)
JSON = {"Content-Type": "application/json"}


def start(flags: list[str]) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "jaxserve", "serve", "--port", "0", "--admin-api-key", ADMIN, *flags]
    process = subprocess.Popen([*command, "--disable-access-log"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if "ready at " in line:
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            return process, line.split("ready at ")[1].strip()
    raise RuntimeError("the server did not start")


def read(text: str, name: str) -> float:
    """A number of /metrics."""
    return float(re.findall(rf"^jaxserve:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[0])


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that the server and its engine hold."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in (process.pid, *listed.split())]
    return sum(int(kib) for text in texts for kib in re.findall(r"VmRSS:\s+(\d+) kB", text)) * 1024


def body(rng: random.Random) -> dict:
    """A request of a random kind and size."""
    words = " ".join(
        rng.choice(("one", "river", "the", "small", "robots", "of", "light")) for _ in range(rng.randint(1, 60))
    )
    common = {"max_tokens": rng.randint(1, 40), "temperature": rng.choice((0, 0.8)), "stream": rng.random() < 0.6}
    if rng.random() < 0.3:
        common |= {"stop": rng.sample(("a", "the", ".", "\n"), 2)}
    if rng.random() < 0.2:
        common |= {"logprobs": True, "top_logprobs": 2}
    return {"messages": [{"role": "user", "content": words}], **common}


async def post(client: httpx.AsyncClient, content: bytes, patience: float, seen: Counter) -> None:
    """One client; it leaves after `patience` seconds."""
    try:
        async with asyncio.timeout(patience), client.stream(
            "POST", "/v1/chat/completions", content=content, headers=JSON
        ) as answer:  # fmt: skip
            text = await answer.aread()
            seen["event error" if b'"error"' in text and answer.status_code == 200 else str(answer.status_code)] += 1
    except TimeoutError:
        seen["left"] += 1
    except httpx.HTTPError as error:
        seen[type(error).__name__] += 1


async def sustainable(client: httpx.AsyncClient, seconds: float, clients: int) -> float:
    """Requests per second when that many clients send one after the other."""
    rng, seen, end = random.Random(0), Counter(), time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < end:
            await post(client, json.dumps(body(rng)).encode(), 1e9, seen)

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(clients)))
    return seen["200"] / (time.monotonic() - began)


async def soak(url: str, process: subprocess.Popen, minutes: float) -> dict:
    """Everything after the start; returns the report."""
    rng, seen, memory = random.Random(1), Counter(), []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client, asyncio.TaskGroup() as group:
        compiled, before = 0.0, -1.0
        while compiled > before:  # programs come with the first requests
            await sustainable(client, 15, 16)
            before, compiled = compiled, read((await client.get("/metrics")).text, "compilations_total")
        rate = 2 * await sustainable(client, 20, 16)
        began = time.monotonic()
        while (now := time.monotonic() - began) < minutes * 60:
            await asyncio.sleep(rng.expovariate(rate))
            broken, leaves = rng.random() < 0.05, rng.random() < 0.2
            content = rng.choice(BROKEN) if broken else json.dumps(body(rng)).encode()
            group.create_task(post(client, content, rng.uniform(0.01, 3) if leaves else 1e9, seen))
            if len(memory) < now / 5:
                memory.append(resident(process))
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        text = (await client.get("/metrics")).text
        whole = (await client.post("/reset_prefix_cache")).json()["reset"]
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total",
             "generation_tokens_total", "compilations_after_warmup_total")  # fmt: skip
    left = {name: read(text, name) for name in names}
    third = memory[len(memory) // 3]
    return {
        "minutes": minutes,
        "requests_per_second": round(rate, 2),
        "requests": sum(seen.values()),
        "answers": dict(seen),
        "at_the_end": left,
        "no_page_held": whole,
        "memory_mib": [round(size / 2**20) for size in memory[:: max(len(memory) // 12, 1)]],
        "memory_growth": round(memory[-1] / third - 1, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of the server")
    args = parser.parse_args()
    flags = args.flags or ["--max-model-len", "512", "--max-num-seqs", "16", "--max-queue-requests", "32"]
    process, url = start(flags)
    try:
        report = {"server": flags} | asyncio.run(soak(url, process, args.minutes))
    finally:
        process.terminate()
    report["exit_code"] = process.wait(30)
    bad = sum(count for kind, count in report["answers"].items() if kind.startswith("5") or kind == "event error")
    idle = not any(report["at_the_end"][name] for name in ("num_requests_running", "num_requests_waiting"))
    good = not bad and idle and report["no_page_held"] and report["memory_growth"] <= 0.05 and not report["exit_code"]
    print(json.dumps(report, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
