"""The noise levels of flow schedulers that shift them by the size of the image."""

from __future__ import annotations

import math
from typing import Any


def with_static_shift(scheduler: Any, tokens: int, most: float) -> Any:
    """A copy of a scheduler with dynamic shifting, with the shift of images of a size.

    Others are given back as they are. With the shift in its configuration, the scheduler's
    training timesteps lie where those of the pipeline do.

    Args:
        tokens: of the network's input.
        most: the pipeline's greatest shift, where the scheduler does not say.
    """
    config = scheduler.config
    name = "shift" if "shift" in config else "flow_shift"
    if not config.get("use_dynamic_shifting", False) or name not in config:
        return scheduler
    fewest, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", most)
    mu = least + (most - least) / (many - fewest) * (tokens - fewest)
    shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    return type(scheduler).from_config(config, use_dynamic_shifting=False, **{name: shift})
