"""`cocomix push RUN REPO_ID`: share a trained model on the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from cocomix.cli.options import Run, argument
from cocomix.common.console import show


def push(
    run: Run,
    repo_id: Annotated[str, argument("REPO_ID", "Repository on the Hub, USER/NAME; it is created if needed.")],
    labels: Annotated[
        bool, typer.Option("--labels", help="Upload the labeled corpus, which holds its text, to REPO_ID-labels.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create private repositories.")] = False,
) -> None:
    """Upload a model with its card, SAE and catalog.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from cocomix.inspection.runs import model_folder
    from cocomix.reporting.publishing import push_run

    for upload in push_run(model_folder(run), repo_id, labels, private or None):
        show(f"{upload.url}: {upload.files} files")
