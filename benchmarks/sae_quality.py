"""Train SAEs of several widths on the teacher of a run, and measure their quality on its validation text.

python benchmarks/sae_quality.py runs/prose-concepts --layer 2 --latents 8192 32768 --tokens 1000000
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import measuring

from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.sae_quality import sae_quality
from cocomix.concepts.sae_training import SAEConfig, train_sae
from cocomix.concepts.teacher import freeze
from cocomix.data.packing import load_packed
from cocomix.models.loading import load_causal_lm


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("run", type=Path, help="folder with a finished corpus and teacher")
    parser.add_argument("--layer", type=int, required=True, help="0-based teacher block after which the SAE reads")
    parser.add_argument("--latents", type=int, nargs="+", default=[], help="widths of the SAEs to train")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="activations to train on")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--validation-tokens", type=int, default=300_000)
    parser.add_argument("--saved", type=Path, nargs="+", default=[], help="folders of trained SAEs to measure as well")
    arguments = parser.parse_args()
    corpus = load_packed(arguments.run / "corpus")
    teacher = freeze(load_causal_lm(str(arguments.run / "teacher"))).to(measuring.device())
    blocks = min(len(corpus.validation), -(-arguments.validation_tokens // corpus.info.block_size))
    validation = corpus.validation.select(range(blocks))
    rows: list[tuple[object, ...]] = []

    def measure(name: str, folder: Path, seconds: float | None) -> None:
        sae = load_sae(folder).to(teacher.device)
        quality = sae_quality(teacher, sae, validation, arguments.layer, 16).quality
        rows.append(
            (
                name,
                sae.d_sae,
                f"{quality.dead_share:.1%}",
                quality.fraction_variance_unexplained,
                quality.dimension_variance_unexplained,
                f"{quality.loss_recovered:.1%}",
                None if seconds is None else arguments.tokens / seconds,
            )
        )

    for folder in arguments.saved:
        measure(str(folder), folder, None)
    for latents in arguments.latents:
        config = SAEConfig(
            teacher_layer=arguments.layer,
            d_sae=latents,
            k=arguments.k,
            training_tokens=arguments.tokens,
            tokens_per_step=arguments.tokens_per_step,
        )
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            train_sae(teacher, corpus.train, config, Path(temporary), seed=0)
            measure("trained", Path(temporary), time.perf_counter() - start)
    header = ("SAE", "latents", "dead", "unexplained", "mean over dimensions", "loss recovered", "tokens/s")
    measuring.finish(
        arguments, header, rows, tokens=arguments.tokens, validation_tokens=blocks * corpus.info.block_size
    )


if __name__ == "__main__":
    main()
