"""From a file and a question to tensors: frames, log-mel pieces, token ids, and the one place that pads (spec §2)."""
