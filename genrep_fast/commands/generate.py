"""`genrep generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..checks import check_at_least, check_not_negative, check_seed
from ..files import only_writer
from ..names import printable

ARGUMENTS: dict[str, dict[str, Any]] = {
    "labels": {
        "nargs": "+",
        "required": True,
        "help": "class indices, or classes' names; 07 is a name where a class has it",
    },
    "grid": {
        "action": "store_true",
        "help": "write grid.png, too: all pictures in one, a class a row; "
        "more than 20 rows stand in blocks side by side",
    },
}

# Images that pass through a network at once.
_BATCH_SIZE = 64


def generate(
    checkpoint: str,
    labels: list[str],
    output: str = "generated",
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    size: int | None = None,
    batch_size: int = _BATCH_SIZE,
    grid: bool = False,
) -> None:
    """Generate one PNG a label.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        output: folder for the PNGs.
        num_inference_steps: length of the reverse chain.
        guidance_scale: of classifier-free guidance against the null class; 1 for none.
        seed: of the noise.
        size: shorter side of the PNGs in pixels; the model's own where not given.
        batch_size: images that are drawn at once; no image depends on it.
    """
    from .. import pictures

    check_at_least(1, num_inference_steps=num_inference_steps, batch_size=batch_size)
    check_not_negative(guidance_scale, "guidance_scale")
    check_seed(seed)
    pipeline = pictures.load_pipeline(checkpoint)
    names = pipeline.model.class_names
    indices, remarks = pictures.class_indices(labels, names)
    sides = pictures.picture_size(size, pipeline.model.image_shape, indices, grid)
    pictures.check_network_fits(pipeline.model, "batch_size", min(len(indices), batch_size))
    pictures.check_steps(pipeline, num_inference_steps=num_inference_steps)
    for remark in remarks:
        print(f"genrep generate: {printable(remark)}", file=sys.stderr)
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    folder = Path(output)
    together = []
    with only_writer(folder):
        for position, picture in enumerate(
            pictures.drawn(pipeline, indices, batch_size, **options)
        ):
            label = indices[position]
            path = folder / pictures.file_name(position, label, names[label])
            if size is not None:
                picture = picture.resize(sides, resample=0)
            pictures.save(picture, path)
            print(printable(path), flush=True)
            if grid:
                together.append(picture)
        if grid:
            path = folder / pictures.GRID
            pictures.save(pictures.grid_of(together, indices), path)
            print(printable(path))
