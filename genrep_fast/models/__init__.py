"""The GenRep model and its pipeline over diffusers backbones."""

from .genrep import GenRep, GenRepOutput
from .pipeline import GenRepPipeline, PerceptionOutput

__all__ = ["GenRep", "GenRepOutput", "GenRepPipeline", "PerceptionOutput"]
