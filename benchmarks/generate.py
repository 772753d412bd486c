"""Benchmark cached generation: tokens per second and memory, compared with a plain model of equal width and depth.

python benchmarks/generate.py --shape small
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import measuring
import shapes
import torch
from transformers import PreTrainedModel

MODELS = ("plain", "interleave", "add")


def build(name: str, shape: shapes.Shape, positions: int) -> PreTrainedModel:
    """Build a model in evaluation mode."""
    torch.manual_seed(0)
    model = shapes.plain(shape, positions) if name == "plain" else shapes.cocomix_model(shape, positions, mixing=name)
    return model.eval().to(measuring.device())


def continuation(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    """Return a call that greedily generates exactly `new_tokens` tokens."""
    return lambda: model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m" if torch.cuda.is_available() else "small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peak-of", choices=MODELS, help="only print the peak of one model")
    arguments = parser.parse_args()
    shape, new_tokens = shapes.SHAPES[arguments.shape], arguments.new_tokens
    positions = arguments.prompt + new_tokens
    prompts = {
        batch: torch.randint(shape.vocabulary, (batch, arguments.prompt), device=measuring.device())
        for batch in arguments.batch
    }
    if arguments.peak_of:
        continuation(build(arguments.peak_of, shape, positions), prompts[arguments.batch[0]], new_tokens)()
        print(measuring.peak_bytes())
        return
    models = {name: build(name, shape, positions) for name in MODELS}
    rows = []
    for batch, prompt in prompts.items():
        times = measuring.alternating(
            {name: continuation(model, prompt, new_tokens) for name, model in models.items()}, arguments.repeats
        )
        for name, taken in times.items():
            same = ["--shape", arguments.shape, "--prompt", str(arguments.prompt), "--new-tokens", str(new_tokens)]
            peak = None
            if not arguments.no_memory:
                peak = measuring.peak_bytes_of(__file__, [*same, "--batch", str(batch), "--peak-of", name]) / 1e6
            speed = measuring.median_ratio(times["plain"], taken)
            rows.append((name, batch, batch * new_tokens / statistics.median(taken), speed, peak))
    columns = ("model", "batch", "tokens/s", "× plain tokens/s", "peak MB")
    measuring.finish(arguments, columns, rows, shape=arguments.shape, prompt=arguments.prompt, new_tokens=new_tokens)


if __name__ == "__main__":
    main()
