"""Holding a model against golden tensors, stage by stage: what is true of every model.

A model under test is a `subject.Subject`; what there is to know of its stages is a table of `stage.Stage` entries. Goldens
lie on disk (`store`, `writer`, `ledger`), are compared under budgets with reasons (`compare`, `tolerance`), in runs of up to
three passes (`run`); known faults tell what the harness can see (`faults`). Importing this package loads no model and no
tensor library but NumPy.
"""
