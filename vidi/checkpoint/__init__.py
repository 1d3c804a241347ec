"""Checkpoints: what a folder holds, loading it, making one, saving one (spec §1, §11)."""
