"""Register the models with Transformers, so that `AutoModelForCausalLM.from_pretrained` loads them."""

from transformers import AutoConfig, AutoModelForCausalLM

from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM

for config, model in ((CoCoMixConfig, CoCoMixForCausalLM), (MultiTokenConfig, MultiTokenForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
