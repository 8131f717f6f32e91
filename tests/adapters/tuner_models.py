"""Two small models for the tuners' tests, and how to ask them."""

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

TEXT_TARGETS = ["q_proj", "fc1"]  # square and tall weights
UNET_TARGETS = ["to_q", "to_v", "to_out.0"]
TARGETS = {"text": TEXT_TARGETS, "unet": UNET_TARGETS}


def build(kind):
    """The same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "text":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            return CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **sizes)).eval()
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        return unet.eval()


def ask(model):
    """The model's answer to one fixed question; works on a bare model and on a `PeftModel`."""
    generator = torch.Generator().manual_seed(1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = next(base.parameters()).dtype
    if isinstance(base, UNet2DConditionModel):
        noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 12, generator=generator)
        return model(noisy.to(dtype), torch.tensor([7]), text.to(dtype)).sample
    return model(torch.arange(6)[None]).last_hidden_state


def shake(model, adapter="default", size=0.1, seed=2):
    """Move every trained number of an adapter at random: an adapter as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter}" in name and parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def weights(model, targets):
    """(fan_out, fan_in) of every targeted linear of a bare model."""
    return [tuple(m.weight.shape) for name, m in model.named_modules() if any(name.endswith(f".{t}") for t in targets)]
