"""Images on their way into a diffusion classifier: encoded, checked, and scored by candidates."""

from __future__ import annotations

from collections.abc import Iterator

from .collector import Collector
from .engine import Arrival
from .funnel import Funnel
from .images import ImageStream
from .network import Network


def arrivals_of(
    stream: ImageStream, collector: Collector, network: Network, funnel: Funnel, batch_size: int
) -> Iterator[Arrival]:
    """Images, or their latents, one by one, with the scores of their candidates.

    Args:
        stream: read as it is needed.
        collector: notes what was read.
        network: encodes the images.
        funnel: scores them, where there are candidates.
        batch_size: images that are scored together, where there is no VAE to encode them.
    """
    index = 0
    for batch in stream:
        collector.see(batch)
        device = network.device(batch.images)
        together = batch_size if network.vae is None else network.encoded_together(batch.images)
        for start in range(0, len(batch.images), together):
            images = batch.images[start : start + together]
            ids = batch.ids[start : start + together]
            latents = network.encode(images.to(device)).to(device)
            network.check_latents(latents, ids, index)
            scores = funnel.scores(latents.to(network.dtype(latents)))
            for latent, image_id, of_image in zip(latents, ids, scores, strict=True):
                yield Arrival(index, image_id, latent, of_image)
                index += 1
