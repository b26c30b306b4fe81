"""Which replica gets a request: the least loaded one, unless another has computed the beginning of its prompt.

The beginning of a prompt is cut into blocks of `BLOCK` bytes, and each block's hash covers everything before it, so
two prompts share a hash exactly as far as they agree. A table remembers which replicas have seen a hash. Of the
replicas that saw the longest known beginning, the least loaded one gets the request if its load stays within

    capacity = ceil((1 + SLACK * known share of the prompt) * mean load)

where the mean counts the new request. This is the rule of consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2016), with a slack in proportion to what a hit saves: a long conversation that returns may find its
replica half as busy again as the others (computing its prompt anew would cost them more than the wait), while a short
system prompt in front of a long question never outweighs the balance, and is soon known everywhere.

Otherwise the least loaded replica gets it. Among equals the highest of hash(first block, replica) wins (rendezvous
hashing): an idle service sends a prompt to the same replica whichever router asks, also after the router restarted.
"""

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

BLOCK = 512  # bytes: about 128 tokens of English, two pages of a GPU's cache; shorter prompts save next to nothing
MOST_BLOCKS = 64  # the first 32 KiB tell prompts apart, and take 0.1 ms to hash
SLACK = 0.5
ENTRIES = 1 << 16  # hashes remembered, about 15 MB: 1,000 prompts of the greatest length, 10,000 of 3 KiB
LARGEST_BODY = 4 << 20  # bytes; reading larger JSON would hold up all streams for longer than 20 ms

Choice = Literal["hit", "overloaded", "new"]


def prompt_blocks(body: bytes) -> list[bytes]:
    """Hashes of the beginnings of a request's prompt, shortest first; none if it is short or not understood."""
    if not BLOCK < len(body) <= LARGEST_BODY:
        return []
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return []  # the replica says what is wrong
    if not isinstance(request, dict):
        return []
    # What comes before the prompt in the cache's key, or in the template.
    seed = json.dumps([request.get(name) for name in ("model", "cache_salt", "tools")])
    text = prompt_head(request).encode("utf-8", "surrogatepass")
    digest, found = _digest(seed.encode()), []
    for start in range(0, min(len(text), BLOCK * MOST_BLOCKS) - BLOCK + 1, BLOCK):
        digest = _digest(digest + text[start : start + BLOCK])
        found.append(digest)
    return found


def prompt_head(request: Mapping[str, Any]) -> str:
    """The first characters of a conversation or a prompt (the first of several), as text that only has to be equal
    for equal beginnings."""
    most = BLOCK * MOST_BLOCKS
    messages, prompt = request.get("messages"), request.get("prompt")
    if isinstance(messages, list):
        pieces, length = [], 0
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            content = fields.get("content")
            text = content if isinstance(content, str) else json.dumps(content)
            pieces += [f"\n{fields.get('role')}: ", text[:most]]
            length += len(pieces[-1])
            if length >= most:
                break
        return "".join(pieces)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return ",".join(map(str, prompt[:most]))
    return prompt[:most] if isinstance(prompt, str) else ""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


class Affinity:
    """The table of beginnings and the choice; see the top of the file."""

    def __init__(self, entries: int = ENTRIES):
        self._seen: OrderedDict[bytes, int] = OrderedDict()  # hash -> bit set of replicas
        self._entries = entries

    def choose(self, loads: Mapping[int, int], blocks: Sequence[bytes]) -> tuple[int, Choice]:
        """A replica out of `loads` (number -> requests it has; not empty), and why it is this one."""
        depth, holders = self._holders(loads, blocks)
        if depth:
            mean = (sum(loads.values()) + 1) / len(loads)
            capacity = math.ceil((1 + SLACK * depth / len(blocks)) * mean)
            nearest = min(holders, key=lambda index: loads[index])
            if loads[nearest] + 1 <= capacity:
                return nearest, "hit"
        key, lowest = blocks[0] if blocks else os.urandom(8), min(loads.values())
        equals = [index for index, load in loads.items() if load == lowest]
        return max(equals, key=lambda index: _digest(key + b"%d" % index)), "overloaded" if depth else "new"

    def _holders(self, loads: Mapping[int, int], blocks: Sequence[bytes]) -> tuple[int, list[int]]:
        """Blocks of the longest beginning that one of these replicas has seen, and which ones have."""
        depth, holders = 0, []
        for number, block in enumerate(blocks, 1):
            seen = self._seen.get(block, 0)
            now = [index for index in loads if seen >> index & 1]
            if not now:
                break
            depth, holders = number, now
        return depth, holders

    def remember(self, blocks: Sequence[bytes], index: int) -> None:
        """A replica computes this prompt; the longest unused beginnings are forgotten first."""
        for block in reversed(blocks):
            self._seen[block] = self._seen.get(block, 0) | 1 << index
            self._seen.move_to_end(block)
        while len(self._seen) > self._entries:
            self._seen.popitem(last=False)

    def forget(self, index: int) -> None:
        """A replica has lost its cache."""
        keep = ~(1 << index)
        left = {block: seen & keep for block, seen in self._seen.items()}
        self._seen = OrderedDict((block, seen) for block, seen in left.items() if seen)
