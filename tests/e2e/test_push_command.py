"""`cocomix push` against a local endpoint that answers as the Hub does, and the model card that it uploads."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from cocomix.cli.main import main
from cocomix.common import integrity
from tiny_run import Runner

TOKEN = "hf_" + "secret" * 6


class Hub(ThreadingHTTPServer):
    """What a repository holds after the requests to it; `refuses` answers each with 403 and repeats the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.removeprefix("/api/").split("/")
        answer: dict[str, Any] = {"errors": [], "warnings": []}  # of the card's metadata
        if self.server.refuses:
            return self.answer({"error": f"{self.headers.get('Authorization')} may not write here"}, 403)
        if path[:2] == ["repos", "create"]:
            self.server.created.append(json.loads(body))
            answer = {"url": f"{self.server.url}/me/{json.loads(body)['name']}"}
        elif "preupload" in path:
            wanted = json.loads(body)["files"]
            answer = {
                "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            }
        elif "commit" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            contents = [each["value"] for each in lines if each["key"] == "file"]
            name = "/".join(path[:3])
            self.server.repositories[name] = {each["path"]: base64.b64decode(each["content"]) for each in contents}
            where = name.removeprefix("models/")
            answer = {"commitUrl": f"{self.server.url}/{where}/commit/1", "commitOid": "1"}
        self.answer(answer, 200)

    def answer(self, content: dict[str, Any], status: int) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_is_uploaded_with_what_belongs_to_it(
    catalogued: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = catalogued / "students" / "cocomix"
    assert main(["push", str(run), "me/mixed", "--labels", "--private"]) == 0
    assert [(each["name"], each["type"]) for each in hub.created] == [("mixed", "model"), ("mixed-labels", "dataset")]
    assert all(each.get("private") or each.get("visibility") == "private" for each in hub.created)
    model, labels = hub.repositories["models/me/mixed"], hub.repositories["datasets/me/mixed-labels"]
    wanted = {"config.json", "model.safetensors", "causal_lm.py", "tokenizer.json", "run.json", "README.md"}
    wanted |= {"sae/cfg.json", "sae/sae_weights.safetensors", "catalog/catalog.parquet"}
    assert wanted <= model.keys() and not {"stage.json", "SHA256SUMS", "sae/stage.json"} & model.keys()
    assert {"labels.json", "README.md"} <= labels.keys() and any(name.startswith("train/") for name in labels)
    for name, content in model.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert 'from_pretrained("me/mixed", trust_remote_code=True)' in card.text and "REPO_ID" not in card.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in "".join(capsys.readouterr())

    hub.refuses = True
    assert main(["push", str(run), "me/mixed"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the Hub does not take the upload" in line and "hf auth login" in line and TOKEN not in line
    assert main(["push", str(run), "not a name"]) == 2
    assert "the Hub does not take the upload" in capsys.readouterr().err


def test_every_student_has_a_card_and_older_ones_get_it(finished: Runner, hub: Hub, tmp_path: Path) -> None:
    output = shutil.copytree(finished.folder / "out", tmp_path / "out")
    students = output / "students"
    card = ModelCard.load(students / "cocomix" / "README.md")
    record = json.loads((students / "cocomix" / "run.json").read_text())
    assert card.data.tags[0] == "cocomix" and card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results[0].metric_value == round(record["metrics"]["perplexity"], 4)
    for part in ("steering=", "Teacher: trained on", "SAE: trained here", "Labels: 2 per token", "2502.08524"):
        assert part in card.text, part
    assert "once for all students" in card.text and str(tmp_path) not in card.text
    assert "README.md" in (students / "cocomix" / integrity.SUMS_FILE).read_text()
    plain = ModelCard.load(students / "ntp" / "README.md").text
    assert "trust_remote_code" not in plain and "steering" not in plain and "Teacher" not in plain

    written = (students / "cocomix" / "README.md").read_text()
    (students / "cocomix" / "README.md").unlink()
    shutil.rmtree(output / "sae")
    assert main(["push", str(students / "cocomix"), "me/older"]) == 0
    again = (students / "cocomix" / "README.md").read_text()
    assert "SAE: trained here" in written and "SAE: trained here" not in again and "Teacher: trained on" in again
    assert not [name for name in hub.repositories["models/me/older"] if "/" in name]
    assert main(["push", str(tmp_path), "me/nothing"]) == 2
    assert main(["push", str(students / "ntp"), "me/ntp", "--labels"]) == 2
