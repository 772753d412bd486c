"""Benchmark serving: requests and tokens per second of `cocomix serve` and `transformers serve`, with several clients.

python benchmarks/serve.py --shape small

All servers serve models of random weights with the same width and depth, and wait while another one is measured. Each
client sends one request after another: a prompt of words at temperature 0, steered if the server's line says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import measuring
import shapes
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OURS, THEIRS = "cocomix", "transformers.cli.transformers"
START_SECONDS, TIMEOUT = 600, 600.0

BATCHING = ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "1024"]
"""Without the sizes, the cache takes most of a machine's memory."""


class Case(NamedTuple):
    """A server and its model."""

    server: str
    model: str
    module: str
    options: Sequence[str] = ()
    steered: bool = False


CASES = (
    Case("cocomix serve", "plain", OURS),
    Case("transformers serve", "plain", THEIRS),
    Case("transformers serve --continuous-batching", "plain", THEIRS, BATCHING),
    Case("cocomix serve", "add", OURS),
    Case("cocomix serve, each request steered", "add", OURS, steered=True),
    Case("cocomix serve", "interleave", OURS),
)


class Load(NamedTuple):
    """What the clients ask for."""

    clients: int
    requests: int
    prompt: int
    new_tokens: int


def save_models(shape: shapes.Shape, positions: int, folder: Path) -> None:
    """Save the models, each with a tokenizer of words."""
    words = Tokenizer(models.WordLevel({f"w{each}": each for each in range(shape.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    for name in ("plain", "add", "interleave"):
        torch.manual_seed(0)
        model = (
            shapes.plain(shape, positions) if name == "plain" else shapes.cocomix_model(shape, positions, mixing=name)
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@contextlib.contextmanager
def running(case: Case, folder: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """Start a server; yield a client of it, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", case.module, "serve", str(folder / case.model), "--port", str(port)]
    nowhere = subprocess.DEVNULL
    server = subprocess.Popen([*command, *case.options], stdout=nowhere, stderr=nowhere)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=TIMEOUT) as client:
            yield client, server
    finally:
        server.terminate()
        server.wait()


def wait_for(client: httpx.Client, server: subprocess.Popen[bytes]) -> httpx.Client:
    """Wait until a server answers, and return its client."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            client.get("/models")
            return client
        time.sleep(0.2)
    raise RuntimeError("a server did not start; run its command by itself to see why")


def ask(client: httpx.Client, case: Case, model: Path, load: Load, number: int) -> int:
    """Send a request; return the number of new tokens."""
    prompt = " ".join(f"w{1 + (number * 131 + each * 17) % 499}" for each in range(load.prompt))
    name = str(model) if case.module == THEIRS else model.name
    body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": load.new_tokens, "temperature": 0}
    if case.steered:
        body["steering"] = [f"{number % 200}=+8"]
    answer = client.post("/completions", json=body)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def put_under_load(client: httpx.Client, case: Case, model: Path, load: Load) -> tuple[int, float]:
    """Let the clients send their requests; return the number of new tokens and the seconds."""
    with ThreadPoolExecutor(load.clients) as clients:  # each has one request at a time
        start = time.perf_counter()
        tokens = sum(clients.map(lambda number: ask(client, case, model, load, number), range(load.requests)))
        return tokens, time.perf_counter() - start


def measure(cases: Sequence[Case], loads: list[Load], folder: Path, repeats: int) -> list[tuple[object, ...]]:
    """Measure all servers in turn under each load."""
    rows: list[tuple[object, ...]] = []
    with contextlib.ExitStack() as servers:
        started = [servers.enter_context(running(case, folder)) for case in cases]
        clients = [wait_for(*each) for each in started]
        for load in loads:
            found: list[list[tuple[int, float]]] = [[] for _ in cases]
            for round_ in range(repeats + (load == loads[0])):
                for at, (case, client) in enumerate(zip(cases, clients, strict=True)):
                    measured = put_under_load(client, case, folder / case.model, load)
                    if round_ or load != loads[0]:  # the first round of all warms up
                        found[at].append(measured)
            for case, measurements in zip(cases, found, strict=True):
                requests = statistics.median(load.requests / seconds for _, seconds in measurements)
                tokens = statistics.median(new / seconds for new, seconds in measurements)
                best = max(new / seconds for new, seconds in measurements)
                rows.append((case.server, case.model, load.clients, requests, tokens, best))
    return rows


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompt", type=int, default=32, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="servers and models to measure: 'cocomix serve, add'"
    )
    arguments = parser.parse_args()
    cases = [case for case in CASES if re.search(arguments.only, f"{case.server}, {case.model}")]
    loads = [
        Load(clients, clients * arguments.requests, arguments.prompt, arguments.new_tokens)
        for clients in arguments.clients
    ]
    folder = Path(tempfile.mkdtemp(prefix="serve-"))
    load_before = os.getloadavg()
    try:
        save_models(shapes.SHAPES[arguments.shape], arguments.prompt + arguments.new_tokens, folder)
        rows = measure(cases, loads, folder, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    columns = ("server", "model", "clients", "requests/s", "tokens/s", "best tokens/s")
    sizes = {"shape": arguments.shape, "prompt": arguments.prompt, "new_tokens": arguments.new_tokens}
    machine = {"load_average_before": load_before, "load_average_after": os.getloadavg()}
    measuring.finish(arguments, columns, rows, requests_per_client=arguments.requests, **sizes, **machine)


if __name__ == "__main__":
    main()
