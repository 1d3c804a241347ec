"""What a run found: for a terminal and for machines (`terminal`), as a page (`page`)."""
