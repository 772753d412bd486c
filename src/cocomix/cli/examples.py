"""Examples in the help of commands."""

EXAMPLES = {
    "run": (
        "cocomix run recipes/quickstart.yaml --output runs/first --seeds 1,2,3",
        "cocomix run recipes/quickstart.yaml --corpus.source my-texts --training.max_tokens 1e6 --output runs/mine",
        "cocomix run recipes/quickstart.yaml --jobs 2 --quiet",
        "torchrun --nproc_per_node 8 -m cocomix run recipes/gpt2-69m-cocomix.yaml",
    ),
    "train": ("cocomix train recipes/quickstart.yaml --only cocomix",),
    "label": (
        "cocomix label recipes/quickstart.yaml --inspect",
        "cocomix label runs/quickstart/labels --inspect",
        "cocomix label recipes/quickstart.yaml --student-tokenizer gpt2 --output runs/other-tokens",
    ),
    "keys": ("cocomix keys training", "cocomix keys students.NAME.mixer"),
    "concepts": ("cocomix concepts recipes/quickstart.yaml",),
    "concepts search": ("cocomix concepts search runs/quickstart 'return None' --limit 5",),
    "concepts show": ("cocomix concepts show runs/quickstart 650",),
    "concepts name": (
        "cocomix concepts name runs/quickstart --names names.json",
        "cocomix concepts name runs/quickstart --endpoint http://localhost:8000/v1 --model my-model --limit 100",
    ),
    "evaluate": (
        "cocomix evaluate runs/quickstart",
        "cocomix evaluate runs/quickstart/students/ntp --text my-texts",
        "cocomix evaluate runs/quickstart --tasks piqa,arc_easy --limit 100",
    ),
    "compare": ("cocomix compare runs/first runs/second --output comparison",),
    "export": ("cocomix export runs/quickstart/students/ntp --to transformers --dtype bf16",),
    "inspect": (
        "cocomix inspect 'import os'",
        "cocomix inspect runs/quickstart 'import os' --html trace.html --concepts all",
    ),
    "generate": (
        "cocomix generate runs/quickstart 'import os' --steer 650=+8 --compare",
        "cocomix generate 'import os' --steer 'name:return None=off' --temperature 0.8 --num-samples 3",
    ),
    "app": ("cocomix app runs/quickstart --port 7861",),
    "serve": ("cocomix serve runs/quickstart --port 8000",),
}
"""Calls by the name of their command. Tests read each of them."""
