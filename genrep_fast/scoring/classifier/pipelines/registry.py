"""Which pipelines a classifier can be made of, by the names of their classes."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter
from .dit import DiT
from .flux import Flux
from .pixart import PixArtAlpha, PixArtSigma
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .stable_diffusion_3 import StableDiffusion3

FAMILIES: dict[str, type[Adapter]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArtAlpha,
    "PixArtSigmaPipeline": PixArtSigma,
    "SanaPipeline": Sana,
    "DiTPipeline": DiT,
}


def family_of(pipe: Any) -> str:
    """The name of the pipeline's class, or of an ancestor, among `FAMILIES`.

    Raises:
        TypeError: for what is no pipeline, and pipelines of other families.
    """
    for ancestor in type(pipe).__mro__:
        if ancestor.__name__ in FAMILIES:
            return ancestor.__name__
    name = type(pipe).__name__
    message = f"pipe must be one of {', '.join(FAMILIES)}, got {name}"
    if isinstance(pipe, str):
        raise TypeError(f"{message}: load it with from_pretrained")
    # The longest name first: of an SDXL pipeline for inpainting, XL.
    for family in sorted(FAMILIES, key=len, reverse=True):
        if name.startswith(family.removesuffix("Pipeline")) and hasattr(pipe, "components"):
            message += f"; {family}.from_pipe(pipe) makes one where its components are the same"
            break
    raise TypeError(message)


def adapter_of(pipe: Any) -> Adapter:
    """The adapter of a pipeline.

    Raises:
        TypeError, ValueError: as `family_of`, and for components that do not fit.
    """
    return FAMILIES[family_of(pipe)](pipe)
