"""Register the models with Transformers, so that its `Auto` classes load them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cocomix.models.base_model import CoCoMixModel
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM

for config, model in ((CoCoMixConfig, CoCoMixForCausalLM), (MultiTokenConfig, MultiTokenForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
AutoModel.register(CoCoMixConfig, CoCoMixModel)
