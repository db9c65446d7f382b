"""Files of a run: its checkpoints (`native`), and Hugging Face folders (`lf.hf`, which is `lf.checkpoint.hf`)."""

from lf.checkpoint.atomic import CheckpointError
from lf.checkpoint.manifests import Manifest, latest, manifest, prune
from lf.checkpoint.native import load, masters, model, save

__all__ = ["CheckpointError", "Manifest", "latest", "load", "manifest", "masters", "model", "prune", "save"]
