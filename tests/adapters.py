"""Small models with adapters that matter: at their initial values they would add nothing."""

import torch

from model.config import ModelConfig
from model.lora import inject_lora
from model.lora_config import LoraConfig
from model.transformer import Transformer
from tests.models import make_model


def adapted_model(config: ModelConfig, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of `make_model` with random adapters."""
    model = make_model(config, dtype=dtype)
    inject_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
