"""Which prompt fits a picture best, by one of diffusers' pipelines; nothing is trained.

Needs diffusers and transformers. `pipeline` is a folder or a name on the hub: Stable Diffusion 1,
2, XL or 3, Flux, PixArt, Sana, or DiT with labels for prompts.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

import genrep_fast as gf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pipeline")
parser.add_argument("images", nargs="+")
parser.add_argument("--prompts", nargs="+", default=["a photo of a cat", "a photo of a dog"])
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--batch_size", type=int, default=16)
arguments = parser.parse_args()

device, dtype = "cpu", torch.float32
if torch.cuda.is_available():
    device, dtype = "cuda", torch.bfloat16
pipe = DiffusionPipeline.from_pretrained(arguments.pipeline).to(device, dtype)
classifier = gf.DiffusionClassifier.from_pipeline(
    pipe, arguments.prompts, null_prompt=None, batch_size=arguments.batch_size
)

height, width = classifier.image_size
images = [
    ImageOps.fit(Image.open(path).convert("RGB"), (width, height)) for path in arguments.images
]
# For many images `classifier.calibrate(some of them)`, and the default strategy, a race.
result = classifier(images, strategy=gf.Full(arguments.steps))

for path, label, log_p in zip(arguments.images, result.prediction, result.posterior, strict=True):
    print(f"{path}: {arguments.prompts[label]} ({log_p[label].exp():.1%})")
