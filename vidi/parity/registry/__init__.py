"""The registry of stages, a file for each part of the pipeline; `vidi.parity.stages` puts them in order."""
