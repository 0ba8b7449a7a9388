"""Images on their way into a diffusion classifier: encoded, checked, and scored by candidates."""

from __future__ import annotations

from collections.abc import Iterator

from .collector import Collector, Recorder
from .engine import Arrival
from .funnel import Funnel
from .images import ImageStream
from .network import Network
from .progress import Progress


def arrivals_of(
    stream: ImageStream,
    collector: Collector | Recorder,
    network: Network,
    funnel: Funnel,
    batch_size: int,
    bar: Progress,
) -> Iterator[Arrival]:
    """Images that have not finished, or their latents, with the scores of their candidates.

    Args:
        stream: read as it is needed.
        collector: notes what was read, and says what has finished.
        network: encodes the images.
        funnel: scores them, where there are candidates.
        batch_size: images that are scored together, where there is no VAE to encode them.
        bar: counts images that have finished.
    """
    first = 0
    for batch in stream:
        left = collector.see(batch, bar)
        device = network.device(batch.images)
        together = batch_size if network.vae is None else network.encoded_together(batch.images)
        for start in range(0, len(left), together):
            rows = left[start : start + together]
            ids = [batch.ids[row] for row in rows]
            latents = network.encode(batch.images[rows].to(device)).to(device)
            network.check_latents(latents, ids, [first + row for row in rows])
            scores = funnel.scores(latents.to(network.dtype(latents)))
            for latent, image_id, row, of_image in zip(latents, ids, rows, scores, strict=True):
                yield Arrival(first + row, image_id, latent, of_image)
        first += len(batch.images)


def with_labels(
    arrivals: Iterator[Arrival], collector: Collector | Recorder, name: str
) -> Iterator[Arrival]:
    """Images, once the first has come with its label.

    Raises:
        ValueError: where it has none, which `name` needs.
    """
    for arrival in arrivals:
        if collector.labels() is None:
            raise ValueError(f"{name} need labels, got none")
        yield arrival
