"""Holding a model to stored tensors, stage by stage; knows nothing of any one model."""
