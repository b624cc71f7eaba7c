"""From a UNet's answer to what a loss is made of: denoising errors, and inner products of differences."""

from __future__ import annotations

from torch import Tensor, nn

from bench.errors import BenchError
from bench.methods.base import Errors, Products
from bench.training.batches import Batch


class Denoiser(nn.Module):
    """A UNet that answers with the predicted noise in fp32, whatever it was trained to predict.

    The loop hands this shell to accelerate and to torch.compile, so that no wrapper stays on the UNet itself.
    """

    def __init__(self, unet: nn.Module, prediction_type: str):
        super().__init__()
        self.unet = unet
        self.prediction_type = prediction_type

    def forward(self, noisy: Tensor, timesteps: Tensor, alpha_bar: Tensor, context: Tensor) -> Tensor:
        output = self.unet(noisy, timesteps, encoder_hidden_states=context).sample.float()
        return predicted_noise(output, noisy, alpha_bar, self.prediction_type)


def predicted_noise(output: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise a UNet's output stands for; of v: sqrt(a) v + sqrt(1 - a) x_t (arXiv 2202.00512, app. D)."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * noisy
    raise BenchError(f"prediction type {prediction_type!r} cannot be trained; known: epsilon, v_prediction")


def differences(denoiser: nn.Module, batch: Batch) -> Tensor:
    """noise - predicted noise, fp32 [R, C, h, w]."""
    return batch.noise - denoiser(batch.noisy, batch.timesteps, batch.alpha_bar, batch.context)


def denoising_errors(difference: Tensor, paired: bool) -> Errors:
    """Mean over C, H, W of the squared difference, split into winners and losers."""
    error = difference.square().mean(dim=(1, 2, 3))
    return Errors(*error.chunk(2)) if paired else Errors(error)


def inner_products(policy: Tensor, reference: Tensor | None, paired: bool) -> Products:
    """Of differences [R, C, h, w]: the policy's on the winner with its own on the loser, and with the reference's."""
    winner, loser = policy.chunk(2) if paired else (policy, None)

    def product(other: Tensor) -> Tensor:
        return (winner * other[: len(winner)]).mean(dim=(1, 2, 3))

    return Products(None if loser is None else product(loser), None if reference is None else product(reference))
