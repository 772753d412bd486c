"""CoCoMix: pretrain language models that think in continuous concepts."""

import importlib
from typing import TYPE_CHECKING, Any

from cocomix.common import starting
from cocomix.common.version import __version__ as __version__

starting.exit_quietly_while_loading()

if TYPE_CHECKING:
    from cocomix.catalog.search import Catalog, open_catalog
    from cocomix.common.errors import InputError
    from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels
    from cocomix.concepts.label_writer import write_labels
    from cocomix.concepts.sae import Latents, SparseAutoencoder
    from cocomix.concepts.sae_loading import load_sae
    from cocomix.data.packing import PackedCorpus, load_packed
    from cocomix.inspection.trace import Trace
    from cocomix.inspection.tracing import trace
    from cocomix.models.base_model import CoCoMixModel, CoCoMixModelOutput
    from cocomix.models.causal_lm import CoCoMixForCausalLM, CoCoMixOutput
    from cocomix.models.configuration import CoCoMixConfig
    from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
    from cocomix.models.reference_checkpoint import load_reference_checkpoint
    from cocomix.models.steering import Steering
elif not starting.is_command():  # a command loads what it needs: `cocomix --help` takes no torch
    from cocomix.models import registration as registration  # Transformers registers classes, and no names of them

__all__ = [
    "Catalog",
    "CoCoMixConfig",
    "CoCoMixForCausalLM",
    "CoCoMixModel",
    "CoCoMixModelOutput",
    "CoCoMixOutput",
    "ConceptExtractor",
    "ConceptLabels",
    "InputError",
    "Latents",
    "MultiTokenConfig",
    "MultiTokenForCausalLM",
    "PackedCorpus",
    "SparseAutoencoder",
    "Steering",
    "Trace",
    "load_packed",
    "load_reference_checkpoint",
    "load_sae",
    "open_catalog",
    "trace",
    "write_labels",
]

_MODULES = {
    "catalog.search": ("Catalog", "open_catalog"),
    "common.errors": ("InputError",),
    "concepts.attribution": ("ConceptExtractor", "ConceptLabels"),
    "concepts.label_writer": ("write_labels",),
    "concepts.sae": ("Latents", "SparseAutoencoder"),
    "concepts.sae_loading": ("load_sae",),
    "data.packing": ("PackedCorpus", "load_packed"),
    "inspection.trace": ("Trace",),
    "inspection.tracing": ("trace",),
    "models.base_model": ("CoCoMixModel", "CoCoMixModelOutput"),
    "models.causal_lm": ("CoCoMixForCausalLM", "CoCoMixOutput"),
    "models.configuration": ("CoCoMixConfig",),
    "models.multi_token": ("MultiTokenConfig", "MultiTokenForCausalLM"),
    "models.reference_checkpoint": ("load_reference_checkpoint",),
    "models.steering": ("Steering",),
}
"""The module of each public name, which is imported when the name is first used (PEP 562)."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = getattr(importlib.import_module(f"cocomix.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
