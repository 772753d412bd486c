"""Load the page of a run with many clients: is each answer what its client would get alone, and is memory flat?

    python benchmarks/page_load.py runs/quickstart/students/cocomix --clients 50 --seconds 60

Each client is a session that keeps a heartbeat open like a browser tab, steers another concept, and generates without a
pause. When the page answers that it is busy, the client tries again after a second.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from measuring import flatness

from cocomix.common import environment, files

TIMEOUT = 120.0
JOIN = "/gradio_api/queue/join"


def completed(client: httpx.Client, session: str) -> dict[str, Any]:
    """Return the last message of the only event of a session: its `success` and its `output`."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    raise ValueError("the page ended the stream before the event")


class Visitor:
    """A session that steers one concept.

    Args:
        address: address of the page.
        functions: the page's functions by name, with their number, trigger, and number of inputs.
        number: number of the visitor, which determines concept, strength and seed.
        concepts: number of concepts of the model.
    """

    def __init__(self, address: str, functions: dict[str, dict[str, Any]], number: int, concepts: int) -> None:
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)
        self.functions, self.number, self.concept = functions, number, 7 * number % concepts
        self.session, self.answers, self.seconds = f"visitor{number}", Counter[str](), list[float]()

    def ask(self, name: str, data: list[Any], clicked: dict[str, str] | None = None) -> list[Any] | None:
        """Run a function of the page, and return its outputs; None if the page is busy."""
        function = self.functions[name]
        event = {"fn_index": function["id"], "trigger_id": function["targets"][0][0], "session_hash": self.session}
        answer = self.client.post(JOIN, json=event | {"data": data, "event_data": clicked})
        if answer.status_code == 503:
            return None
        answer.raise_for_status()
        message = completed(self.client, self.session)
        if not message["success"]:
            raise ValueError(f"the page failed: {message}")
        return message["output"]["data"]

    def steer(self) -> None:
        """Choose the concept, which the page remembers for the session."""
        sliders = len(self.functions["add"]["inputs"]) - 1
        assert self.ask("add", [None, *[0] * sliders], {"concept": str(self.concept)}) is not None

    def generate(self) -> list[Any] | None:
        """Return the plain and the steered text as the page shows them; None if it is busy."""
        sliders = len(self.functions["generate"]["inputs"]) - 6
        strengths = [self.number % 41 - 20, *[0] * (sliders - 1)]
        found = self.ask("generate", ["The river", 16, 0.8, 1, self.number, None, *strengths])
        return None if found is None else found[1:]

    def visit(self, until: float, alone: list[Any]) -> None:
        """Generate until a time, and count the answers."""
        with self.client.stream("GET", f"/gradio_api/heartbeat/{self.session}"):
            while time.monotonic() < until:
                start = time.monotonic()
                try:
                    found = self.generate()
                except (httpx.HTTPError, ValueError) as error:
                    self.answers[f"failed: {error}"] += 1
                    continue
                if found is None:
                    self.answers["busy"] += 1
                    time.sleep(1)
                    continue
                self.answers["as alone" if found == alone else "different"] += 1
                self.seconds.append(time.monotonic() - start)


def measure(run: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Start the page, load it, and return counts, seconds per answer, and memory in MB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    concepts = files.read_json(run / "config.json")["num_concepts"]
    command = [sys.executable, "-m", "cocomix", "app", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line.startswith("Page: "):
                raise SystemExit(f"the page did not start: {line}")
            return _loaded(f"http://127.0.0.1:{port}", psutil.Process(server.pid), clients, seconds, concepts)
        finally:
            server.terminate()


def _loaded(address: str, server: psutil.Process, clients: int, seconds: float, concepts: int) -> dict[str, Any]:
    config = httpx.get(f"{address}/config", timeout=TIMEOUT).json()
    functions = {each["api_name"]: each for each in config["dependencies"]}
    visitors = [Visitor(address, functions, number, concepts) for number in range(clients)]
    for visitor in visitors:
        visitor.steer()
    alone = [visitor.generate() for visitor in visitors]
    assert None not in alone, "the page is busy without load"
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=visitor.visit, args=(until, expected))
        for visitor, expected in zip(visitors, alone, strict=True)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until:
        memory.append(server.memory_info().rss / 1e6)
        time.sleep(1)
    for thread in threads:
        thread.join()
    answers = sum((visitor.answers for visitor in visitors), Counter[str]())
    times = sorted(second for visitor in visitors for second in visitor.seconds)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": dict(answers),
        "texts_that_differ_between_clients": len({json.dumps(each) for each in alone}),
        "median_seconds": statistics.median(times) if times else None,
        "longest_seconds": times[-1] if times else None,
        "memory_mb": flatness(memory),
    }


def main() -> None:
    """Measure, print the figures, and write them with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a cocomix student")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    figures = measure(options.run, options.clients, options.seconds) | environment.describe()
    print(json.dumps(figures, indent=2))
    if options.json:
        files.write_json(options.json, figures)


if __name__ == "__main__":
    main()
