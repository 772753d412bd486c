"""Benchmark cached generation: tokens per second and memory, compared with a plain model of equal width and depth.

python benchmarks/generate.py --shape small

With `--static`, every model is also measured with a static cache and compiled decoding steps (CUDA graphs on a GPU).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import measuring
import shapes
import torch
from transformers import CompileConfig, PreTrainedModel

MODELS = ("plain", "interleave", "add")
CACHES = ("dynamic", "static")
LABELS = {"dynamic": "dynamic", "static": "static + compiled"}
"""How the table names a cache. The ratio to the plain model is taken between equal caches."""


def build(name: str, shape: shapes.Shape, positions: int) -> PreTrainedModel:
    """Build a model in evaluation mode."""
    torch.manual_seed(0)
    model = shapes.plain(shape, positions) if name == "plain" else shapes.cocomix_model(shape, positions, mixing=name)
    return model.eval().to(measuring.device())


def continuation(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, cache: str = "dynamic"
) -> Callable[[], object]:
    """Return a call that greedily generates exactly `new_tokens` tokens."""
    options: dict[str, object] = {"cache_implementation": cache}
    if cache == "static":
        options["compile_config"] = compiled = CompileConfig()
        compiled._compile_all_devices = True  # without it, Transformers compiles on a GPU only
    return lambda: model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m" if torch.cuda.is_available() else "small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--static", action="store_true", help="also measure a static cache with compiled steps")
    parser.add_argument("--peak-of", nargs=2, metavar=("MODEL", "CACHE"), help="only print the peak of one model")
    arguments = parser.parse_args()
    shape, new_tokens = shapes.SHAPES[arguments.shape], arguments.new_tokens
    positions = arguments.prompt + new_tokens
    prompts = {
        batch: torch.randint(shape.vocabulary, (batch, arguments.prompt), device=measuring.device())
        for batch in arguments.batch
    }
    if arguments.peak_of:
        name, cache = arguments.peak_of
        continuation(build(name, shape, positions), prompts[arguments.batch[0]], new_tokens, cache)()
        print(measuring.peak_bytes())
        return
    models = {name: build(name, shape, positions) for name in MODELS}
    rows = []
    caches = CACHES if arguments.static else CACHES[:1]
    for batch, prompt in prompts.items():
        actions = {
            f"{cache} {name}": continuation(models[name], prompt, new_tokens, cache)
            for cache, name in itertools.product(caches, MODELS)
        }
        times = measuring.alternating(actions, arguments.repeats)
        for cache, name in itertools.product(caches, MODELS):
            same = ["--shape", arguments.shape, "--prompt", str(arguments.prompt), "--new-tokens", str(new_tokens)]
            peak = None
            if not arguments.no_memory:
                one = ["--batch", str(batch), "--peak-of", name, cache]
                peak = measuring.peak_bytes_of(__file__, [*same, *one]) / 1e6
            taken = times[f"{cache} {name}"]
            best = batch * new_tokens / min(taken)
            ratio = measuring.median_ratio(times[f"{cache} plain"], taken)
            rows.append((name, LABELS[cache], batch, batch * new_tokens / statistics.median(taken), best, ratio, peak))
    columns = ("model", "cache", "batch", "tokens/s", "best tokens/s", "× plain tokens/s", "peak MB")
    measuring.finish(arguments, columns, rows, shape=arguments.shape, prompt=arguments.prompt, new_tokens=new_tokens)


if __name__ == "__main__":
    main()
