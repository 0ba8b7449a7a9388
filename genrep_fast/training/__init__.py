"""Training of GenRep on Hugging Face Accelerate."""

from .config import TrainingConfig
from .trainer import Trainer

__all__ = ["TrainingConfig", "Trainer"]
