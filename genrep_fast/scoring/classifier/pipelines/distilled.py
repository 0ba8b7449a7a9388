"""Models that were distilled into few steps, whose errors bound no likelihood.

Some are told by their scheduler or network and refused; others look like the model that they were
distilled from, but for a name or a setting, which gives a warning.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from .adapter import Adapter
from .flux import Flux

# Of models that predict where a trajectory ends, beside those that have no noise levels.
_REFUSED = (
    "LCMScheduler",
    "TCDScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
)
# As words of the names under which such models are published.
_NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|lcm|tcd|pcm|hyper|schnell|sprint|dmd2?|flash|meanflow|instaflow)"
    r"(?![a-z])"
)


def refuse_distilled(pipe: Any, adapter: Adapter) -> None:
    """Refuse consistency and mean-flow models, and warn of what looks like few-step distillation.

    Raises:
        ValueError: for a pipeline with a scheduler of such models.
    """
    scheduler = pipe.scheduler
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in _REFUSED:
            raise ValueError(
                f"pipe.scheduler: {ancestor.__name__} belongs to distilled models, which predict "
                "where a trajectory ends, so that their error bounds no likelihood: use the model "
                "that was distilled, with its scheduler"
            )
    reason = _looks_distilled(pipe, adapter)
    if reason is not None:
        warnings.warn(
            f"pipe looks like a model that was distilled into few steps ({reason}); the errors of "
            "such models classify poorly: use the model that was distilled",
            stacklevel=4,
        )


def _looks_distilled(pipe: Any, adapter: Adapter) -> str | None:
    """Why the pipeline looks so, or None."""
    for config in (pipe.config, adapter.config):
        name = _published_name(str(config.get("_name_or_path", None) or ""))
        found = _NAMES.search(name.lower())
        if found:
            return f"its name is {name}"
    scheduler = pipe.scheduler
    settings = scheduler.config
    if type(scheduler).__name__.startswith("Euler"):
        is_trailing = settings.get("timestep_spacing") == "trailing"
        # Models with zero terminal SNR have trailing timesteps as well, and predict velocities.
        if is_trailing and settings.get("prediction_type") == "epsilon":
            return f"{type(scheduler).__name__} has trailing timesteps, as Turbo models have"
    # Models whose embedded guidance was taken out again shift as before.
    is_fixed = not settings.get("use_dynamic_shifting", False)
    if isinstance(adapter, Flux) and is_fixed and not adapter.config.guidance_embeds:
        return "neither embedded guidance nor dynamic shifting, as FLUX.1-schnell"
    return None


def _published_name(path: str) -> str:
    """The name of a model, of its path on a hub, in a hub's cache, or in a folder."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (cached or parts[-1:] or [""])[-1]
