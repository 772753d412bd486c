"""CoCoMix: pretrain language models that think in continuous concepts."""

from typing import TYPE_CHECKING

from cocomix.common import starting
from cocomix.common.version import __version__ as __version__

starting.exit_quietly_while_loading()

if TYPE_CHECKING or not starting.is_command():  # a command loads what it needs: `cocomix --help` takes no torch
    from cocomix.common.errors import InputError
    from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels
    from cocomix.concepts.label_writer import write_labels
    from cocomix.concepts.sae import Latents, SparseAutoencoder
    from cocomix.concepts.sae_loading import load_sae
    from cocomix.inspection.trace import Trace
    from cocomix.inspection.tracing import trace
    from cocomix.models import registration as registration
    from cocomix.models.causal_lm import CoCoMixForCausalLM, CoCoMixOutput
    from cocomix.models.configuration import CoCoMixConfig
    from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
    from cocomix.models.reference_checkpoint import load_reference_checkpoint
    from cocomix.models.steering import Steering

__all__ = [
    "CoCoMixConfig",
    "CoCoMixForCausalLM",
    "CoCoMixOutput",
    "ConceptExtractor",
    "ConceptLabels",
    "InputError",
    "Latents",
    "MultiTokenConfig",
    "MultiTokenForCausalLM",
    "SparseAutoencoder",
    "Steering",
    "Trace",
    "load_reference_checkpoint",
    "load_sae",
    "trace",
    "write_labels",
]
