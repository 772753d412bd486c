"""CoCoMix: pretrain language models that think in continuous concepts."""

# ruff: noqa: E402
from cocomix import starting

starting.end_quietly_while_loading()

from transformers import AutoConfig, AutoModelForCausalLM

from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.errors import InputError
from cocomix.models.causal_lm import CoCoMixForCausalLM, CoCoMixOutput
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
from cocomix.models.reference_checkpoint import load_reference_checkpoint
from cocomix.models.steering import Steering
from cocomix.steering.trace import Trace
from cocomix.steering.tracing import trace

__version__ = "0.1.0"
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
]

for config, model in ((CoCoMixConfig, CoCoMixForCausalLM), (MultiTokenConfig, MultiTokenForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
