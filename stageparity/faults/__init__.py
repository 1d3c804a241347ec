"""Known faults: planted into a model one by one (`plant`), judged (`judge`), and kept as what was found (`stored`)."""
