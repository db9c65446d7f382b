"""Models as segments, and where their configs come from."""

from lf.models import decoder, presets, small

__all__ = ["decoder", "presets", "small"]
