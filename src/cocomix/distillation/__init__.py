"""Knowledge distillation (Hinton et al., 2015): stored teacher predictions, and the divergence from them."""
